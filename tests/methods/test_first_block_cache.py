"""First-block cache against the library's modules with hooks that overwrite what the last block gives, loops by hand, and its own hook."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from studio_state.errors import ModelError, StudioError, Unavailable
from studio_state.events import LaneFinished
from studio_state.experiment import ExperimentSpec
from studio_state.pipeline import parse_pipeline
from tests.methods.drawing import (
    LABEL,
    OWN,
    broken_off,
    condition,
    draw,
    drawing_session,
    opened,
    pipeline_folder,
    same_pictures,
    sizes_seen,
)
from tests.tiny_diffusion import stirred
from workers.bench.first_block_cache import bench
from workers.bench.plan import Plan
from workers.engine import run
from workers.families.base import RunTrace
from workers.families.class_pipeline import ClassConditionalPipeline
from workers.families.diffusion_model import DiffusionModel
from workers.mechanisms.denoising import Denoising
from workers.policies.denoise.first_block_cache import FirstBlockCache
from workers.session import Session

KINDS = ("dit", "pixart", "sd3", "flux")
STEPS = 8
ALWAYS = 10.0  # every change is below it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def parts_of(out: Any) -> tuple[Tensor | None, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


class Overwriting:
    """All blocks of a denoiser run; at reused steps what the last one gives is overwritten."""

    def __init__(self, net: Any, threshold: float):
        lists = [m for n, m in net.named_children() if n.endswith("blocks")]
        self.first, self.last = lists[0][0], lists[-1][-1]
        self.threshold, self.hits, self.step = threshold, 0, 0
        self.old: Tensor | None = None
        self.changes: list[float] = []

    def after_first(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        change = parts_of(out)[-1] - given
        self.reuse = False
        if self.old is not None:
            relative = float((change - self.old).abs().mean() / self.old.abs().mean())
            self.changes.append(relative)
            self.reuse = relative <= self.threshold
        if not self.reuse:
            self.old = change
        self.hits += self.reuse
        self.here = parts_of(out)

    def after_last(self, module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if not self.reuse:
            self.tail = [None if b is None or a is None else b - a for a, b in zip(self.here, parts_of(out), strict=True)]
            return None
        made = [None if r is None or a is None else a + r for a, r in zip(self.here, self.tail, strict=True)]
        return made[0] if len(made) == 1 else tuple(made)

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            self.first.register_forward_hook(self.after_first, with_kwargs=True),
            self.last.register_forward_hook(self.after_last, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def overwritten(session: Any, threshold: float) -> tuple[RunTrace, Overwriting]:
    watch = Overwriting(session.model.denoiser, threshold)
    with watch.watching():
        return draw(session), watch


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_hits_equal_blocks_that_are_overwritten(folder: Path, kind: str) -> None:
    session = drawing_session(kind, folder)
    _, looked = overwritten(session, -1.0)
    assert len(looked.changes) == STEPS - 1
    between = sorted(looked.changes)[len(looked.changes) // 2] * 1.001
    for threshold in (between, ALWAYS):
        expected, watch = overwritten(session, threshold)
        got = draw(session, FirstBlockCache(threshold=threshold))
        assert got.counts["cache_hits"] == watch.hits > 0
        assert same_pictures(got, expected)
    assert watch.hits == STEPS - 1


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_first_block_runs_at_a_reused_step(folder: Path, kind: str) -> None:
    session = drawing_session(kind, folder)
    names = session.family.parts(session.model)["layers"]
    ran = {name: 0 for name in names}
    handles = []
    for name in names:
        linear = next(m for n, m in session.model.get_submodule(name).named_modules() if n.endswith("to_q"))

        def count(*_: Any, name: str = name) -> None:
            ran[name] += 1

        handles.append(linear.register_forward_hook(count))
    trace = draw(session, FirstBlockCache(threshold=ALWAYS, warmup=2, max_hits=2))
    for handle in handles:
        handle.remove()
    reused = [False, False, True, True, False, True, True, False]
    assert [share > 0 for share in trace.results[0].data["reused"]] == reused
    a_step = ran[names[0]] / STEPS
    assert [n / a_step for n in ran.values()] == [STEPS, *[reused.count(False)] * (len(names) - 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_threshold_is_the_baseline(folder: Path, kind: str) -> None:
    session = drawing_session(kind, folder)
    plain = draw(session)
    assert same_pictures(plain, draw(session, FirstBlockCache(threshold=0.0)))
    before = condition(session)
    changed = draw(session, FirstBlockCache(threshold=ALWAYS))
    assert not same_pictures(plain, changed)
    assert condition(session) == before
    with pytest.raises(KeyboardInterrupt):
        broken_off(session, FirstBlockCache(threshold=ALWAYS))
    assert condition(session) == before
    assert same_pictures(changed, draw(session, FirstBlockCache(threshold=ALWAYS)))  # nothing was kept from the batch before


# -- by hand ---------------------------------------------------------------------------------
class Line(nn.Module):
    """factor * x; of (text, picture) both, where it is given both."""

    def __init__(self, factor: float, gives: Any = None):
        super().__init__()
        self.factor, self.gives = nn.Parameter(torch.tensor(factor)), gives

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        out = self.factor * hidden_states
        return out if self.gives is None else self.gives(out)


class Row(nn.Module):
    """A model whose denoiser is a row of lines."""

    def __init__(self, *lines: Line, name: str = "transformer_blocks"):
        super().__init__()
        self.denoiser = nn.Module()
        setattr(self.denoiser, name, nn.ModuleList(lines))

    def forward(self, x: Tensor) -> Any:
        for line in next(self.denoiser.children()):  # type: ignore[attr-defined]
            x = line(x)
        return x


def rowed(folder: Path, row: Row) -> Session:
    return replace(drawing_session("dit", folder), model=row, acted={}, counts={})


def stepped(session: Session, policy: FirstBlockCache, given: Sequence[float]) -> tuple[list[float], Denoising]:
    """What the row gives, a number a step."""
    state, out = Denoising(of=len(given)), []
    with torch.inference_mode(), session.having(denoising=state), policy.attach(session):
        for x in given:
            out.append(float(session.model(torch.full((1, 2, 3), x)).mean()))
            state.step += 1
    return out, state


def test_a_row_of_lines_worked_by_hand(folder: Path) -> None:
    """Blocks 2x, 3x, 5x: the first adds x, the others add 28x. 1.08 is near 1, 1.12 is not (though near 1.08), 1.2 is near 1.12."""
    session = rowed(folder, Row(Line(2.0), Line(3.0), Line(5.0)))
    out, state = stepped(session, FirstBlockCache(threshold=0.1), [1.0, 1.08, 1.12, 1.2])
    assert out == pytest.approx([30.0, 2.16 + 28, 30 * 1.12, 2.4 + 28 * 1.12])
    assert state.reused == pytest.approx([0, 2 / 3, 0, 2 / 3])
    assert session.counts == {"cache_hits": 2}
    assert session.acted == {"first-block-cache": 2}
    out, _ = stepped(session, FirstBlockCache(threshold=10, max_hits=1), [1.0, 2.0, 3.0, 4.0])
    assert out == pytest.approx([30, 4 + 28, 90, 8 + 84])
    out, _ = stepped(session, FirstBlockCache(threshold=10, warmup=3), [1.0, 2.0, 3.0, 4.0])
    assert out == pytest.approx([30, 60, 90, 8 + 84])


def test_denoisers_of_another_form_are_refused(folder: Path) -> None:
    def text_behind(picture: Tensor) -> Any:
        return picture, picture[:, :1]

    cases = {
        "has no row of transformer blocks": Row(Line(2.0), Line(3.0), name="layers"),
        "give their states in another order": Row(Line(2.0, text_behind), Line(3.0)),
        "the last gives other states than the first": Row(Line(2.0), Line(3.0, lambda x: torch.cat([x, x], 1))),
    }
    for words, row in cases.items():
        with pytest.raises(Unavailable, match=words):
            stepped(rowed(folder, row), FirstBlockCache(), [1.0, 1.0])


def by_class(kind: type[ClassConditionalPipeline] = ClassConditionalPipeline) -> Any:
    """The studio's pipeline over a transformer that works on pixels."""
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=3,
    )
    pipeline = kind(transformer=stirred(net).eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def session_on(folder: Path, pipeline: Any) -> Session:
    return replace(drawing_session("dit", folder), model=DiffusionModel(pipeline), acted={}, counts={})


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_pictures_equal_a_loop_that_adds_what_it_kept(folder: Path, guidance: float) -> None:
    """The denoiser walked through by hand: embedding, blocks, output; three pictures, steps of the flow written out."""
    session = session_on(folder, pipeline := by_class())
    net, seeds = pipeline.transformer, (5, 6, 7)
    trace = draw(session, FirstBlockCache(threshold=ALWAYS), seeds=seeds, guidance=guidance)
    x = torch.cat([torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(s)) for s in seeds])
    levels = [1 - (1 - 0.001) * i / (STEPS - 1) for i in range(STEPS)]
    labels = torch.tensor([3] * 3 + [LABEL] * 3 if guidance > 1 else [LABEL] * 3)
    rows, tail = len(labels), torch.zeros(())
    with torch.no_grad():
        for step, (level, after) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
            time = torch.full((rows,), 1000 * level)
            state = net.pos_embed(x.repeat(rows // 3, 1, 1, 1))
            first = state = net.transformer_blocks[0](state, timestep=time, class_labels=labels)
            if step == 0:
                for block in net.transformer_blocks[1:]:
                    state = block(state, timestep=time, class_labels=labels)
                tail = state - first
            told = net.transformer_blocks[0].norm1.emb(time, labels, hidden_dtype=torch.float32)
            shift, scale = net.proj_out_1(torch.nn.functional.silu(told)).chunk(2, 1)
            out = net.proj_out_2(net.norm_out(first + tail) * (1 + scale[:, None]) + shift[:, None])  # [rows, 16, 4]
            flow = out.reshape(rows, 4, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(rows, 1, 8, 8)
            if guidance > 1:
                without, with_class = flow.chunk(2)
                flow = without + guidance * (with_class - without)
            x = x + (after - level) * flow
    torch.testing.assert_close(torch.stack(trace.drawn), (x / 2 + 0.5).clamp(0, 1), atol=2e-5, rtol=0)
    assert trace.counts["cache_hits"] == STEPS - 1
    assert trace.counts["denoiser_calls"] == STEPS


class Apart(ClassConditionalPipeline):
    """Calls its denoiser twice a step, as some pipelines of the library do: for what is asked, then for nothing."""

    def __call__(self, class_labels: Any, guidance_scale: float = 1.0, num_inference_steps: int = 20, **more: Any) -> Any:
        plain = self.denoiser

        def apart(taken: Tensor, timestep: Tensor, class_labels: Tensor, **more: Any) -> Any:
            halves = [
                plain(*x, return_dict=False)[0]
                for x in zip(taken.chunk(2), timestep.chunk(2), class_labels.chunk(2), strict=True)
            ]
            return (torch.cat(halves),)

        apart.config, apart.dtype = plain.config, plain.dtype  # type: ignore[attr-defined]
        with given(type(self), "denoiser", property(lambda self: apart)):
            return super().__call__(class_labels, guidance_scale, num_inference_steps, **more)


@contextmanager
def given(holder: Any, name: str, value: Any) -> Iterator[None]:
    setattr(holder, name, value)
    try:
        yield
    finally:
        delattr(holder, name)


def test_two_calls_a_step_keep_their_own(folder: Path) -> None:
    """Everything is reused either way, so that the pictures are those of one call with both halves."""
    together = draw(session_on(folder, by_class()), FirstBlockCache(threshold=ALWAYS))
    session = session_on(folder, by_class(Apart))
    apart = draw(session, FirstBlockCache(threshold=ALWAYS))
    assert (apart.counts["denoiser_calls"], apart.counts["cache_hits"]) == (2 * STEPS, STEPS - 1)
    assert session.acted == {"first-block-cache": STEPS - 1}
    torch.testing.assert_close(torch.stack(apart.drawn), torch.stack(together.drawn), atol=1e-5, rtol=0)


# -- the library -----------------------------------------------------------------------------
@contextmanager
def librarys(net: Any, threshold: float) -> Iterator[None]:
    """Its hook of the idea; of these denoisers only Flux has ``enable_cache``, which calls the same function."""
    apply_first_block_cache(net, FirstBlockCacheConfig(threshold=threshold))
    with CacheMixin.cache_context(net, "all"):  # a pipeline that knows nothing of caches sets none
        yield


@pytest.mark.parametrize("kind", ["dit", "pixart", "flux"])
def test_the_librarys_own_hook_of_the_idea_draws_the_same(folder: Path, kind: str) -> None:
    plain = drawing_session(kind, folder)
    _, looked = overwritten(plain, -1.0)
    threshold = sorted(looked.changes)[len(looked.changes) // 2] * 1.001
    ours = draw(plain, FirstBlockCache(threshold=threshold))
    session = replace(plain, model=opened.__wrapped__(folder / kind).model, acted={}, counts={})  # its hooks leave traces
    net: Any = session.model.denoiser
    second = next(m for n, m in list(net.named_modules()) if n.endswith("blocks.1"))
    with librarys(net, threshold), sizes_seen(next(m for m in second.modules() if isinstance(m, nn.Linear))) as ran:
        theirs = draw(session)
    assert STEPS - len(ran) == ours.counts["cache_hits"] > 0
    assert STEPS > len(ran) > 1
    for a, b in zip(ours.drawn, theirs.drawn, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_the_librarys_hook_does_not_run_where_the_last_block_gives_no_text(folder: Path) -> None:
    """Stable Diffusion 3: ours runs there; this test tells when the library does too, to be compared then."""
    session = replace(drawing_session("sd3", folder), model=opened.__wrapped__(folder / "sd3").model, acted={}, counts={})
    with librarys(session.model.denoiser, 0.1), pytest.raises(TypeError, match="NoneType"):
        draw(session)


# -- the engine ------------------------------------------------------------------------------
def test_a_lane_that_reused_nothing_says_so(folder: Path) -> None:
    pipelines = [parse_pipeline(f"first-block-cache:threshold={t}") for t in (1e-6, 10.0)]
    spec = ExperimentSpec.model_validate(
        {
            "model": str(folder / "dit"),
            "workload": {"id": "generate-images", "options": {"items": 1, "steps": 3, "prompts": "1"}},
            "lanes": [parse_pipeline("baseline"), *pipelines],
            "threads": 1,
        }
    )
    flags = {e.lane: e.flags for e in run(spec) if isinstance(e, LaneFinished)}
    assert flags[2] == []
    assert flags[1] == [
        "no effect: First-block cache: no step changed the first block by 1e-06 or less; "
        "raise threshold, lower warmup or ask for more steps"
    ]


# -- the bench -------------------------------------------------------------------------------
def test_the_bench_tells_of_ours_and_the_librarys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder / "dit")
    bench(Plan("", 1, pairs=2, drawing_model=model, drawn=2, denoising_steps=STEPS))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [t["threshold"] for t in told] == [0.05, 0.1, 0.2]
    for t in told:
        ours, theirs = t["first-block-cache"], t["the library's hook"]
        assert (t["model"], ours["n"]) == (model, 2)
        assert ours["hits"] == theirs["hits"]
        assert (ours["psnr"] is None) == (ours["hits"] == 0)
        assert t["apart"] <= 1e-5
    assert told[-1]["first-block-cache"]["hits"] > 0


def test_the_bench_says_what_keeps_it_from_running(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match="no file or folder '/no/such'"):
        bench(Plan("", 1, drawing_model="/no/such"))
    with pytest.raises(StudioError, match="needs a model with the trait 'dit'"):
        bench(Plan("", 1, drawing_model=str(pipeline_folder(OWN, folder))))
    with pytest.raises(StudioError, match="the library's first-block cache does not run on SD3Transformer2DModel"):
        bench(Plan("", 1, pairs=2, drawing_model=str(pipeline_folder("sd3", folder)), drawn=1, denoising_steps=2))
