"""Layers of packed weights in one native call against the same layers call by call, and against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.pipeline import parse_pipeline
from tests import tiny
from tests.methods.driving import attached, forced, generate, make_session, prefill, prompt, tokens
from workers.mechanisms import lean_rows, native
from workers.mechanisms.attention import Forward, attend
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.lean import LeanLayer, LeanModel, rotate
from workers.mechanisms.lean_rows import HeadRows, LeanRows
from workers.mechanisms.linear import Lookup
from workers.mechanisms.operator_times import kind_of
from workers.mechanisms.packed_rows import ROWS
from workers.methods import effective
from workers.session import Session

pytestmark = pytest.mark.skipif(native.kernels().library is None, reason=native.kernels().told)
PACKED = ["rtn:bits=4", "rtn:bits=8", "mixed-bits"]
PIPELINES = [*PACKED, *(f"{p}+quantized-activations" for p in PACKED)]  # inputs of 16 bits, and of 8
CLOSE = 2e-4  # of the largest: sums of another order make an input of 16 bits one code more or less here and there


@contextmanager
def lean_model(pipeline: str, folder: Path | None = None) -> Iterator[tuple[Session, LeanModel]]:
    """A lean model on the session with these policies."""
    session = make_session(folder)
    with attached(session, *effective(parse_pipeline(pipeline))):
        yield session, LeanModel(session)


def forward_of(batch: int, new: int, heads: int, width: int, seen: int = 6, reserved: int = 0) -> Forward:
    """A decode step of ``new`` tokens behind a cache of ``seen - new`` of them, with room for ``reserved`` more."""
    cache = StudioCache(2)  # of at least as many layers as the model
    g = torch.Generator().manual_seed(3)
    for layer in cache.layers:
        old = (torch.randn(batch, heads, seen - new, width, generator=g) for _ in range(2))
        layer.append(*old, None, seen - new)  # type: ignore[arg-type]
    cache.reserve(reserved)
    positions = torch.arange(seen - new, seen).expand(batch, -1)
    return Forward(cache, "decode", positions, seen=seen)


def states(batch: int, new: int, width: int) -> Tensor:
    return torch.randn(batch, new, width, generator=torch.Generator().manual_seed(4))


def run(model: LeanModel, hidden: Tensor, layers: list[Any], **more: int) -> Tensor:
    return cached(model, hidden, layers, **more)[0]


def cached(model: LeanModel, hidden: Tensor, layers: list[Any], **more: int) -> tuple[Tensor, StudioCache]:
    """What comes out of some layers, and the cache that they leave."""
    first = layers[0].layers[0] if isinstance(layers[0], LeanRows) else layers[0]
    forward = forward_of(hidden.shape[0], hidden.shape[1], first.kv_heads, first.width, **more)
    rotary = model.rotary.at(forward.positions, forward.seen)
    for layer in layers:
        hidden = layer(hidden, rotary, forward)
    return hidden, forward.cache


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every call of all layers at once, with or without what stands before and behind them."""
    called: list[int] = []

    def counted(known: Callable[..., None], *arguments: Any) -> None:
        called.append(1)
        known(*arguments)

    for name in ("call_through", "call_step"):
        monkeypatch.setattr(lean_rows, name, partial(counted, getattr(lean_rows, name)))
    return called


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("seen", [1 + 1, 16, 17, 18, 333])  # about a vector of scores, and many
def test_all_layers_at_once_are_the_layers_call_by_call(pipeline: str, batch: int, seen: int, whole_steps: list[int]) -> None:
    with lean_model(pipeline) as (_, model):
        (rows,) = model.layers
        hidden = states(batch, 1, 64)
        whole, cache = cached(model, hidden, [rows], seen=seen, reserved=3)
        assert len(whole_steps) == 1
        called, expected = cached(model, hidden, rows.layers, seen=seen, reserved=3)  # type: ignore[attr-defined]
        assert len(whole_steps) == 1
        assert (whole - called).abs().max() < CLOSE * called.abs().max()
        for mine, theirs in zip(cache.layers, expected.layers, strict=True):
            assert mine.seen == theirs.seen == seen
            assert mine.held().keys.shape == theirs.held().keys.shape
            assert (mine.held().keys - theirs.held().keys).abs().max() < CLOSE * theirs.held().keys.abs().max()
            assert (mine.held().values - theirs.held().values).abs().max() < CLOSE * theirs.held().values.abs().max()


