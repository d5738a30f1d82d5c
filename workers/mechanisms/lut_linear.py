"""Linear maps in bit planes that multiply by looking sums of activations up.

Few rows look up: one table a run of inputs serves all output rows and all planes. Many rows (prefill) are multiplied with the
unpacked weights, in the same values. Look-ups are gathers of PyTorch, run by run: fewer operations than a product, not less time.

Shapes: m input rows, N output rows, K inputs, g inputs of a group, G = K/g, b bits.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from workers.mechanisms import binary_codes, lookup_tables, packing, table_hardware
from workers.mechanisms.linear import join_bias
from workers.mechanisms.packed_linear import BitPlaneLinear

TABLE_ROWS = 8  # up to so many input rows are looked up


class Looked(NamedTuple):
    """What is made of the inputs once, for all output rows.

    Attributes:
        table: [m, runs, entries]; scale: [m, G] of rounded tables, else None; sums: [m, G] of the inputs of each group.
    """

    table: Tensor
    scale: Tensor | None
    sums: Tensor


class TableLinear(BitPlaneLinear):
    """What both kinds share: when they look up, and what comes beside the planes."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype; float32 (or float64) inside."""
        if not self.looks_up(x.numel() // self.in_features):
            return super().forward(x)
        inputs = x.reshape(-1, self.in_features).to(torch.promote_types(x.dtype, torch.float32))
        sums = inputs.unflatten(1, (self.grid.shape[0], -1)).sum(2)
        made = Looked(*self.tables(inputs), sums)
        starts = range(0, self.out_features, self.STEP)
        parts = [
            self.looked_up(made, self.planes[:, a : a + self.STEP], self.grid[:, a : a + self.STEP].to(inputs.dtype))
            for a in starts
        ]
        y = torch.cat(parts, -1).to(x.dtype)
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)

    def looks_up(self, rows: int) -> bool:
        """Whether so many input rows go through tables."""
        return rows <= TABLE_ROWS

    @abstractmethod
    def tables(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tables of [m, K], and their scale if they are rounded."""

    @abstractmethod
    def looked_up(self, made: Looked, planes: Tensor, grid: Tensor) -> Tensor:
        """Some output rows: planes [b, n, K/8], grid [G, n, numbers] -> [m, n], without bias."""

    @property
    @abstractmethod
    def how(self) -> Hashable:
        """The constructor's last argument."""

    def in_groups(self, runs: Tensor) -> Tensor:
        """Sums within groups of what was looked up: [m, runs, n] -> [m, G, n]."""
        return runs.unflatten(1, (self.grid.shape[0], -1)).sum(2)

    def layout(self) -> Hashable:
        """Same numbers a group, looked up in the same way."""
        return (*super().layout(), self.grid.shape[2], self.how)  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Self:
        """Rows of all parts."""
        planes, grid = torch.cat([p.planes for p in parts], 1), torch.cat([p.grid for p in parts], 1)
        return cls(planes, grid, join_bias(parts), parts[0].how)  # type: ignore[call-arg]


class BinaryCodeLinear(TableLinear):
    """Binary coding, eight inputs a table.

    Args:
        planes: uint8 [b, N, K/8]; grid: alphas and, if there is one, the offset of :mod:`workers.mechanisms.binary_codes`,
            bfloat16 [G, N, b or b + 1]; bias: [N]; lut: look up; else the weights are unpacked at every call.
    """

    def __init__(self, planes: Tensor, grid: Tensor, bias: Tensor | None, lut: bool):
        super().__init__(planes, grid, bias)
        self.lut = lut

    @property
    def how(self) -> Hashable:
        """Whether it looks up."""
        return self.lut

    def looks_up(self, rows: int) -> bool:
        """Few rows, unless it is told to unpack."""
        return self.lut and super().looks_up(rows)

    def tables(self, x: Tensor) -> tuple[Tensor, None]:
        """All sums of every eight inputs: [m, K/8, 256]."""
        return lookup_tables.tables(x, 8), None

    def looked_up(self, made: Looked, planes: Tensor, grid: Tensor) -> Tensor:
        """Plane by plane, each with its own alphas."""
        out = made.sums.new_zeros(len(made.sums), planes.shape[1])
        for bit, plane in enumerate(planes):
            found = made.table.gather(2, plane.T.long().expand(len(made.table), -1, -1))  # [m, K/8, n]
            out += (self.in_groups(found) * grid[..., bit]).sum(1)
        if grid.shape[2] > len(planes):
            out += made.sums @ (grid[..., -1] - grid[..., 0])
        return out

    def figures(self) -> dict[str, tuple[float, float]]:
        """Entries of all tables and one look-up a run and plane, against multiply-adds."""
        if not self.lut:
            return {}
        runs, rows = self.in_features / 8, self.out_features
        return {"table_operations": (256 * runs + len(self.planes) * rows * runs, rows * self.in_features)}

    def _values(self, planes: Tensor, grid: Tensor) -> Tensor:
        numbers = grid.float().transpose(0, 1)  # [n, G, b (+ 1)]
        out = planes.new_zeros(planes.shape[1], grid.shape[0], self.in_features // grid.shape[0], dtype=torch.float32)
        for bit, plane in enumerate(planes):
            pattern = binary_codes.signs(packing.unpack_planes(plane[None]), 0, torch.float32)
            out += pattern.unflatten(1, (grid.shape[0], -1)) * numbers[..., bit, None]
        if grid.shape[2] > len(planes):
            out.sub_(numbers[..., :1]).add_(numbers[..., -1:])
        return out.flatten(1)


class HalfTableLinear(TableLinear):
    """A uniform grid read as bits of -1 and 1, four inputs a table of which half is made.

    Args:
        planes: uint8 [b, N, K/8], folded (:func:`workers.mechanisms.lookup_tables.folded`); grid: bfloat16 [G, N, 2] (scale, zero);
            bias: [N]; int8: round the tables to 8 bits, with one scale a group of inputs and row.
    """

    def __init__(self, planes: Tensor, grid: Tensor, bias: Tensor | None, int8: bool):
        super().__init__(planes, grid, bias)
        self.int8 = int8

    @property
    def how(self) -> Hashable:
        """Whether tables are rounded."""
        return self.int8

    def looks_up(self, rows: int) -> bool:
        """Few rows; with rounded tables all, or a prompt would see other numbers than an answer."""
        return self.int8 or super().looks_up(rows)

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Half of the sums of every four inputs: [m, K/4, 8]; in 8 bits with their scales [m, G]."""
        half = lookup_tables.half_tables(x)
        return lookup_tables.rounded(half, half.shape[1] // self.grid.shape[0]) if self.int8 else (half, None)

    def looked_up(self, made: Looked, planes: Tensor, grid: Tensor) -> Tensor:
        """Bit-serial look-ups, or for many rows the tables times what the weights pick of them."""
        step, zero = grid.unbind(-1)  # [G, n]
        centre = made.sums @ (zero - step / 2)
        scale = torch.ones_like(made.sums) if made.scale is None else made.scale
        if len(made.table) > TABLE_ROWS:
            values = made.table.unflatten(1, (len(step), -1)) * scale[..., None, None]
            return values.flatten(1) @ self.selection(planes, step) + centre
        return (self.serial(made.table, planes).to(step.dtype) * scale[..., None] * (step / 2)).sum(1) + centre

    def serial(self, table: Tensor, planes: Tensor) -> Tensor:
        """Plane after plane, each worth twice the one before: [m, K/4, 8] -> [m, G, n]; whole numbers stay whole."""
        wide = table.to(torch.int32) if self.int8 else table
        out = torch.zeros(len(table), self.grid.shape[0], planes.shape[1], dtype=wide.dtype, device=table.device)
        for bit, plane in enumerate(planes):
            place, minus = lookup_tables.picks(plane)
            found = wide.gather(2, place.expand(len(table), -1, -1))
            out += self.in_groups(torch.where(minus, -found, found)).to(out.dtype) * 2**bit
        return out

    def selection(self, planes: Tensor, step: Tensor) -> Tensor:
        """How much of each table entry each output row takes, all planes and steps [G, n] together: [2 K, n]."""
        out = step.new_zeros(self.in_features // 4, 8, planes.shape[1])
        for bit, plane in enumerate(planes):
            place, minus = lookup_tables.picks(plane)
            out.scatter_add_(1, place[:, None], torch.where(minus, -(2.0**bit), 2.0**bit).to(step.dtype)[:, None])
        return (out.unflatten(0, (len(step), -1)) * (step / 2)[:, None, None]).flatten(0, 2)

    def figures(self) -> dict[str, tuple[float, float]]:
        """Counted operations, and what the paper's unit would take, simulated."""
        rows, width, bits = self.out_features, self.in_features, len(self.planes)
        adds = table_hardware.TABLE_ADDS * width
        return {
            "table_operations": (adds + bits * rows * width / 4, rows * width),
            "simulated_area": (bits * rows * width * table_hardware.table_area(), rows * width * table_hardware.float_area()),
            "simulated_energy": (
                bits * rows * width * table_hardware.table_energy() + adds * table_hardware.FP16_ADD_PJ,
                rows * width * table_hardware.float_energy(),
            ),
        }

    def _values(self, planes: Tensor, grid: Tensor) -> Tensor:
        return super()._values(lookup_tables.folded(planes), grid)
