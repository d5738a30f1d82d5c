"""Round-to-nearest: the grid, the packing, the kernels and the byte account, against plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms import packed_rows, packing
from workers.mechanisms.native import Built
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear, PackedLinear
from workers.mechanisms.weight_policy import weight_bytes
from workers.policies.quantize.rtn import RoundToNearest

MATRICES: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(96, 128) * 0.02,
    "far from zero": lambda: torch.randn(64, 64) * 1e-3 + 5,
    "constant": lambda: torch.full((64, 64), -2.5),
    "nearly constant": lambda: torch.randn(64, 64) * 1e-6 + 3,
    "zero": lambda: torch.zeros(64, 64),
    "pruned": lambda: torch.randn(64, 128) * (torch.rand(64, 128) > 0.5),
    "two values": lambda: torch.randn(64, 64).sign() * 3.3,
    "outliers": lambda: torch.randn(64, 64) * torch.where(torch.rand(64, 64) > 0.99, 1000, 1),
}
every_matrix = pytest.mark.parametrize("make", MATRICES.values(), ids=list(MATRICES))
both_formats = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def packed(source: nn.Linear, bits: int, group: int = 32) -> PackedLinear:
    return Int8Linear.of(source) if bits == 8 else Int4Linear.of(source, group)


def test_eight_bits_by_hand() -> None:
    scale = 2.0**-4
    weight = torch.tensor([[1.0, -2.0, 126.0, 0.4], [0.0, 0.0, 0.0, 0.0]]) * scale
    codes, scales = packing.round_rows(weight)
    step = float(scales[0])
    assert 126 / 127 * scale <= step <= 126 / 127 * scale * 1.01  # the first bfloat16 number not under 126/127
    assert codes.tolist() == [[1, -2, round(126 * scale / step), 0], [0, 0, 0, 0]]


def test_four_bits_by_hand() -> None:
    group = torch.arange(32).remainder(16).float() + 1  # 1..16: sixteen values a step of 1 apart
    codes, grid = packing.round_groups(group[None], 32)
    assert grid.flatten().tolist() == [1.0, 9.0]  # step 1, code 8 stands for 9
    assert codes[0].tolist() == [int(v) - 1 for v in group]
    pruned = torch.tensor([[0.0, 7.5, -7.5, 3.2] * 8])
    codes, grid = packing.round_groups(pruned, 32)
    assert grid[0, 0, 1] == 0
    assert codes[0, 0] == 8
    assert codes[0, 3] == 8 + round(3.2 / float(grid[0, 0, 0]))


@every_matrix
def test_no_weight_moves_more_than_half_a_step_and_zeros_stay(make: Callable[[], Tensor]) -> None:
    weight = make()
    codes8, scales = packing.round_rows(weight)
    codes4, grid = packing.round_groups(weight, 32)
    values8 = codes8.double() * scales.double()[:, None]
    step4 = grid[..., 0].double().T.repeat_interleave(32, 1)
    values4 = (codes4.double() - 8) * step4 + grid[..., 1].double().T.repeat_interleave(32, 1)
    tolerance = 1e-6 * weight.abs().max()  # float32 division before rounding
    assert ((weight - values8).abs() <= scales.double()[:, None] / 2 + tolerance).all()
    assert ((weight - values4).abs() <= step4 / 2 + tolerance).all()
    assert (values8[weight == 0] == 0).all()
    assert (values4[weight == 0] == 0).all()


@pytest.mark.parametrize("block", [16, 32, 64])
def test_packing_round_trip(block: int) -> None:
    codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    assert torch.equal(packing.unpack(packing.pack(codes, block)), codes.T)
    assert packing.pack(codes, block).nbytes == codes.numel() // 2


def test_packing_by_four_by_hand_and_back() -> None:
    codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
    packed = packing.pack_by_four(codes)
    assert packed.shape == (2, 24, 32, 4)
    assert packed[1, 5, 7, 3] == codes[64 + 7, 4 * 5 + 3] + 16 * codes[64 + 7 + 32, 4 * 5 + 3]
    assert torch.equal(packing.unpack(packed), codes.T)


@pytest.mark.parametrize("rows", [64, 50])
def test_weights_of_either_layout_become_the_one_this_machine_reads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported model may come from a machine with our kernel, or from one without."""
    source, x = nn.Linear(96, rows), torch.randn(3, 96)
    here = Int4Linear.of(source, 32)
    monkeypatch.setattr(packed_rows, "kernels", lambda: Built(None, "as on a machine without a compiler"))
    there = Int4Linear.of(source, 32)
    assert (there.packed.ndim, there.product()) == (3, None)
    brought = Int4Linear(here.packed, here.grid, rows, here.bias)
    assert torch.equal(brought.packed, there.packed)
    for block in (16, 32, 64):  # PyTorch's own layouts, by the processor's instructions
        other = packing.pack(packing.unpack(here.packed).T, block)
        assert torch.equal(Int4Linear(other, here.grid, rows, here.bias).packed, there.packed)
    ids = torch.tensor([3, 40, 3, 0])
    for other in (brought, there):
        assert torch.equal(other.matrix(), here.matrix())
        assert torch.equal(other.rows(ids), here.rows(ids))
        assert other.nbytes() == here.nbytes()
    assert torch.equal(brought(x), there(x))
    monkeypatch.undo()
    back = Int4Linear(there.packed, there.grid, rows, there.bias)
    assert torch.equal(back.packed, here.packed)
    assert torch.equal(back(x), here(x))