@pytest.mark.parametrize(
    ("queries", "heads", "width", "layers"),
    [(6, 2, 32, 2), (6, 1, 16, 2), (3, 3, 64, 2), (5, 1, 96, 1), (4, 2, 128, 1)],  # one to six queries share keys, five widths
)
@pytest.mark.parametrize("seen", [2, 100, 777])  # a part without entries, one part a thread, many
def test_every_number_of_queries_and_width_of_heads(
    queries: int, heads: int, width: int, layers: int, seen: int, whole_steps: list[int]
) -> None:
    hidden_width = 16 * queries
    shape = {
        "hidden_size": hidden_width,
        "num_attention_heads": queries,
        "num_key_value_heads": heads,
        "head_dim": width,
        "num_hidden_layers": layers,
    }
    with lean_model("rtn:bits=8", tiny.llama_folder(f"heads-{queries}-{heads}-{width}", **shape)) as (_, model):
        (rows,) = model.layers
        hidden = states(2, 1, hidden_width)
        whole, called = (run(model, hidden, some, seen=seen, reserved=1) for some in ([rows], rows.layers))  # type: ignore[attr-defined]
        assert len(whole_steps) == 1
        assert (whole - called).abs().max() < CLOSE * called.abs().max()


def test_room_that_moved_is_found_again(whole_steps: list[int]) -> None:
    with lean_model("rtn:bits=8") as (_, model):
        (rows,) = model.layers
        outs = {}
        for kind, layers in (("whole", [rows]), ("called", rows.layers)):  # type: ignore[attr-defined]
            forward = forward_of(1, 1, 2, 16, seen=6, reserved=2)
            outs[kind] = []
            for seen in range(6, 12):
                if seen == 9:
                    forward.cache.reserve(8)  # other buffers; until then two steps fit and the third does not
                if seen == 11:
                    forward.cache.crop_newest(2)
                forward.positions, forward.seen = torch.tensor([[seen - 1]]), seen
                hidden = states(1, 1, 64)
                for layer in layers:
                    hidden = layer(hidden, model.rotary.at(forward.positions, seen), forward)
                outs[kind].append(hidden)
        assert len(whole_steps) == 2 + 3
        for mine, theirs in zip(outs["whole"], outs["called"], strict=True):
            assert (mine - theirs).abs().max() < CLOSE * theirs.abs().max()


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("is_tied", [False, True])  # embeddings are plain floats, or codes of the head
def test_a_step_in_one_call_is_its_parts(pipeline: str, batch: int, is_tied: bool, whole_steps: list[int]) -> None:
    """Token ids in, logits out, over three steps: bit by bit those of embedding, layers, norm and head one after the other."""
    folder = tiny.llama_folder("tied", tie_word_embeddings=True) if is_tied else None
    with lean_model(pipeline, folder) as (_, model):
        assert model.whole is not None
        assert isinstance(model.embed, Lookup if is_tied else torch.nn.Embedding)
        found: dict[str, list[Tensor]] = {"whole": [], "parts": []}
        for kind, logits in found.items():
            forward = forward_of(batch, 1, 2, 16, seen=6, reserved=3)
            for seen in (6, 7, 8):
                forward.positions, forward.seen = torch.full((batch, 1), seen - 1), seen
                ids = (torch.arange(batch) * 7 + seen)[:, None]
                if kind == "whole":
                    logits.append(model.step(ids, forward))
                else:
                    (rows,), head = model.layers, model.native_head
                    out: Any = rows(model.embed(ids), model.rotary.at(forward.positions, seen), forward)
                    logits.append(head(out))  # type: ignore[arg-type, misc]
        assert len(whole_steps) == 3 + 3
        assert all(torch.equal(a, b) for a, b in zip(found["whole"], found["parts"], strict=True))


