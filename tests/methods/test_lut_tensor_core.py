"""LUT Tensor Core: half tables, folded planes and rounded tables against enumerated sums and round-to-nearest; the simulated unit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms import lookup_tables, packing, table_hardware
from workers.mechanisms.lut_linear import TABLE_ROWS, HalfTableLinear
from workers.mechanisms.packed_linear import BitPlaneLinear
from workers.mechanisms.weight_policy import Spot, build, weight_metrics
from workers.policies.quantize.lut_tensor_core import LutTensorCore
from workers.policies.quantize.rtn import RoundToNearest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(source: nn.Linear, **knobs: object) -> HalfTableLinear:
    new = build(LutTensorCore(**knobs), source, Spot("map"))  # type: ignore[arg-type]
    assert isinstance(new, HalfTableLinear)
    return new


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def test_the_other_half_of_a_table_is_its_negative() -> None:
    x = torch.randn(3, 32)
    whole, half = lookup_tables.tables(x, 4), lookup_tables.half_tables(x)
    assert half.shape == (3, 8, 8)
    assert torch.equal(whole, -whole.flip(-1))  # the complement of p is 15 - p
    assert torch.equal(torch.cat([half, -half.flip(-1)], -1), whole)


def test_folding_turns_over_what_stands_under_a_set_last_bit_and_undoes_itself() -> None:
    every = torch.arange(256, dtype=torch.uint8)[None, None]
    folded = lookup_tables.folded(every)
    assert torch.equal(lookup_tables.folded(folded), every)
    assert folded[0, 0, 0b0011_1010].item() == 0b0011_1101  # low half negated: 1010 stands for minus 0101
    place, minus = lookup_tables.picks(folded[0])
    x = torch.randn(1, 8, dtype=torch.float64)
    whole, half = lookup_tables.tables(x, 4), lookup_tables.half_tables(x)
    for pattern in range(256):
        for run, nibble in enumerate((pattern & 15, pattern >> 4)):
            row = place.view(256, 2, 1) if place.shape[0] != 2 else place.view(2, 256).T[..., None]
            sign = (minus.view(256, 2, 1) if minus.shape[0] != 2 else minus.view(2, 256).T[..., None])[pattern, run, 0]
            found = half[0, run, row[pattern, run, 0]] * (-1 if sign else 1)
            assert found == whole[0, run, nibble]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_reinterpreted_codes_give_the_same_weights_and_in_whole_numbers_the_same_product(bits: int) -> None:
    """Card: q' = 2q - (2^b - 1), s' = s / 2. Steps that are powers of two and float64, so nothing is rounded."""
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    grid = torch.stack([2.0 ** torch.randint(-2, 3, (2, 5)), torch.randint(-8, 8, (2, 5)).float()], -1).bfloat16()
    plain = BitPlaneLinear.stored(codes, grid, bits, None)
    module = HalfTableLinear(lookup_tables.folded(plain.planes), grid, None, False)
    assert torch.equal(module.matrix(), plain.matrix())
    x = torch.randint(-50, 50, (3, 64), dtype=torch.float64)
    assert torch.equal(module(x), x @ plain.matrix().double().T)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_float_tables_are_exact_to_float64_rounding(bits: int) -> None:
    module, x = made(linear(24, 96, bias=True), bits=bits, tables="float"), torch.randn(4, 96, dtype=torch.float64)
    exact = x @ module.matrix().double().T + module.bias
    assert (module(x) - exact).abs().max() <= 1e-6 * exact.abs().max()  # the bias and the matrix are float32
    bare = HalfTableLinear(module.planes, module.grid, None, False)
    step, zero = (t.double().T.repeat_interleave(32, 1) for t in module.grid.unbind(-1))
    codes = packing.unpack_planes(lookup_tables.folded(module.planes)).double()
    wanted = x @ ((codes - 2 ** (bits - 1)) * step + zero).T
    assert (bare(x) - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_rounded_tables_by_hand() -> None:
    x = torch.tensor([[1.0, 2, 3, 4, 0.5, 0, 0, 0]])
    half, scale = lookup_tables.rounded(lookup_tables.half_tables(x), 2)
    assert scale.tolist() == [[pytest.approx(10 / 127)]]  # the largest of both runs, 1 + 2 + 3 + 4
    sums = [sum(s * v for s, v in zip((*reversed(p), -1), (1, 2, 3, 4), strict=True)) for p in product((-1, 1), repeat=3)]
    assert half[0, 0].tolist() == [round(v * 127 / 10) for v in sums]
    assert half[0, 1].unique().tolist() == [-6, 6]  # 0.5 * 12.7
    assert lookup_tables.rounded(torch.zeros(1, 2, 8), 2)[0].count_nonzero() == 0


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rounded_tables_look_up_in_whole_numbers_and_are_close(bits: int) -> None:
    module = made(linear(48, 128), bits=bits)
    floats = HalfTableLinear(module.planes, module.grid, None, False)
    x = torch.randn(TABLE_ROWS, 128)
    table, _ = module.tables(x)
    assert table.dtype == torch.int8
    serial = module.serial(table, module.planes)
    assert serial.dtype == torch.int32
    codes = packing.unpack_planes(lookup_tables.folded(module.planes)).long()
    for n in range(0, 48, 7):  # group 1 of row 3, added up one pattern after the other
        wanted = 0
        for run in range(8, 16):
            for bit in range(bits):
                signs = [1 if codes[n, 4 * run + j] >> bit & 1 else -1 for j in range(4)]
                flip = signs[3] == 1
                place = sum((s == 1) != flip and 1 << j for j, s in enumerate(signs[:3]))
                wanted += int(table[3, run, place]) * (-1 if flip else 1) * 2**bit
        assert int(serial[3, 1, n]) == wanted
    apart = (module(x) - floats(x)).norm() / floats(x).norm()
    assert 0 < apart < 0.012  # the card found 0.3 to 0.6 %; an entry is off by at most 1 in 254 of the largest


def test_a_prompt_sees_the_numbers_that_an_answer_sees() -> None:
    module, x = made(linear(40, 64, bias=True), bits=3), torch.randn(2, TABLE_ROWS + 5, 64)
    one_by_one = torch.stack([torch.stack([module(row) for row in batch]) for batch in x])
    assert module(x).shape == (2, TABLE_ROWS + 5, 40)
    assert torch.allclose(module(x), one_by_one, atol=1e-6)


def test_bytes_fusing_and_rows() -> None:
    parts = [made(linear(n, 64, bias=True), bits=2) for n in (24, 40)]
    assert parts[0].ledger() == {"codes": 2 * 24 * 8, "scales": 4 * 2 * 24, "padding": 0, "bias": 96}
    assert parts[0].nbytes() == sum(parts[0].ledger().values())
    whole = HalfTableLinear.fuse(parts)
    assert whole is not None
    assert torch.equal(whole.matrix(), torch.cat([p.matrix() for p in parts]))
    x = torch.randn(2, 64)
    assert torch.allclose(whole(x), torch.cat([p(x) for p in parts], -1), atol=1e-6)
    assert torch.equal(whole.rows(torch.tensor([30, 2])), whole.matrix()[[30, 2]])
    assert HalfTableLinear.fuse([parts[0], made(linear(40, 64, bias=True), bits=2, tables="float")]) is None


def test_one_bit_is_the_mean_plus_or_minus_the_mean_distance() -> None:
    source = linear(2, 32)
    source.weight.copy_(torch.tensor([[1.0] * 24 + [5.0] * 8, [-2.0] * 16 + [2.0] * 16]))
    matrix = made(source, bits=1).matrix()
    assert matrix[0].unique().tolist() == [0.5, 3.5]  # mean 2, mean distance 1.5
    assert torch.equal(matrix[1], source.weight[1])


def test_counts_and_simulated_figures_of_a_map() -> None:
    module = made(linear(64, 128), bits=2)
    figures = module.figures()
    assert figures["table_operations"] == (2.5 * 128 + 2 * 64 * 128 / 4, 64 * 128)
    unit, rival = table_hardware.table_area(), table_hardware.float_area()
    assert figures["simulated_area"][0] / figures["simulated_area"][1] == pytest.approx(2 * unit / rival)
    energy, plain = figures["simulated_energy"]
    assert plain == 64 * 128 * table_hardware.float_energy()
    assert energy == pytest.approx(2 * 64 * 128 * table_hardware.table_energy() + 2.5 * 128 * 0.4)


def test_the_simulated_unit_is_smallest_at_the_paper_s_tile() -> None:
    """Of all tiles of 512: two rows, 64 columns, runs of four (LUT Tensor Core, M2 N64 K4)."""
    area = {
        (m, 512 // m // k, k): table_hardware.table_area(m, 512 // m // k, k) for k in (1, 2, 4, 8) for m in (1, 2, 4, 8, 16, 32)
    }
    assert table_hardware.table_area(2, 64, 4) == pytest.approx(min(area.values()))
    by_run = [table_hardware.table_area(2, 64, k) for k in range(1, 8)]
    assert by_run.index(min(by_run)) == 3  # k = 4
    by_hand = (2 * 8 * 8 + 64 * 4) * 4.522 + 128 * (7 * 8 * 1.862 + 8 * 1.596 + 32 * 4.522 + 137)
    assert table_hardware.table_area() == pytest.approx(by_hand / 512)


def test_with_float_tables_the_model_computes_as_rounding_does_and_figures_are_told_as_simulated() -> None:
    session = make_session(tiny.llama_folder())
    scores, plain = [], forced(session, prompt(24), prompt(4, seed=5))
    for policy in (LutTensorCore(bits=3, tables="float"), RoundToNearest(bits=3), LutTensorCore(bits=3)):
        with attached(session, policy):
            scores.append(forced(session, prompt(24), prompt(4, seed=5)))
            told = weight_metrics(session)
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
    assert 1e-4 < (scores[2] - scores[1]).abs().mean() < (scores[1] - plain).abs().mean() / 4  # tables cost less than weights do
    assert {"table_operations", "simulated_area", "simulated_energy"} <= set(told)
    from workers.race import SOURCES

    assert SOURCES["simulated_area"] == SOURCES["simulated_energy"] == "simulated"
    assert SOURCES["table_operations"] == "estimated"
