"""QuaRot: the transform against explicit orthogonal matrices, exact preservation, and planted outliers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms import packing
from workers.mechanisms.fusing import fuse
from workers.mechanisms.hadamard import RotatedInput, hadamard, rotate, signs, sizes, transform
from workers.mechanisms.linear import DenseLinear
from workers.mechanisms.packed_linear import Int4Linear, Int8Linear, PackedLinear
from workers.mechanisms.token_rounding import by_token
from workers.mechanisms.weight_policy import Spot, weight_bytes
from workers.policies.quantize.quarot import QuaRot
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode

BLOCKS = {7: 7, 9: 9, 18: 9, 10 * 43: 215}  # width -> blocks, where no Hadamard matrix of the whole is known here
WIDTHS = (1, 2, 8, 12, 64, 128, 192, 576, 768, 1024, 1152, 1536, *BLOCKS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def made(source: nn.Linear, **knobs: object) -> RotatedInput:
    one = QuaRot(**knobs).replacement(source, Spot("a"))  # type: ignore[arg-type]
    assert isinstance(one, RotatedInput)
    return one


def explicit(width: int) -> Tensor:
    """The whole matrix [K, K], from the orders of its factors."""
    whole = torch.ones(1, 1, dtype=torch.float64)
    for order in sizes(width):
        whole = torch.kron(whole, hadamard(order) / order**0.5)
    return torch.block_diag(*[whole] * (width // len(whole)))


@pytest.mark.parametrize("order", [1, 2, 4, 64, 12, 20, 24, 28, 36, 44, 60, 76, 84, 108, 140, 148])
def test_hadamard_matrices_are_of_ones_and_orthogonal(order: int) -> None:
    h = hadamard(order)
    assert h.shape == (order, order)
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_an_order_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 92 is known here"):
        hadamard(92)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_fast_transform_is_the_explicit_orthogonal_matrix(width: int) -> None:
    whole, x = explicit(width), torch.randn(2, 3, width, dtype=torch.float64)
    assert width // torch.tensor(sizes(width)).prod() == BLOCKS.get(width, 1)
    assert max(sizes(width)) <= 64
    assert torch.allclose(whole @ whole.T, torch.eye(width, dtype=torch.float64))
    assert torch.allclose(transform(x), x @ whole)
    assert torch.allclose(transform(transform(x), back=True), x)
    turn = signs(width, 3)
    assert set(turn.tolist()) <= {1, -1}
    assert torch.allclose(rotate(x, turn), (x * turn) @ whole)


@pytest.mark.parametrize("width", [64, 36, 192, 18])
def test_without_rounding_the_function_is_preserved(width: int) -> None:
    source, x, turn = linear(40, width, bias=True), torch.randn(5, width), signs(width, 0)
    weight, bias = source.weight.double(), source.bias.double()
    one = RotatedInput(DenseLinear(rotate(weight, turn), None), turn, 16, 0.9, bias)
    assert torch.allclose(one(x.double()), x.double() @ weight.T + bias, rtol=1e-12, atol=1e-12)
    assert torch.allclose(one.matrix(), source.weight, atol=1e-6)


def test_a_single_outlier_is_spread_evenly() -> None:
    x = torch.zeros(1, 576)
    x[0, 77] = 24.0
    assert torch.allclose(rotate(x, signs(576, 0)).abs(), torch.ones(1, 576), atol=1e-5)


def outliers(width: int) -> Tensor:
    x = torch.randn(64, width)
    x[:, [3, 50, 90]] *= 40
    return x


@pytest.mark.parametrize("bits", [4, 8])
def test_with_planted_outliers_the_error_is_less_than_without_rotation(bits: int) -> None:
    source, x = linear(96, 192), outliers(192)
    codes, grid = packing.round_groups(source.weight, 32, bits) if bits == 4 else (None, None)
    plain = Int8Linear.of(source) if codes is None or grid is None else Int4Linear.stored(codes, grid, None)
    rounded, step = by_token(x, bits, 0.9 if bits == 4 else 1.0)
    flat = (rounded * step) @ plain.matrix().T
    turned = made(source, bits=bits, activation_bits=bits, clip=0.9 if bits == 4 else 1.0)(x)
    exact = source(x)
    assert (turned - exact).norm() < 0.7 * (flat - exact).norm()


def test_planted_outlier_weights_are_spread_too() -> None:
    source = linear(96, 192)
    source.weight[:, 11] *= 30
    plain = Int4Linear.of(source, 64)
    assert (made(source, group_size=64).matrix() - source.weight).norm() < 0.7 * (plain.matrix() - source.weight).norm()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("activation_bits", [4, 8, 16])
@pytest.mark.parametrize("rows", [1, 100])
def test_it_computes_with_the_rotated_and_rounded_numbers(bits: int, activation_bits: int, rows: int) -> None:
    source, x = linear(64, 64, bias=True), torch.randn(2, rows, 64)
    one = made(source, bits=bits, activation_bits=activation_bits, clip=0.9)
    turned = ((x * one.signs).double() @ explicit(64)).float()
    top = 2 ** (activation_bits - 1) - 1
    step = turned.abs().amax(-1, keepdim=True) * 0.9 / top
    given = turned if activation_bits == 16 else (turned / step).round().clamp(-top, top) * step
    wanted = given @ one.inner.matrix().T + source.bias
    kernel = 2 * rows <= one.inner.kernel_rows
    off = (one(x) - wanted).abs()
    assert off.max() <= (2**-7 if kernel else 0.02) * wanted.abs().max()  # bfloat16 in the kernel; a code may turn at a tie
    assert kernel or off.mean() < 1e-4 * wanted.abs().max()


def test_bytes_follow_the_formula_and_maps_of_one_input_fuse() -> None:
    parts = [made(linear(n, 64, bias=True)) for n in (64, 128)]
    assert parts[0].nbytes() == 64 * 32 + 64 * 2 * 4 + 64 + 64 * 4 == sum(parts[0].ledger().values())
    assert parts[0].ledger() == {"codes": 64 * 32, "scales": 64 * 2 * 4 + 64, "padding": 0, "bias": 64 * 4}
    assert parts[0].bits == 4
    both = fuse(parts)
    assert both is not None
    x = torch.randn(3, 64)
    assert torch.equal(both.whole(x), torch.cat([p(x) for p in parts], -1))
    assert torch.equal(both.whole.matrix(), torch.cat([p.matrix() for p in parts]))
    assert both.whole.nbytes() == sum(p.nbytes() for p in parts) - 64  # one vector of signs
    for other in ({"seed": 1}, {"activation_bits": 8}, {"clip": 1.0}, {"bits": 8}):
        assert fuse([parts[0], made(linear(64, 64, bias=True), **other)]) is None


def test_the_seed_turns_otherwise_and_the_same_seed_alike() -> None:
    source, x = linear(64, 64), torch.randn(3, 64)
    assert torch.equal(made(source, seed=4)(x), made(source, seed=4)(x))
    assert not torch.equal(made(source, seed=4)(x), made(source, seed=5)(x))


def test_the_head_is_plain_int8_or_rotated_with_its_tied_embedding() -> None:
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True))
    with attached(session, QuaRot()):
        assert isinstance(session.model.lm_head, Int8Linear)
        assert all(isinstance(m.inner, PackedLinear) for m in session.model.modules() if isinstance(m, RotatedInput))
        plain = weight_bytes(session)
    with attached(session, RoundToNearest(bits=4)):
        assert plain == weight_bytes(session) + 2 * (6 * 64 + 128)  # the signs
    with attached(session, QuaRot(head="same")):
        head, ids = session.model.lm_head, torch.tensor([[3, 9]])
        assert isinstance(head, RotatedInput)
        assert torch.allclose(session.model.get_input_embeddings()(ids), head.matrix()[ids], atol=1e-6)


def test_close_to_the_baseline_also_under_lean_decode() -> None:
    session = make_session()
    ids, following = prompt(40), prompt(8, seed=5)
    before, policy = forced(session, ids, following), QuaRot(bits=8, activation_bits=8, clip=1.0)
    with attached(session, policy):
        inside, told = forced(session, ids, following), tokens(generate(session, [ids]))
    with attached(session, policy, LeanDecode()):
        lean = tokens(generate(session, [ids]))
    assert 0 < (inside.exp() - before.exp()).abs().max() < 0.1
    assert lean == told
    assert torch.equal(forced(session, ids, following), before)


def test_a_group_that_does_not_fit_is_refused_in_one_sentence() -> None:
    with pytest.raises(SpecError, match="group_size = 64 does not divide the width 96 of a"):
        made(linear(8, 96), group_size=64)
