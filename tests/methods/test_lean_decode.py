"""Lean decode against the library's own generate, and against the same lane without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from studio_state.errors import Unavailable
from tests import tiny
from tests.methods.driving import attached, forced, generate, info_of, make_session, prompt, tokens
from workers.families.batches import State, make_batch
from workers.mechanisms import attention, onednn
from workers.mechanisms.kv_store import FloatStore
from workers.mechanisms.lean import Norm, RotaryTable, rotate
from workers.mechanisms.weight_policy import weight_bytes
from workers.methods import Policy
from workers.policies.kv.kivi import Kivi
from workers.policies.kv.snapkv import SnapKV
from workers.policies.prune.magnitude import Magnitude
from workers.policies.quantize.dynamic_int8 import DynamicInt8
from workers.policies.quantize.rtn import RoundToNearest
from workers.policies.runtime.lean_decode import LeanDecode
from workers.policies.tokens.promptdistill import PromptDistill
from workers.session import Session

PROMPT, SHORT = prompt(40), prompt(23, seed=1)


def from_config(config: Any, **spec: Any) -> Session:
    """A session on a fresh model whose biases and norms are random too (they start as 0 and 1)."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for name, x in model.named_parameters():
            if "bias" in name or "norm" in name:
                x.normal_()
    model.set_attn_implementation(attention.NAME)
    return replace(make_session(**spec), model=model)


def llama(**spec: Any) -> Session:
    return make_session(tiny.llama_folder(), **spec)


def llama_with_biases(**spec: Any) -> Session:
    from transformers import LlamaConfig

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return from_config(
        LlamaConfig(**{**tiny.LLAMA_SHAPE, "attention_bias": True, "mlp_bias": True, "rope_parameters": rope}), **spec
    )


def qwen2(**spec: Any) -> Session:
    """Biases on queries, keys and values; the second layer slides over 16 positions."""
    from transformers import Qwen2Config

    shape = {k: v for k, v in tiny.LLAMA_SHAPE.items() if k != "head_dim"}
    return from_config(Qwen2Config(**shape, use_sliding_window=True, sliding_window=16, max_window_layers=1), **spec)


def qwen3(**spec: Any) -> Session:
    from transformers import Qwen3Config

    return from_config(Qwen3Config(**tiny.LLAMA_SHAPE), **spec)


def mistral(**spec: Any) -> Session:
    return make_session(tiny.mistral_folder(), **spec)


SHAPES = (llama, llama_with_biases, qwen2, qwen3, mistral)
Make = Callable[..., Session]


@pytest.mark.parametrize("make", SHAPES)
def test_same_tokens_as_the_librarys_generate(make: Make) -> None:
    session = make()
    model: Any = session.model
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ].tolist()
    with attached(session, LeanDecode()):
        trace = generate(session, [PROMPT], 24)
    assert tokens(trace) == [expected]
    assert session.acted == {"lean-decode": 23 * 2}  # decode steps x layers


@pytest.mark.parametrize("spec", [{}, {"chunk_size": 7}, {"attention": "eager"}])
@pytest.mark.parametrize("make", SHAPES)
def test_same_tokens_and_bytes_in_a_padded_batch(make: Make, spec: dict[str, Any]) -> None:
    session = make(**spec)
    base = generate(session, [PROMPT, SHORT])
    with attached(session, LeanDecode()):
        lean = generate(session, [PROMPT, SHORT])
    assert tokens(lean) == tokens(base)
    assert lean.counts == base.counts  # forward passes, tokens and bytes of the cache