def test_ids_and_positions_out_of_range_are_told() -> None:
    with lean_model("rtn:bits=8") as (_, model):
        forward = forward_of(1, 1, 2, 16, reserved=2)
        for wrong in (-1, tiny.VOCAB):
            with pytest.raises(IndexError, match="vocabulary"):
                model.step(torch.tensor([[wrong]]), forward)
        for wrong in (-1, 1 << 20):
            forward.positions = torch.tensor([[wrong]])
            with pytest.raises(IndexError, match="positions"):
                model.step(torch.tensor([[1]]), forward)
        assert forward.cache.layers[0].stored == 5  # nothing was written


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize(("batch", "new"), [(1, 1), (5, 1), (2, 3)])
def test_native_rows_are_the_layers_call_by_call(pipeline: str, batch: int, new: int) -> None:
    with lean_model(pipeline) as (_, model):
        (rows,) = model.layers
        assert isinstance(rows, LeanRows)
        hidden = states(batch, new, 64)
        native_ones, called = run(model, hidden, [rows]), run(model, hidden, rows.layers)
        assert (native_ones - called).abs().max() < CLOSE * called.abs().max()
        assert model.native_head is not None
        logits = model.native_head(hidden)
        assert logits is not None
        by_calls = model.head(model.norm(hidden))
        assert (logits - by_calls).abs().max() < CLOSE * by_calls.abs().max()


def test_one_layer_in_float64() -> None:
    """Norm, product, turn, attention, product, sum, norm, product, SiLU, product, sum: written out."""
    with lean_model("rtn:bits=4+quantized-activations") as (_, model):
        (rows,) = model.layers
        layer: LeanLayer = rows.layers[0]  # type: ignore[attr-defined]
        hidden = states(1, 1, 64)
        forward = forward_of(1, 1, layer.kv_heads, layer.width)
        rotary = model.rotary.at(forward.positions, forward.seen)

        def norm(x: Tensor, by: Any) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + by.eps).rsqrt() * by.weight.double()

        def product(x: Tensor, module: Any) -> Tensor:
            return module.transform(x.float()).double() @ module.matrix().double().T

        qkv, out, gate_up, down = layer.maps
        heads = product(norm(hidden.double(), layer.norm_in), qkv).view(1, 1, -1, layer.width)
        turned, value = heads.split((layer.query_heads + layer.kv_heads, layer.kv_heads), 2)
        cos, sin = (x.double() for x in rotary)
        query, key = rotate(turned, (cos, sin)).split((layer.query_heads, layer.kv_heads), 2)
        mixed = attend(forward, 0, *(x.float().transpose(1, 2) for x in (query, key, value)), layer.scaling).double()
        x = hidden.double() + product(mixed.flatten(2), out)
        gate, up = product(norm(x, layer.norm_mlp), gate_up).chunk(2, -1)
        x = x + product(gate / (1 + (-gate).exp()) * up, down)

        alone = LeanRows(rows.layers[:1], rows.shapes[:1])  # type: ignore[attr-defined]
        assert (run(model, hidden, [alone]) - x).abs().max() < CLOSE * x.abs().max()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_rows_are_by_themselves_and_threads_change_nothing(pipeline: str) -> None:
    with lean_model(pipeline) as (_, model):
        (rows,) = model.layers
        heads = model.native_head
        assert isinstance(heads, HeadRows)
        hidden = states(7, 1, 64)
        before, found = torch.get_num_threads(), []
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                found.append((_without_cache(model, rows, hidden), heads(hidden), run(model, hidden, [rows], reserved=1)))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]
        assert torch.equal(found[0][2], found[1][2])
        single = [_without_cache(model, rows, row[None]) for row in hidden]
        assert torch.equal(found[0][0], torch.cat(single))