def test_our_layout_is_the_one_this_cpu_reads() -> None:
    block = packing.kernel_block()
    if block:  # 0 = fallback to plain products, which the tests below cover too
        codes = torch.randint(0, 16, (128, 96), dtype=torch.uint8)
        assert torch.equal(
            packing.pack(codes, block).flatten(), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1).flatten()
        )


@both_formats
@pytest.mark.parametrize("shape", [(64, 64), (50, 96), (4100, 32), (1, 32)])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_forward_is_a_product_with_the_stored_weights(bits: int, shape: tuple[int, int], rows: int) -> None:
    module, x = packed(linear(*shape, bias=True), bits), torch.randn(2, rows, shape[1])
    exact = x.double() @ module.matrix().double().T + module.bias.double()
    kernel = 2 * rows <= module.kernel_rows
    tolerance = 2**-7 if kernel else 1e-5  # bfloat16 input and output, or float32
    assert module(x).shape == exact.shape
    assert module(x).dtype == torch.float32
    assert (module(x) - exact).abs().max() <= tolerance * exact.abs().max()


@both_formats
def test_without_a_kernel_the_product_is_the_plain_one(bits: int) -> None:
    module, x = packed(linear(50, 64), bits), torch.randn(3, 64)
    module.kernel_rows = 0
    assert torch.allclose(module(x), x @ module.matrix().T, atol=1e-6)


def test_widths_that_the_kernel_cannot_read_do_not_reach_it() -> None:
    module = Int8Linear.of(linear(7, 50))
    assert module.kernel_rows == 0
    assert torch.isfinite(module(torch.randn(1, 50))).all()


@both_formats
def test_rows_do_not_depend_on_their_neighbours(bits: int) -> None:
    module, x = packed(linear(96, 64), bits), torch.randn(16, 64)
    assert torch.equal(module(x), torch.cat([module(row[None]) for row in x]))


@both_formats
@pytest.mark.parametrize("sizes", [(64, 128, 64), (50, 30), (4096, 7)])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_parts_give_the_same_numbers(bits: int, sizes: tuple[int, ...], bias: bool) -> None:
    parts = [packed(linear(n, 64, bias), bits) for n in sizes]
    whole = type(parts[0]).fuse(parts)
    assert whole is not None
    assert torch.equal(whole.matrix(), torch.cat([p.matrix() for p in parts]))
    for m in (1, 4):
        x = torch.randn(m, 64)
        assert torch.equal(whole(x), torch.cat([p(x) for p in parts], -1))