@pytest.mark.parametrize("make", SHAPES)
def test_same_logits_when_scoring_in_chunks(make: Make) -> None:
    session, following = make(), prompt(40, seed=2)
    base = forced(session, PROMPT, following)
    with attached(session, LeanDecode()):
        lean = forced(session, PROMPT, following)
    assert session.acted
    torch.testing.assert_close(lean, base, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "policies",
    [
        (SnapKV(keep=0.5, window=8),),
        (Kivi(bits=4, residual=8),),
        (SnapKV(keep=0.5, window=8), Kivi(bits=4, residual=8)),
        (PromptDistill(keep=0.5),),
        (RoundToNearest(bits=8),),
        (RoundToNearest(bits=4),),
        (RoundToNearest(bits=4, head="same"), SnapKV(keep=0.5, window=8), Kivi(bits=4, residual=8)),
        (DynamicInt8(),),
        (Magnitude(sparsity=0.5),),
    ],
    ids=lambda policies: "+".join(p.card.id for p in policies),
)
@pytest.mark.parametrize("make", [llama, qwen2, qwen3])
def test_changes_nothing_of_any_stack(make: Make, policies: tuple[Policy, ...]) -> None:
    """Same tokens, same cache, and every policy does as much as without it; less padding between packed rows."""
    found, held = [], []
    for lane in (policies, (*policies, LeanDecode())):
        session = make()
        with attached(session, *lane):
            trace = generate(session, [PROMPT])
            found.append((tokens(trace), trace.counts, {p.card.id: session.acted.get(p.card.id) for p in policies}))
            held.append(weight_bytes(session))
    assert found[0] == found[1]
    blocks = [x for x in policies if isinstance(x, RoundToNearest) and x.bits == 4]  # rows in blocks of 64
    assert held[1] < held[0] if blocks else held[1] == held[0]
    assert session.acted["lean-decode"] == 15 * 2


def test_fused_weights_replace_their_parts_in_the_account() -> None:
    session = llama()
    before, originals = weight_bytes(session), {n: (x.data_ptr(), x.clone()) for n, x in session.model.named_parameters()}
    modules = dict(session.model.named_modules())
    with attached(session, LeanDecode()):
        assert weight_bytes(session) == before
        held = {x.data_ptr() for x in session.model.parameters()}
        fused = [n for n, (place, _) in originals.items() if place not in held]
        assert sorted({n.split(".")[-2] for n in fused}) == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
        assert len(fused) == 5 * 2
    assert dict(session.model.named_modules()) == modules
    assert all(x.data_ptr() == originals[n][0] and torch.equal(x, originals[n][1]) for n, x in session.model.named_parameters())


def test_fused_once_per_set_of_weights() -> None:
    session = llama()
    with attached(session, LeanDecode()):
        first = {x.data_ptr() for x in session.model.parameters()}
    with attached(session, LeanDecode()):
        assert {x.data_ptr() for x in session.model.parameters()} == first
    with attached(session, RoundToNearest(bits=8), LeanDecode()):
        assert not first & {x.data_ptr() for n, x in session.model.named_buffers()}


def test_fused_rows_are_the_parts_rows() -> None:
    session = llama()
    x, layer = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)), "model.layers.0.self_attn"
    parts = [session.model.get_submodule(f"{layer}.{n}_proj") for n in "qkv"]
    expected = [part(x) for part in parts]
    with attached(session, LeanDecode()):
        for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):  # stand-ins answer in any order, also twice
            for i in order:
                torch.testing.assert_close(session.model.get_submodule(f"{layer}.{'qkv'[i]}_proj")(x), expected[i])
        y = x + 1
        torch.testing.assert_close(session.model.get_submodule(f"{layer}.k_proj")(y), parts[1](y))


def test_parts_that_do_not_agree_are_called_one_by_one() -> None:
    session = qwen2()
    layer = session.model.get_submodule("model.layers.0.self_attn")
    layer.v_proj.bias = None
    base = generate(session, [PROMPT])
    with attached(session, LeanDecode()):
        assert layer.q_proj.weight.shape[0] == 64  # the original: nothing stands in for it
        assert tokens(generate(session, [PROMPT])) == tokens(base)
    assert session.acted["lean-decode"] == 15 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_equal_the_librarys(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    g = torch.Generator().manual_seed(0)
    nn.init.normal_(norm.weight, generator=g)
    x, positions = torch.randn(2, 3, 64, generator=g).to(dtype), torch.tensor([[4, 5, 6], [9, 10, 11]])
    torch.testing.assert_close(Norm(norm)(x), norm(x), rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
    heads, rotary = x.view(2, 3, 4, 16), llama().model.get_submodule("model.rotary_emb")
    cos, sin = rotary(heads, position_ids=positions)
    expected = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0]
    assert torch.equal(rotate(heads, RotaryTable(rotary, x).at(positions, seen=12)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (17,), ()])
def test_onednn_gives_the_product_of_the_exact_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*s, generator=g).to(dtype) for s in ((24, 40), (24,), (*shape, 40)))
    exact = (x.double() @ weight.double().T).to(dtype)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 8e-3, "atol": 8e-3}
    for b, expected in ((None, exact), (bias, (x.double() @ weight.double().T + bias.double()).to(dtype))):
        run = onednn.linear(weight, b)
        if onednn.takes(dtype):
            assert run is not None
            torch.testing.assert_close(run(x), expected, **rounding)
    assert onednn.linear(weight.T, None) is None  # not contiguous: nothing is copied behind anybody's back
    assert onednn.linear(weight.double(), None) is None


