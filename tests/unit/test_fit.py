"""The memory estimate against exact tensor sums and against the allocator's own record."""

from __future__ import annotations

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache

from studio_state.errors import StudioError
from studio_state.experiment import ModelInfo
from tests import tiny
from workers.models.fit import LIMIT_VARIABLE, estimate, free_memory
from workers.models.info import model_info
from workers.models.resolve import resolve

FOLDERS = {
    "llama": tiny.llama_folder,
    "tied": lambda: tiny.llama_folder("llama-tied", tie_word_embeddings=True),
    "qwen3": tiny.qwen3_folder,
    "gemma3": tiny.gemma3_folder,
    "gpt2": tiny.gpt2_folder,
}


def info_of(name: str) -> ModelInfo:
    """What is known of a model before its weights load."""
    return model_info(resolve(name))


def load(name: str, dtype: torch.dtype, attention: str = "sdpa") -> torch.nn.Module:
    """The library's own loader, as the oracle."""
    return AutoModelForCausalLM.from_pretrained(resolve(name).path, dtype=dtype, attn_implementation=attention).eval()


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    """Bytes of tensors, shared storages once."""
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOLDERS)
def test_weights_are_exact(kind: str, dtype: torch.dtype) -> None:
    name = str(FOLDERS[kind]())
    assert estimate(info_of(name), tokens=8, dtype=dtype).weight_bytes == tensor_bytes(list(load(name, dtype).parameters()))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (3, 17)])
def test_kv_cache_is_exact(kind: str, batch: int, tokens: int) -> None:
    name = str(FOLDERS[kind]())
    cache = DynamicCache()
    with torch.no_grad():
        load(name, torch.float32)(torch.full((batch, tokens), 7), past_key_values=cache)
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    assert estimate(info_of(name), tokens=tokens, batch=batch).kv_bytes == sum(t.numel() * t.element_size() for t in kept)


def test_smollm2_is_exact() -> None:
    info = info_of("smollm2-135m")
    model = load("smollm2-135m", torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache)
    got = estimate(info, tokens=40)
    assert got.weight_bytes == tensor_bytes(list(model.parameters())) == 134_515_008 * 4
    assert (
        got.kv_bytes
        == sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
        == 30 * 2 * 3 * 64 * 40 * 4
    )


def test_sliding_window_layers_keep_at_most_their_window() -> None:
    mistral, gemma = info_of(str(tiny.mistral_folder())), info_of(str(tiny.gemma3_folder()))
    per_token = 2 * 2 * 16 * 4  # keys and values, 2 KV heads of width 16, float32
    assert estimate(mistral, tokens=10).kv_bytes == 2 * 10 * per_token
    assert estimate(mistral, tokens=500).kv_bytes == 2 * 16 * per_token
    assert estimate(gemma, tokens=500).kv_bytes == (500 + 16) * per_token // 2  # one full, one windowed layer, one KV head


def test_policies_scale_weights_and_cache() -> None:
    info = info_of(str(tiny.llama_folder()))
    full, small = estimate(info, tokens=100), estimate(info, tokens=100, weight_factor=0.25, kv_factor=0.5)
    assert (small.weight_bytes, small.kv_bytes) == (full.weight_bytes // 4, full.kv_bytes // 2)
    assert small.activation_bytes == full.activation_bytes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_activations_are_near_the_allocators_record(kind: str, attention: str) -> None:
    name, batch, tokens = str(FOLDERS[kind]()), 2, 192
    model, ids = load(name, torch.float32, attention), torch.full((batch, tokens), 7)
    with torch.no_grad():
        model(ids[:, :4], use_cache=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            model(ids, use_cache=False, logits_to_keep=1)
    peak = live = 0
    for event in sorted(
        (e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    assert 0.85 * peak <= estimate(info_of(name), tokens=tokens, batch=batch, attention=attention).activation_bytes <= 1.6 * peak


def test_chunks_need_less_than_the_whole_prompt() -> None:
    info = info_of(str(tiny.llama_folder()))
    assert estimate(info, tokens=1024, chunk=128).activation_bytes < estimate(info, tokens=1024).activation_bytes
    assert estimate(info, tokens=1024, chunk=128).kv_bytes == estimate(info, tokens=1024).kv_bytes


def test_fits_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    info = info_of(str(tiny.llama_folder()))
    total = estimate(info, tokens=64).total
    for limit, fits in ((total, True), (total - 1, False)):
        monkeypatch.setenv(LIMIT_VARIABLE, str(limit))
        got = estimate(info, tokens=64)
        assert (got.fits, got.free_bytes) == (fits, limit)


def test_free_memory_never_exceeds_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, str(1 << 60))
    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total


@pytest.mark.parametrize("value", ["2 GB", "-1", "1e9"])
def test_a_limit_that_is_no_number_is_one_sentence(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, value)
    with pytest.raises(StudioError, match=f"{LIMIT_VARIABLE} is '{value}'; give a whole number of bytes"):
        free_memory("cpu")