def test_parts_of_different_groups_do_not_fuse() -> None:
    assert Int4Linear.fuse([Int4Linear.of(linear(64, 64), 32), Int4Linear.of(linear(64, 64), 64)]) is None


@pytest.mark.parametrize(("rows", "width", "group"), [(64, 64, 32), (50, 128, 64), (4100, 32, 32)])
def test_bytes_follow_the_formula(rows: int, width: int, group: int) -> None:
    padded = (rows + 63) // 64 * 64
    assert Int4Linear.of(linear(rows, width), group).nbytes() == padded * width // 2 + padded * (width // group) * 4
    assert Int8Linear.of(linear(rows, width)).nbytes() == rows * width + rows * 2
    assert Int8Linear.of(linear(rows, width, bias=True)).nbytes() == rows * width + rows * 2 + rows * 4


@both_formats
def test_lookup_reads_the_packed_table(bits: int) -> None:
    module = packed(linear(512, 64), bits)
    ids = torch.randint(0, 512, (2, 9))
    assert torch.equal(module.lookup(torch.float32)(ids), module.matrix()[ids])
    assert module.lookup(torch.bfloat16)(ids).dtype == torch.bfloat16


def test_eight_bits_lose_less_than_four_and_small_groups_less_than_large_ones() -> None:
    source = linear(128, 256)

    def error(module: PackedLinear) -> float:
        return float((module.matrix() - source.weight).norm() / source.weight.norm())

    errors = [error(packed(source, 8)), *(error(packed(source, 4, g)) for g in (32, 64, 128, 256))]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[1] < 0.1


@pytest.mark.parametrize("head", ["int8", "same", "keep"])
@pytest.mark.parametrize("tied", [True, False])
def test_head_and_tied_embedding(head: str, tied: bool) -> None:
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder())
    table, width = tiny.VOCAB, 64
    stored = {"int8": table * (width + 2), "same": table * width // 2 + table * 2 * 4, "keep": table * width * 4}[head]
    inside = 2 * sum(
        padded * k // 2 + padded * k // 32 * 4
        for padded, k in ((64, 64), (64, 64), (64, 64), (64, 64), (128, 64), (128, 64), (64, 128))
    )
    others = (5 * 64 + 2 * 8) * 4
    with attached(session, RoundToNearest(bits=4, head=head)):
        assert weight_bytes(session) == inside + others + stored + (0 if tied else table * width * 4)
        generate(session, [prompt(20)], new=4)


@both_formats
def test_the_model_computes_with_the_rounded_weights(bits: int) -> None:
    """The same numbers as the library's own modules with the rounded matrices written into a copy."""
    session = make_session(tiny.llama_folder())
    policy = RoundToNearest(bits=bits, head="same")
    reference = make_session(tiny.llama_folder())
    reference.model = copy.deepcopy(session.model)
    with attached(session, policy):
        for name, module in session.model.named_modules():
            if isinstance(module, PackedLinear):
                reference.model.get_submodule(name).weight.data = module.matrix()
        got = forced(session, prompt(80), prompt(8, seed=5))
    expected = forced(reference, prompt(80), prompt(8, seed=5))
    assert (got.exp() - expected.exp()).abs().max() < 0.05
    assert (got - forced(session, prompt(80), prompt(8, seed=5))).abs().max() > 1e-3  # and not the original ones


def test_baseline_is_bit_equal_afterwards() -> None:
    session = make_session()
    before = forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, RoundToNearest(bits=4)):
        tokens(generate(session, [prompt(20), prompt(33)], new=4))
    assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)


def test_a_group_that_does_not_fit_is_refused_in_one_sentence() -> None:
    with (
        pytest.raises(SpecError, match="group_size = 128 does not divide the width 64"),
        attached(make_session(), RoundToNearest(bits=4, group_size=128)),
    ):
        pass