def test_decode_steps_run_without_the_librarys_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    session, calls = llama(), []
    original = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    with attached(session, LeanDecode()):
        generate(session, [PROMPT])
    assert len(calls) == 2  # the prefill of two layers


def test_room_is_reserved_before_the_first_step() -> None:
    session, places = llama(), []

    def look(cache: Any, forward: Any) -> None:
        store: FloatStore = cache.layers[0].group.store
        places.append(store.read()[0].data_ptr())

    with attached(session, LeanDecode()), session.hooked(session.after_step, look):
        generate(session, [PROMPT])
    assert len(places) == 15
    assert len(set(places)) == 1


def test_hooks_on_layers_act_as_without_it() -> None:
    session, seen = llama(), []

    def double(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        seen.append((sorted(kwargs), output.shape, kwargs["position_embeddings"][1].sum().item()))
        return output * 2

    results = []
    for policies in ((), (LeanDecode(),)):
        with ExitStack() as stack:
            stack.callback(session.model.get_submodule("model.layers.0").register_forward_hook(double, with_kwargs=True).remove)
            stack.enter_context(attached(session, *policies))
            results.append(tokens(generate(session, [PROMPT])))
    assert results[0] == results[1]
    half = len(seen) // 2
    assert half == 1 + 15
    assert [s[1] for s in seen[:half]] == [s[1] for s in seen[half:]]
    assert [s[2] for s in seen[:half]] == pytest.approx([s[2] for s in seen[half:]], abs=1e-4)
    assert session.acted["lean-decode"] == 15 * 2


def test_a_changed_layer_runs_as_it_stands() -> None:
    class Quieter(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0.5

    session = llama()
    quieter = Quieter(session.model.config)
    quieter.load_state_dict(session.model.get_submodule("model.layers.1.mlp").state_dict())
    plain = tokens(generate(session, [PROMPT]))
    with session.swapped({"model.layers.1.mlp": quieter}):
        base = tokens(generate(session, [PROMPT]))
        with attached(session, LeanDecode()):
            assert tokens(generate(session, [PROMPT])) == base
    assert base != plain
    assert session.acted["lean-decode"] == 15  # one of the two layers


def test_refuses_other_models_and_hooks_on_the_whole() -> None:
    session = make_session(tiny.gpt2_folder())
    with (
        pytest.raises(Unavailable, match="knows models of type llama, mistral, qwen2, qwen3; this one is a GPT2LMHeadModel"),
        attached(session, LeanDecode()),
    ):
        pass
    session = llama()
    with ExitStack() as stack:
        stack.callback(session.model.register_forward_pre_hook(lambda module, args: None).remove)
        with pytest.raises(Unavailable, match="the model as a whole"), attached(session, LeanDecode()):
            pass
    assert session.step_forward is None


def test_trait_of_the_card_is_found_in_the_config() -> None:
    assert "lean-shape" in info_of(tiny.llama_folder()).traits
    assert "lean-shape" not in info_of(tiny.gpt2_folder()).traits


def test_takes_back_and_writes_again() -> None:
    """Room that was taken back (speculative decoding) is written again by the next step."""
    session = llama()
    with attached(session, LeanDecode()), torch.inference_mode():
        state: State = session.family.prefill(session, make_batch([PROMPT], 0, session.device))
        state.cache.reserve(8)
        first = session.family.step(session, state, torch.tensor([[5, 6, 7]]))
        state.cache.crop_newest(2)
        state.next_position -= 2
        again = session.family.step(session, state, torch.tensor([[6, 7]]))
    torch.testing.assert_close(again, first[:, 1:], rtol=0, atol=2e-5)
