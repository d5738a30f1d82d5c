"""SmoothQuant against equation 4 by hand, exact preservation without rounding, and dynamic int8 with planted outliers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny
from tests.methods.driving import attached, forced, make_session, prompt
from workers.mechanisms.calibration import Seen, gathered
from workers.mechanisms.fusing import fuse
from workers.mechanisms.int8_activations import DynamicInt8Linear, quantise
from workers.mechanisms.linear import DenseLinear, Replacement, matrix_of
from workers.mechanisms.scaled_input import ScaledInput
from workers.mechanisms.token_rounding import Int8Product, by_token, int_product, row_codes
from workers.mechanisms.weight_places import places
from workers.mechanisms.weight_policy import Spot, weight_bytes, weight_metrics
from workers.policies.quantize.dynamic_int8 import DynamicInt8
from workers.policies.quantize.smoothquant import Smoothing, SmoothQuant, smoothing


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    torch.manual_seed(0)


def linear(rows: int, width: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(width, rows, bias=bias).requires_grad_(False)


def test_the_papers_example_by_hand() -> None:
    """Figure 5 of the paper: X = [[1, -16, 2, 6], [-2, 8, -1, -9]], alpha = 0.5."""
    x = torch.tensor([[1.0, -16, 2, 6], [-2, 8, -1, -9]])
    w = torch.tensor([[2.0, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]]).T  # [N, K]
    s = smoothing(x.abs().amax(0), w.abs().amax(0), 0.5)
    assert torch.allclose(s, torch.tensor([1.0, 4, 1, 3]))
    assert torch.allclose(x / s, torch.tensor([[1.0, -4, 2, 2], [-2, 2, -1, -3]]))
    assert torch.allclose(w * s, torch.tensor([[2.0, 1, -2], [4, -4, -4], [2, -1, -2], [-3, -3, 3]]).T)


def test_alpha_at_its_ends_and_channels_that_say_nothing() -> None:
    inputs, weight = torch.tensor([4.0, 9.0, 0.0, 5.0]), torch.tensor([2.0, 0.5, 3.0, 0.0])
    assert smoothing(inputs, weight, 1.0).tolist() == [4, 9, 1, 1]  # all of it goes to the weights
    assert smoothing(inputs, weight, 0.0).tolist() == [0.5, 2, 1, 1]
    even = smoothing(inputs, weight, 0.5)
    assert torch.allclose((inputs / even)[:2], (weight * even)[:2])  # both sides have the same largest value


def test_without_rounding_the_function_is_exactly_preserved() -> None:
    weight, x = torch.randn(48, 64, dtype=torch.float64), torch.randn(9, 64, dtype=torch.float64) * 30 * torch.rand(64)
    s = smoothing(x.abs().amax(0), weight.abs().amax(0), 0.5)
    smooth = ScaledInput(DenseLinear(weight * s, None), 1 / s)
    assert torch.allclose(smooth(x), x @ weight.T, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5), (4, 64, 64), (17, 33, 50), (40, 8, 2000)])
def test_the_integer_product_is_exact(m: int, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    x[0], w[0] = 127, -127  # the largest sum there is
    exact = x.long() @ w.long().T
    assert torch.equal(int_product(x, w).long(), exact)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert torch.equal(int_product(x, w).long(), exact)


def test_rounding_by_token_by_hand() -> None:
    codes, step = by_token(torch.tensor([[127.0, -63.5, 0.6], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 1], [0, 0, 0]]
    assert float(step[0]) == 1
    codes, step = by_token(torch.tensor([[10.0, -10.0, 4.4]]), bits=4, clip=0.7)
    assert codes.tolist() == [[7, -7, 4]]
    assert float(step) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_symmetric_product_against_plain_integers(dtype: torch.dtype, bias: bool) -> None:
    source, x = linear(48, 64, bias), torch.randn(2, 5, 64).to(dtype)
    product = Int8Product(*row_codes(source.weight), source.bias)
    scales = source.weight.abs().amax(1) / 127
    codes = (source.weight / scales[:, None]).round().long()
    step = x.float().abs().amax(-1, keepdim=True) / 127
    wanted = ((x.float() / step).round().long() @ codes.T).double() * step * scales + (source.bias if bias else 0)
    assert product(x).dtype == dtype
    assert torch.allclose(product(x).double(), wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
    assert product.ledger() == {"codes": 48 * 64, "scales": 48 * 4, "padding": 0, "bias": bias * 48 * 4}
    assert product.nbytes() == sum(product.ledger().values())
    assert torch.equal(product.lookup(torch.float32)(torch.tensor([5, 1])), product.matrix()[[5, 1]])
    both = fuse([product, Int8Product(*row_codes(linear(20, 64, bias).weight), source.bias[:20] if bias else None)])
    assert both is not None
    assert torch.equal(both.whole(x)[..., :48], product(x))


@pytest.mark.parametrize("packed", [True, False])
def test_with_planted_outlier_channels_the_error_is_less_than_dynamic_int8s(packed: bool) -> None:
    source, x = linear(96, 128), torch.randn(64, 128)
    x[:, [7, 50]] *= 60
    seen = Seen(64, x.abs().mean(0), x.abs().amax(0), None, None, "a")
    s = smoothing(seen.max_abs, source.weight.abs().amax(0), 0.5)
    mine = SmoothQuant().replacement(source, Spot("a", seen=seen, plan=Smoothing({"a": s}, packed)))
    assert mine is not None
    assert isinstance(mine.inner, DynamicInt8Linear if packed else Int8Product)

    def error(module: Replacement) -> float:
        return float((module(x) - source(x)).norm() / source(x).norm())

    plain = (DynamicInt8Linear(quantise(source.weight), None, True), Int8Product(*row_codes(source.weight), None))
    assert error(mine) < 0.6 * min(error(p) for p in plain)
    assert torch.allclose(mine.matrix(), source.weight, atol=0.02)


def test_maps_of_one_input_share_their_scales_which_come_from_all_of_them() -> None:
    session = make_session()
    names = list(places(session).linears)
    plan = SmoothQuant(samples=2).plan(session, names)
    seen = {n: s for _, group in gathered(session, names, frozenset(), 2) for n, s in group.items()}
    layer = "model.layers.1.self_attn."
    q, k, v = (plan.factors[f"{layer}{n}_proj"] for n in "qkv")
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    largest = torch.cat([matrix_of(session.model.get_submodule(f"{layer}{n}_proj")) for n in "qkv"]).abs().amax(0)
    assert torch.allclose(q, (seen[f"{layer}q_proj"].max_abs / largest).sqrt())
    assert not torch.equal(q, plan.factors["model.layers.0.self_attn.q_proj"])
    with attached(session, SmoothQuant(samples=2)):
        made = [session.model.get_submodule(f"{layer}{n}_proj") for n in "qkv"]
        assert fuse(made) is not None
        assert weight_metrics(session)["replaced_modules"] == 15


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_follow_the_formula_and_a_tied_embedding_reads_the_heads_table(head: bool, tied: bool) -> None:
    shapes = 2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    inside = sum(n * (k + 12) + 4 * k for n, k in shapes) + 4 * (5 * 64 + 2 * 8)
    table, (n, k) = 4 * tiny.VOCAB * 64, (tiny.VOCAB, 64)
    stored = n * (k + (4 if tied else 12)) + 4 * k if head else table
    session = make_session(tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder())
    with attached(session, SmoothQuant(head=head, samples=2)):
        assert weight_bytes(session) == inside + stored + (0 if tied else table)
        if head and tied:
            ids = torch.tensor([[3, 9]])
            assert torch.equal(session.model.get_input_embeddings()(ids), session.model.lm_head.matrix()[ids])


def test_a_map_that_calibration_never_reached_is_rounded_without_scales() -> None:
    source, x = linear(48, 64), torch.randn(3, 64)
    mine = SmoothQuant().replacement(source, Spot("expert", plan=Smoothing({}, True)))
    assert mine is not None
    assert torch.equal(mine(x), DynamicInt8Linear(quantise(source.weight), None, True)(x))


def test_closer_to_a_model_with_outlier_channels_than_dynamic_int8() -> None:
    """The norms' gains of a few channels are raised; the maps behind them take that back, so the model stays what it was."""
    session = make_session()
    session.model = copy.deepcopy(session.model)
    for layer in session.model.model.layers:
        for norm, maps in (
            (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
            (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
        ):
            norm.weight.data[:3] *= 100
            for one in maps:
                one.weight.data[:, :3] /= 100
    ids, following = prompt(40), prompt(24, seed=5)
    before = forced(session, ids, following)

    def moved(policy: DynamicInt8 | SmoothQuant) -> float:
        with attached(session, policy):
            after = forced(session, ids, following)
        return float(F.kl_div(after, before, log_target=True, reduction="batchmean"))

    assert 0 < moved(SmoothQuant(samples=2)) < 0.2 * moved(DynamicInt8())
    assert torch.equal(forced(session, ids, following), before)
