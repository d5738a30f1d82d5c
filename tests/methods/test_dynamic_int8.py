"""Dynamic int8 against PyTorch's own quantize_dynamic and against plain integer arithmetic."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from studio_state.errors import SpecError
from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms.weight_policy import weight_bytes
from workers.policies.quantize.dynamic_int8 import DynamicInt8, DynamicInt8Linear, quantise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def ours(source: nn.Linear, by_token: bool) -> DynamicInt8Linear:
    return DynamicInt8Linear(quantise(source.weight), source.bias, by_token)


def theirs(source: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        return quantize_dynamic(nn.Sequential(source), {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_by_tensor_it_is_what_pytorch_does(bias: bool, rows: int) -> None:
    source, x = linear(48, 64, bias), torch.randn(2, rows, 64)
    assert torch.equal(ours(source, by_token=False)(x), theirs(source)(x))


def by_hand(x: Tensor, module: DynamicInt8Linear) -> Tensor:
    """One token [K] at a time: 8-bit codes from its minimum and maximum (0 included), exact integer product."""
    codes, scales = module.codes().int_repr().long(), module.codes().q_per_channel_scales()
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    levels = 127 if module.reduce_range else 255
    step = (high - low) / levels
    zero = round(-low / step)
    q = (x.double() / step + zero).round().clamp(0, levels).long()
    return (codes @ (q - zero)).double() * scales * step


def test_by_token_against_integer_arithmetic() -> None:
    module, x = ours(linear(48, 64), by_token=True), torch.randn(1, 64)
    exact = by_hand(x[0], module)
    assert (module(x)[0] - exact).abs().max() < 0.01 * exact.abs().max()  # a code may round the other way at a tie


def test_by_token_an_outlier_does_not_coarsen_the_others() -> None:
    source, x = linear(48, 64, bias=True), torch.randn(8, 64)
    x[0] *= 1000
    exact = source(x)

    def error(by_token: bool) -> float:
        return float((ours(source, by_token)(x) - exact)[1:].norm() / exact[1:].norm())

    assert error(by_token=True) < 0.02 < 0.3 < error(by_token=False)
    silent = torch.zeros(3, 64)
    assert torch.allclose(ours(source, by_token=True)(silent), source(silent))


def test_no_weight_moves_more_than_half_a_step() -> None:
    weight = torch.randn(64, 96)
    q = quantise(weight)
    assert (
        (q.dequantize() - weight).abs() <= q.q_per_channel_scales()[:, None] / 2 * (1 + 1e-4)
    ).all()  # the largest lies at 127.5 steps
    assert torch.equal(DynamicInt8Linear(q, None, True).matrix(), q.dequantize())  # and packing keeps the codes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_fused_parts_give_the_same_numbers(bias: bool, by_token: bool) -> None:
    parts = [ours(linear(n, 64, bias), by_token) for n in (64, 20, 36)]
    whole = DynamicInt8Linear.fuse(parts)
    assert whole is not None
    for rows in (1, 5):
        x = torch.randn(rows, 64)
        assert torch.equal(whole(x), torch.cat([p(x) for p in parts], -1))


def test_bytes_follow_the_formula() -> None:
    assert ours(linear(48, 64), True).nbytes() == 48 * (64 + 12)
    assert ours(linear(48, 64, bias=True), True).nbytes() == 48 * (64 + 12) + 48 * 4


@pytest.mark.parametrize("head", [True, False])
def test_bytes_of_a_tied_model_keep_the_float_embedding(head: bool) -> None:
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True))
    inside = 2 * sum(n * (k + 12) for n, k in ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)))
    with attached(session, DynamicInt8(head=head)):
        assert weight_bytes(session) == inside + (5 * 64 + 2 * 8 + tiny.VOCAB * 64) * 4 + (tiny.VOCAB * (64 + 12) if head else 0)


def test_close_to_the_baseline_which_is_bit_equal_afterwards() -> None:
    session = make_session()
    before = forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, DynamicInt8()):
        inside = forced(session, prompt(40), prompt(8, seed=5))
    assert 0 < (inside.exp() - before.exp()).abs().max() < 0.1
    assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)


def test_other_number_formats_are_refused_in_one_sentence() -> None:
    session = make_session()
    session.dtype = torch.bfloat16
    with pytest.raises(SpecError, match="float32 models on a CPU; this experiment is bfloat16 on cpu"):
        DynamicInt8().prepare(session)


def test_the_engine_of_the_process_stays_as_it_was() -> None:
    before = torch.backends.quantized.engine
    ours(linear(16, 16), True)
    assert torch.backends.quantized.engine == before
