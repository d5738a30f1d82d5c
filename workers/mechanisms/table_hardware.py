"""A simulated unit that multiplies by look-up, beside one that multiplies: area and energy of a one-bit multiply-add. Not measured.

The unit is that of LUT Tensor Core (arXiv:2408.06003): M rows of activations have a table of 2^(k-1) sums of 8 bits each
in registers; N columns of weights pick from each table by a multiplexer, turn the sign, and add to a register. A weight of b bits
takes b cycles. Its rival multiplies and adds in FP16 every cycle.

Figures of the parts, at 45 nm and 0.9 V: adders and multipliers from Horowitz, Computing's energy problem, ISSCC 2014; flip-flop,
multiplexer and exclusive-or from the NanGate 45 nm open cell library. Energies of those three are taken in proportion to their area,
at the rate of the 8-bit adder. Wires, clocks, control and memories are in neither unit, so only ratios of the two mean something.
"""

from __future__ import annotations

# um^2
INT32_ADD, FP16_ADD, FP16_MULTIPLY = 137.0, 1360.0, 1640.0
FLIP_FLOP, MULTIPLEXER, EXCLUSIVE_OR = 4.522, 1.862, 1.596  # of one bit; two inputs
# pJ
INT32_ADD_PJ, FP16_ADD_PJ, FP16_MULTIPLY_PJ = 0.1, 0.4, 1.1
PJ_PER_AREA = 0.03 / 36.0  # the 8-bit adder

TABLE_ADDS = 2.5  # sums a weight column's input needs for its table of 8: 3 for the first entry of a run of 4, 1 for each other
ENTRY_BITS, SUM_BITS, FLOAT_BITS = 8, 32, 16


def table_area(m: int = 2, n: int = 64, k: int = 4) -> float:
    """um^2 for each multiply-add of one weight bit that an m x n x k unit does in a cycle."""
    return (_storage(m, n, k) + m * n * (_picking(k) + INT32_ADD)) / (m * n * k)


def table_energy(m: int = 2, n: int = 64, k: int = 4) -> float:
    """pJ for each multiply-add of one weight bit; making the tables is counted elsewhere, once a row of activations."""
    return ((_storage(m, n, k) + m * n * _picking(k)) * PJ_PER_AREA + m * n * INT32_ADD_PJ) / (m * n * k)


def float_area() -> float:
    """um^2 of an FP16 multiply-add unit with the register of its sum."""
    return FP16_MULTIPLY + FP16_ADD + FLOAT_BITS * FLIP_FLOP


def float_energy() -> float:
    """pJ of one FP16 multiply-add."""
    return FP16_MULTIPLY_PJ + FP16_ADD_PJ + FLOAT_BITS * FLIP_FLOP * PJ_PER_AREA


def _storage(m: int, n: int, k: int) -> float:
    """um^2 of the half tables and the weight bits."""
    return (m * 2 ** (k - 1) * ENTRY_BITS + n * k) * FLIP_FLOP


def _picking(k: int) -> float:
    """um^2 of what one row and column need beside their adder: choosing an entry, its sign, the register of the sum."""
    return ((2 ** (k - 1) - 1) * MULTIPLEXER + EXCLUSIVE_OR) * ENTRY_BITS + SUM_BITS * FLIP_FLOP
