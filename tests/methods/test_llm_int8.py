"""LLM.int8() against section 3 of the paper in plain float64, and at both ends of its threshold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from workers.mechanisms.fusing import fuse
from workers.mechanisms.token_rounding import Int8Product, row_codes
from workers.mechanisms.weight_policy import weight_bytes
from workers.policies.quantize.llm_int8 import LLMInt8, OutlierInt8
from workers.policies.runtime.lean_decode import LeanDecode


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def ours(source: nn.Linear, threshold: float = 6.0) -> OutlierInt8:
    return OutlierInt8(*row_codes(source.weight), source.bias, threshold)


def with_outliers(rows: int = 16, width: int = 64) -> Tensor:
    x = torch.randn(rows, width)
    x[:, [3, 40]] *= 25
    return x


def section_3(x: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """[m, K] times [N, K] transposed, one token and one output at a time."""
    x, weight = x.double(), weight.double()
    scale_w = [float(row.abs().max()) / 127 for row in weight]
    code_w = [[round(float(v) / s) for v in row] for row, s in zip(weight, scale_w, strict=True)]
    outliers = {i for i in range(x.shape[1]) if any(abs(float(t[i])) > threshold for t in x)}
    regular = [i for i in range(x.shape[1]) if i not in outliers]
    out = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for a, token in enumerate(x):
        scale_x = max((abs(float(token[i])) for i in regular), default=0.0) / 127
        code_x = {i: round(float(token[i]) / scale_x) for i in regular if scale_x}
        for b, codes in enumerate(code_w):
            whole = sum(code_x[i] * codes[i] for i in code_x)
            out[a, b] = whole * scale_x * scale_w[b] + sum(float(token[i]) * codes[i] * scale_w[b] for i in outliers)
    return out


@pytest.mark.parametrize("threshold", [0.0, 1.0, 6.0, 1000.0])
def test_against_section_3(threshold: float) -> None:
    source, x = linear(20, 64), with_outliers()
    assert torch.allclose(ours(source, threshold)(x).double(), section_3(x, source.weight, threshold), rtol=1e-5, atol=1e-5)


def test_by_hand() -> None:
    one = OutlierInt8(torch.tensor([[127, 1, -127]], dtype=torch.int8), torch.tensor([1 / 127]), torch.tensor([10.0]), 6.0)
    y = one(torch.tensor([[7.0, 1.27, 0.0]]))
    assert float(y) == pytest.approx(7 * 1 + 1.27 / 127 + 10)


def test_without_outliers_it_is_plain_vector_wise_int8() -> None:
    source, x = linear(48, 64, bias=True), with_outliers()
    plain = Int8Product(*row_codes(source.weight), source.bias)
    assert torch.equal(ours(source, math.inf)(x), plain(x))
    assert torch.equal(ours(source)(x.clamp(-6, 6)), plain(x.clamp(-6, 6)))  # the threshold itself is no outlier


def test_with_threshold_zero_it_is_the_float_product_of_the_stored_weights() -> None:
    source, x = linear(48, 64, bias=True), with_outliers()
    one = ours(source, 0.0)
    assert torch.allclose(one(x), x @ one.matrix().T + source.bias, atol=1e-4)


def test_outliers_do_not_coarsen_the_other_features() -> None:
    source, x = linear(96, 128), with_outliers(64, 128)
    exact = source(x)

    def error(threshold: float) -> float:
        return float((ours(source, threshold)(x) - exact).norm() / exact.norm())

    assert error(6.0) < 0.5 * error(math.inf)


def test_one_tokens_outlier_makes_its_feature_one_for_all_tokens_of_the_call() -> None:
    source, x = linear(48, 64), torch.randn(4, 64).clamp(-3, 3)
    alone = ours(source)(x[1:])
    x[0, 5] = 100.0
    assert not torch.equal(ours(source)(x)[1:], alone)
    flat = x.clone()
    flat[:, 5] = 0
    rest = Int8Product(*row_codes(source.weight), None)(flat)
    assert torch.allclose(ours(source)(x), rest + x[:, 5:6] * ours(source).matrix()[:, 5], atol=1e-5)


def test_fused_parts_give_the_same_numbers_and_bytes_follow_the_formula() -> None:
    parts = [ours(linear(n, 64, bias=True)) for n in (64, 20, 36)]
    both = fuse(parts)
    assert both is not None
    x = with_outliers()
    assert torch.allclose(both.whole(x), torch.cat([p(x) for p in parts], -1), atol=1e-5)
    assert both.whole.nbytes() == 120 * (64 + 4 + 4) == sum(both.whole.ledger().values())
    assert both.whole.bits == 8
    assert fuse([ours(linear(8, 64), 6.0), ours(linear(8, 64), 5.0)]) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_reads_the_heads_table(tied: bool) -> None:
    folder = tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder()
    session, shapes = make_session(folder), ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
    inside, norms = 2 * sum(n * (k + 4) for n, k in shapes), 4 * (5 * 64 + 2 * 8)
    head = tiny.VOCAB * (64 + 4) + (0 if tied else tiny.VOCAB * 64 * 4)
    with attached(session, LLMInt8()):
        assert weight_bytes(session) == inside + norms + head


def test_close_to_the_baseline_also_under_lean_decode() -> None:
    session = make_session()
    ids, following = prompt(40), prompt(8, seed=5)
    before = forced(session, ids, following)
    with attached(session, LLMInt8()):
        inside, told = forced(session, ids, following), tokens(generate(session, [ids]))
    with attached(session, LLMInt8(), LeanDecode()):
        lean = tokens(generate(session, [ids]))
    assert 0 < (inside.exp() - before.exp()).abs().max() < 0.1
    assert lean == told
    assert torch.equal(forced(session, ids, following), before)
