"""DFloat11: every bit comes back, outputs are the plain model's to the last bit, and the bytes are those that are held."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from studio_state.catalog import asset
from studio_state.errors import SpecError
from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prompt, tokens
from tests.sampling import first
from workers.mechanisms.dynamic_float import DynamicFloatLinear
from workers.mechanisms.linear import Lookup, Replacement
from workers.mechanisms.prefix_code import BLOCK, LANE
from workers.mechanisms.weight_policy import weight_bytes, weight_metrics
from workers.methods import catalogue
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.dfloat11 import DFloat11
from workers.policies.runtime.lean_decode import LeanDecode
from workers.session import Session

BIT_FIELDS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
ZOO = {"austen-target": 43, "austen-draft": 6, "austen-moe": 113, "fashion-vit": 36, "scene-vlm": 55}  # id -> matrices


def same_bits(a: Tensor, b: Tensor) -> bool:
    field = BIT_FIELDS[a.dtype]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(field), b.contiguous().view(field))


def coded_again(weight: Tensor) -> DynamicFloatLinear:
    new = DynamicFloatLinear.of(weight, None)
    assert same_bits(new.decoded(), weight)
    assert new.nbytes() == sum(new.parts().values()) == sum(new.ledger().values())
    return new


def session_in(dtype: torch.dtype, folder: Path | None = None, rounded: bool = True) -> Session:
    """A tiny model whose weights are bfloat16 numbers, held in this format."""
    session = make_session(folder)
    session.model = copy.deepcopy(session.model)
    if rounded:
        session.model.bfloat16()
    session.model, session.dtype = session.model.to(dtype), dtype
    return session


def test_all_bit_patterns_of_a_bfloat16_number_come_back() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    assert every.isnan().sum() == 2 * 127
    assert every.isinf().sum() == 2
    new = coded_again(every.view(256, 256))
    assert new.bits == 16  # all 256 exponents occur as often: nothing to gain


@pytest.mark.parametrize("pattern", [0x7F80, 0xFF80 - 2**16, 0x7FC1, 0x0001, 0x807F - 2**16, 0x8000 - 2**16, 0])
def test_a_matrix_of_one_odd_number(pattern: int) -> None:
    """Infinities, a NaN with a payload, subnormals, both zeros."""
    new = coded_again(torch.full((8, 80), pattern, dtype=torch.int16).view(torch.bfloat16))
    assert new.bits == 9


def test_float32_numbers_keep_their_lower_halves() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 72)
    weight[0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45])
    weight[1, 0] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)  # a signalling NaN: only its lower half tells
    new = coded_again(weight)
    assert new.rest is not None
    assert new.parts()["rest"] == 2 * weight.numel()
    short = coded_again(weight.bfloat16().float())
    assert short.rest is None
    assert short.number_format == torch.float32
    assert short.bits < new.bits - 15


def test_the_parts_by_hand() -> None:
    """96 x 64 weights: ones and a few halves."""
    weight = torch.ones(96, 64, dtype=torch.bfloat16)
    weight[:, 0] = 0.5
    new = DynamicFloatLinear.of(weight, torch.zeros(96, dtype=torch.bfloat16))
    assert new.coded_bits == 96 * 64  # one bit each
    assert new.parts() == {
        "mantissas": 96 * 64,
        "rest": 0,
        "words": 96 * 8,
        "lanes": 96,
        "blocks": 4,
        "lengths": 256,
        "bias": 192,
    }
    assert new.ledger() == {"codes": 96 * 64 + 96 * 8, "scales": 96 + 4 + 256, "padding": 0, "bias": 192}
    assert new.bits == 9
    uneven = DynamicFloatLinear.of(torch.ones(3, 30, dtype=torch.bfloat16), None)
    assert uneven.parts()["words"] == 16  # 64 and 26 bits, the second lane filled up to 64
    assert uneven.ledger()["padding"] == 16 - -(-90 // 8)


def test_rows_are_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    for shape in ((700, 72), (50, 100), (2000, 64), (9, 7)):
        for weight in (torch.randn(shape).bfloat16(), torch.randn(shape)):
            new, ids = DynamicFloatLinear.of(weight, None), torch.tensor([0, shape[0] - 1, 3, 3])
            with monkeypatch.context() as m:
                m.setattr(DynamicFloatLinear, "weight", None)  # the whole is not decoded for it
                assert same_bits(new.rows(ids), weight[ids])
    assert BLOCK * LANE < 700 * 72  # more than one block


def test_products_are_the_plain_ones_to_the_last_bit() -> None:
    torch.manual_seed(2)
    for dtype in (torch.bfloat16, torch.float32):
        source = nn.Linear(144, 96).to(dtype).requires_grad_(False)
        x = torch.randn(2, 5, 144).to(dtype)
        assert same_bits(DynamicFloatLinear.of(source.weight, source.bias)(x), source(x))
        turned: Any = Conv1D(96, 144).to(dtype).requires_grad_(False)
        turned.weight.normal_()
        new = DynamicFloatLinear.of(turned.weight.T, turned.bias)
        assert new.turned
        assert same_bits(new.decoded().T, turned.weight)
        assert same_bits(new(x), turned(x))
        assert new.lookup(dtype) is None


def test_fused_parts_are_coded_anew() -> None:
    torch.manual_seed(3)
    parts = [nn.Linear(64, n).bfloat16().requires_grad_(False) for n in (64, 32, 32)]
    whole = DynamicFloatLinear.fuse([DynamicFloatLinear.of(p.weight, p.bias) for p in parts])
    assert whole is not None
    assert whole.replaces == 3
    assert same_bits(whole.decoded(), torch.cat([p.weight for p in parts]))  # type: ignore[operator]
    other = DynamicFloatLinear.of(parts[0].weight.float(), parts[0].bias)
    assert DynamicFloatLinear.fuse([other, DynamicFloatLinear.of(parts[1].weight, parts[1].bias)]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_scores_and_tokens_are_the_models_own_bit_for_bit(dtype: torch.dtype, tied: bool) -> None:
    folder = tiny.llama_folder(name="llama-tied", tie_word_embeddings=True) if tied else tiny.llama_folder()
    session = session_in(dtype, folder)
    bare, plain = weight_bytes(session), tokens(generate(session, [prompt(20), prompt(33)]))
    before = forced(session, prompt(40), prompt(8, seed=5))
    with attached(session, DFloat11()):
        made = [m for m in session.model.modules() if isinstance(m, DynamicFloatLinear)]
        assert len(made) == 15
        assert all(m.rest is None for m in made)
        assert any(isinstance(m, Lookup) for m in session.model.modules()) == tied
        assert weight_bytes(session) < (0.8 if dtype == torch.bfloat16 else 0.52) * bare  # tables weigh much in so small maps
        assert torch.equal(forced(session, prompt(40), prompt(8, seed=5)), before)
        assert tokens(generate(session, [prompt(20), prompt(33)])) == plain
    assert weight_bytes(session) == bare


def test_a_float32_model_of_any_numbers_gives_its_own_scores_too() -> None:
    for folder in (tiny.llama_folder(), tiny.gpt2_folder(), tiny.moe_folder()):
        session = session_in(torch.float32, folder, rounded=False)
        with attached(session, Magnitude(sparsity=0.0)):
            before = forced(session, prompt(40), prompt(8, seed=5))
        bare = weight_bytes(session)
        with attached(session, DFloat11()):
            after = forced(session, prompt(40), prompt(8, seed=5))
            assert weight_bytes(session) < bare
        if folder == tiny.moe_folder():  # experts are called one by one then, where the library groups them
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after, before)


def test_the_head_may_stay() -> None:
    session = session_in(torch.bfloat16)
    with attached(session, DFloat11(head=False)):
        assert weight_metrics(session)["replaced_modules"] == 14
        assert isinstance(session.model.lm_head, nn.Linear)


def test_zeros_of_a_pruner_stay_and_take_few_bits() -> None:
    session = session_in(torch.bfloat16)
    with attached(session, DFloat11(head=False)):
        whole = weight_bytes(session)
    with attached(session, Magnitude(sparsity=0.5), DFloat11(head=False)):
        assert weight_metrics(session)["zero_weights"] == pytest.approx(0.5, abs=1e-3)
        assert weight_bytes(session) < whole
        assert all(m.number_format == torch.bfloat16 for m in session.model.modules() if isinstance(m, DynamicFloatLinear))


def test_lean_decode_decides_the_same_tokens() -> None:
    session = session_in(torch.float32)
    plain = tokens(generate(session, [prompt(20)]))
    with attached(session, DFloat11(), LeanDecode()):
        assert tokens(generate(session, [prompt(20)])) == plain
        assert any(isinstance(m, DynamicFloatLinear) and m.replaces == 3 for m in session.model.modules())


def test_maps_that_would_grow_stay() -> None:
    session = session_in(torch.bfloat16)
    for module in session.model.modules():
        if isinstance(module, nn.Linear):
            patterns = torch.randint(-(2**15), 2**15, module.weight.shape, generator=torch.Generator().manual_seed(0))
            module.weight.data = patterns.to(torch.int16).view(torch.bfloat16)
    with attached(session, DFloat11()):
        assert not any(isinstance(m, Replacement) for m in session.model.modules())
    assert session.acted == {}
    assert "coded no map" in DFloat11().why_idle(session)


def test_float16_is_refused_in_one_sentence() -> None:
    session = session_in(torch.float16, rounded=False)
    with pytest.raises(SpecError, match=r"this experiment is float16: set dtype to bfloat16"), attached(session, DFloat11()):
        pass
    (problem,) = pipeline_problems(parse_pipeline("dfloat11"), catalogue(), dtype="float16")
    assert "DFloat11 works on bfloat16, float32 models" in problem.message


@pytest.mark.parametrize("name", first(3, *ZOO))
def test_about_70_percent_on_trained_bfloat16_matrices(name: str) -> None:
    """Matrices of the studio's own models as their files hold them; convolutions and vectors aside."""
    held = plain = count = 0
    with safe_open(asset("zoo") / name / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            weight = file.get_tensor(key)
            if weight.dim() == 2 and min(weight.shape) >= 64:
                held, plain, count = held + coded_again(weight).nbytes(), plain + 2 * weight.numel(), count + 1
                assert weight.dtype == torch.bfloat16
    assert count == ZOO[name]
    assert 0.64 <= held / plain <= 0.72


def test_the_decoded_matrix_is_the_only_large_thing_that_a_call_leaves_behind() -> None:
    source = nn.Linear(64, 64).bfloat16().requires_grad_(False)
    new, x = DynamicFloatLinear.of(source.weight, None), torch.randn(1, 64).bfloat16()
    before = new.nbytes()
    assert same_bits(new(x), F.linear(x, source.weight))
    assert new.nbytes() == before
    assert {n for n, t in vars(new).items() if isinstance(t, Tensor)} == set()
