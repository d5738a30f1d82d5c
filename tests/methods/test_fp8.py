"""8-bit floats: every value of both formats by its bits, error bounds, bytes, and the product by one kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms.float8 import E4M3, E5M2, Float8Linear, scaled_product, to_float8
from workers.mechanisms.fusing import fuse
from workers.mechanisms.linear import Convolved
from workers.mechanisms.weight_policy import Spot, build, weight_bytes
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.fp8 import FP8

FORMS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}  # bits of exponent and mantissa, bias (Micikevicius et al. 2022, table 1)
both_forms = pytest.mark.parametrize("form", FORMS, ids=["e4m3", "e5m2"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def ours(source: nn.Linear, form: torch.dtype = E4M3, activations: bool = False) -> Float8Linear:
    return Float8Linear(*to_float8(source.weight, form), source.bias, activations)


def values_of(form: torch.dtype) -> dict[int, float]:
    """Byte -> value of every finite number of a format, from the paper's table 1."""
    exponent_bits, mantissa_bits, bias = FORMS[form]
    found = {}
    for byte in range(256):
        exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
        full = exponent == (1 << exponent_bits) - 1
        if full and (form == E5M2 or mantissa == (1 << mantissa_bits) - 1):
            continue  # e5m2: infinities and NaN; e4m3 has NaN alone
        share = mantissa / (1 << mantissa_bits)
        size = (1 + share) * 2.0 ** (exponent - bias) if exponent else share * 2.0 ** (1 - bias)
        found[byte] = -size if byte >> 7 else size
    return found


@both_forms
def test_every_finite_value_comes_back_bit_by_bit(form: torch.dtype) -> None:
    table = values_of(form)
    assert len(table) == {E4M3: 254, E5M2: 248}[form]
    row = torch.tensor([list(table.values())])
    codes, steps = to_float8(row, form)
    assert float(steps) == 1  # its largest value is the format's largest
    assert codes.view(torch.uint8)[0].tolist() == list(table)
    one = Float8Linear(codes, steps, None, False)
    assert torch.equal(one.matrix(), row)
    assert torch.equal(one.rows(torch.tensor([0])), row)


@both_forms
def test_normal_numbers_move_by_half_a_last_place_at_most(form: torch.dtype) -> None:
    weight = torch.randn(64, 96) * torch.logspace(-6, 6, 64)[:, None]
    codes, steps = to_float8(weight, form)
    moved = (codes.double() * steps.double()[:, None] - weight).abs()
    normal = weight.abs() / steps[:, None] >= torch.finfo(form).smallest_normal
    assert float(normal.float().mean()) > 0.9
    assert bool((moved <= 2.0 ** -(FORMS[form][1] + 1) * weight.abs() * (1 + 1e-6))[normal].all())
    smallest = torch.finfo(form).smallest_normal * 2.0 ** -FORMS[form][1]
    assert bool((moved <= smallest / 2 * steps.double()[:, None] * (1 + 1e-6))[~normal].all())


def test_rows_of_zeros_and_of_tiny_numbers() -> None:
    weight = torch.stack([torch.zeros(16), torch.full((16,), 1e-40), torch.full((16,), -3e38)])
    one = Float8Linear(*to_float8(weight, E4M3), None, False)
    assert torch.isfinite(one.matrix()).all()
    assert torch.equal(one.matrix()[0], weight[0])
    assert torch.allclose(one.matrix()[2], weight[2])


@both_forms
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_a_product_with_the_stored_weights(form: torch.dtype, rows: int, dtype: torch.dtype) -> None:
    module, x = ours(linear(50, 64), form), torch.randn(2, rows, 64).to(dtype)
    exact = x.double() @ module.matrix().double().T
    assert module(x).dtype == dtype
    assert (module(x) - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-7) * exact.abs().max()


def by_hand(x: Tensor, module: Float8Linear) -> Tensor:
    """Activations to e4m3 token by token, then a product in float64."""
    step = x.abs().amax(-1, keepdim=True) / 448
    return ((x / step).to(E4M3).double() * step) @ module.matrix().double().T


@both_forms
def test_rounded_activations_and_the_kernel_that_multiplies_them(form: torch.dtype) -> None:
    module, x = ours(linear(48, 64), form, activations=True), torch.randn(5, 64)
    exact = by_hand(x, module)
    assert torch.allclose(module(x).double(), exact, atol=1e-5)
    assert not module.has_product()  # no GPU holds it
    codes, steps = to_float8(x, E4M3)
    kernel = scaled_product(codes, steps, module.codes, module.scales, torch.float32)
    assert torch.allclose(kernel.double(), exact, atol=1e-5)
    assert not torch.allclose(ours(linear(48, 64), form)(x).double(), exact, atol=1e-3)


@both_forms
@pytest.mark.parametrize("bias", [False, True])
def test_fused_parts_give_the_same_numbers_and_bytes_follow_the_formula(form: torch.dtype, bias: bool) -> None:
    parts = [ours(linear(n, 64, bias), form) for n in (64, 20)]
    both = fuse(parts)
    assert both is not None
    x = torch.randn(3, 64)
    assert torch.allclose(both.whole(x), torch.cat([p(x) for p in parts], -1), atol=1e-6)
    assert torch.equal(both.whole.matrix(), torch.cat([p.matrix() for p in parts]))
    assert both.whole.ledger() == {"codes": 84 * 64, "scales": 84 * 4, "padding": 0, "bias": bias * 84 * 4}
    assert both.whole.nbytes() == sum(both.whole.ledger().values())
    assert fuse([parts[0], ours(linear(20, 64, bias), E5M2 if form == E4M3 else E4M3)]) is None
    assert fuse([parts[0], ours(linear(20, 64, bias), form, activations=True)]) is None


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_model(head: bool, tied: bool) -> None:
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder())
    shapes = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
    table = tiny.VOCAB * 64 * 4
    stored = (tiny.VOCAB * (64 + 4) if head else table) + (0 if tied else table)
    with attached(session, FP8(head=head)):
        assert weight_bytes(session) == 2 * sum(n * (k + 4) for n, k in shapes) + 4 * (5 * 64 + 2 * 8) + stored


def test_convolutions_keep_their_geometry_and_masks_their_zeros() -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).requires_grad_(False)
    packed = build(FP8(), conv, Spot("a"))
    assert isinstance(packed, Convolved)
    x = torch.randn(2, 3, 9, 9)
    wanted = nn.functional.conv2d(x, packed.inner.matrix().view_as(conv.weight), conv.bias, 2, 1)
    assert torch.equal(packed(x), wanted)
    pruned = build(Magnitude(sparsity=0.5), linear(32, 64), Spot("a"))
    assert pruned is not None
    after = build(FP8(), pruned, Spot("a"))
    assert after is not None
    assert after.zeros >= pruned.zeros == 1024  # a weight too small for the format may join them
    assert bool((after.matrix()[pruned.matrix() == 0] == 0).all())


def test_close_to_the_baseline_which_is_bit_equal_afterwards() -> None:
    session = make_session()
    ids, following = prompt(40), prompt(8, seed=5)
    before, moved = forced(session, ids, following), []
    for policy in (FP8(), FP8(activations="fp8"), FP8(format="e5m2")):
        with attached(session, policy):
            moved.append(float((forced(session, ids, following).exp() - before.exp()).abs().max()))
    assert all(0 < m < 0.1 for m in moved)
    assert moved[0] < moved[2]
    assert torch.equal(forced(session, ids, following), before)
