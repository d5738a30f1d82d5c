"""A scale on a map's input inside its replacement: numbers, bytes and fusing, by plain arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workers.mechanisms import packing
from workers.mechanisms.fusing import fuse
from workers.mechanisms.linear import DenseLinear
from workers.mechanisms.packed_linear import Int8Linear, stored
from workers.mechanisms.scaled_input import ScaledInput


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def scaled(rows: int, scale: torch.Tensor, bias: bool = True) -> ScaledInput:
    source = nn.Linear(len(scale), rows, bias=bias).requires_grad_(False)
    return ScaledInput(Int8Linear(*packing.round_rows(source.weight / scale), source.bias), scale)


def test_by_hand() -> None:
    one = ScaledInput(DenseLinear(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0.5, 0.0])), torch.tensor([10.0, 0.5]))
    assert one(torch.tensor([[1.0, 1.0]])).tolist() == [[11.5, 32.0]]
    assert one.matrix().tolist() == [[10.0, 1.0], [30.0, 2.0]]
    assert one.ledger() == {"codes": 16, "scales": 8, "padding": 0, "bias": 8}
    assert one.nbytes() == 32
    assert one.bits == 32


def test_the_function_is_that_of_its_matrix_and_rows_are_those_of_the_matrix() -> None:
    one = scaled(48, torch.rand(50) + 0.1)
    x = torch.randn(3, 5, 50)
    assert torch.allclose(one(x), x @ one.matrix().T + one.bias, atol=1e-4)
    ids = torch.tensor([3, 3, 40])
    assert torch.equal(one.rows(ids), one.matrix()[ids])
    table = one.lookup(torch.float32)
    assert table is not None
    assert torch.equal(table(ids), one.matrix()[ids])
    assert ScaledInput(DenseLinear(torch.ones(2, 2), None), torch.ones(2)).lookup(torch.float32) is None


@pytest.mark.parametrize("bias", [False, True])
def test_maps_of_one_scale_fuse_and_share_its_bytes(bias: bool) -> None:
    scale = torch.rand(64) + 0.1
    parts = [scaled(n, scale, bias) for n in (20, 36)]
    both = fuse(parts)
    assert both is not None
    whole = both.whole
    assert isinstance(whole, ScaledInput)
    assert (whole.replaces, whole.inner.replaces, whole.zeros) == (2, 0, None)
    assert whole.nbytes() == 56 * (64 + 2) + 64 * 4 + bias * 56 * 4
    assert sum(whole.ledger().values()) == whole.nbytes()
    assert whole.ledger()["scales"] == 56 * 2 + 64 * 4
    x = torch.randn(3, 64)
    assert torch.equal(whole(x), torch.cat([p(x) for p in parts], -1))
    assert torch.equal(whole.matrix(), torch.cat([p.matrix() for p in parts]))
    assert fuse([parts[0], scaled(36, scale * 2, bias)]) is None
    assert fuse([parts[0], scaled(36, scale.double(), bias)]) is None


def test_it_counts_as_one_map_and_takes_over_the_zeros() -> None:
    inner = DenseLinear(torch.tensor([[0.0, 2.0]]), None)
    inner.zeros = 1
    one = ScaledInput(inner, torch.ones(2))
    assert (one.replaces, one.zeros, inner.replaces, inner.zeros) == (1, 1, 0, None)


def test_packed_weights_below_eight_bits_stay_packed() -> None:
    scale = torch.rand(64) + 0.5
    source = nn.Linear(64, 64, bias=False).requires_grad_(False)
    codes, grid = packing.round_groups(source.weight / scale, 32, 4)
    one = ScaledInput(stored(codes, grid, 4, None), scale)
    assert one.bits == 4
    assert one.nbytes() == 64 * 32 + 4 * 2 * 64 + 4 * 64
    assert torch.equal(one.matrix(), one.inner.matrix() * scale)