def _without_cache(model: LeanModel, rows: Any, hidden: Tensor) -> Tensor:
    """Every row is the first token of a text of its own."""
    forward = Forward(StudioCache(2), "decode", torch.zeros(len(hidden), 1, dtype=torch.long), seen=1)
    return rows(hidden, model.rotary.at(forward.positions, 1), forward)  # type: ignore[no-any-return]


def test_wide_inputs_and_other_formats_go_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with lean_model("rtn:bits=8") as (_, model):
        (rows,) = model.layers
        called: list[int] = []
        known = lean_rows.call_between
        monkeypatch.setattr(lean_rows, "call_between", lambda *a: (called.append(1), known(*a))[1])
        run(model, states(1, 1, 64), [rows])
        assert len(called) == 3  # into the first layer, from it to the second, out of that
        called.clear()
        run(model, states(ROWS + 1, 1, 64), [rows])
        assert not called
        assert model.native_head is not None
        assert model.native_head(states(1, 1, 64).bfloat16()) is None


def test_a_layer_that_is_looked_into_splits_the_rows() -> None:
    with lean_model("rtn:bits=8") as (session, _):
        layer = session.model.get_submodule("model.layers.1.mlp.down_proj")
        handle = layer.register_forward_hook(lambda *_: None)
        try:
            one, other = LeanModel(session).layers
        finally:
            handle.remove()
        assert isinstance(one, LeanRows)
        assert isinstance(other, LeanLayer)


def test_plain_maps_are_none_of_its_kind() -> None:
    session = make_session()
    with attached(session, *effective(parse_pipeline("rtn:bits=3"))):  # planes of bits
        model = LeanModel(session)
    assert all(isinstance(x, LeanLayer) for x in model.layers)
    assert model.native_head is not None  # this policy keeps the head in 8 bits
    assert LeanModel(make_session()).native_head is None


@pytest.mark.parametrize(
    ("policy", "is_whole"),
    [
        ("lagkv:keep=1", True),  # neutral: a plain cache
        ("snapkv:keep=0.5", True),  # a cache with gaps
        ("adakv:keep=0.5", True),  # heads of different lengths
        ("streamingllm:keep=0.5", False),  # evicts at every step
        ("tova:keep=0.5", False),
        ("kivi", False),
        ("h2o:keep=0.5", False),
        ("quest:keep=0.5", False),
    ],
)
def test_cache_policies_act_as_they_do_without_it(
    policy: str, is_whole: bool, whole_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()
    stack = effective(parse_pipeline(f"rtn:bits=8+quantized-activations+{policy}+lean-decode"))
    found = {}
    for kind in ("native", "called"):
        if kind == "called":
            monkeypatch.setattr("workers.mechanisms.lean.shape_of", lambda layer: None)
        with attached(session, *stack):
            trace = generate(session, [prompt(60)])
            found[kind] = (tokens(trace), trace.counts["kv_bytes"])
    assert found["native"] == found["called"]
    assert bool(whole_steps) == is_whole


def test_a_profiler_sees_it_as_a_product() -> None:
    session = make_session()
    with attached(session, *effective(parse_pipeline("rtn:bits=8+quantized-activations+lean-decode"))):
        state = prefill(session, prompt(20))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            session.family.step(session, state, torch.tensor([[5]]))
    assert sum(e.name == lean_rows.NAME for e in seen.events()) == 4  # three between two layers' attentions, and the head
    assert kind_of(lean_rows.NAME) == kind_of("native::int4_linear")


def test_scoring_reads_the_same_logits() -> None:
    session = make_session()
    found = []
    for lean in ("", "+lean-decode"):
        with attached(session, *effective(parse_pipeline(f"rtn:bits=4+quantized-activations{lean}"))):
            found.append(forced(session, prompt(40), prompt(8, 1)))
    assert (found[0] - found[1]).abs().max() < 0.02 * found[0].abs().max()
