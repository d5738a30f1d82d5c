"""First-block cache against the library's own modules with hooks that overwrite what the last block gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.drawing import broken_off, condition, draw, drawing_session, same_pictures
from workers.families.base import RunTrace
from workers.policies.denoise.first_block_cache import FirstBlockCache

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


def test_the_librarys_own_hook_of_the_idea_draws_the_same(folder: Path) -> None:
    from diffusers import FirstBlockCacheConfig

    session = drawing_session("flux", folder)
    _, looked = overwritten(session, -1.0)
    threshold = sorted(looked.changes)[len(looked.changes) // 2] * 1.001
    ours = draw(session, FirstBlockCache(threshold=threshold))
    net: Any = session.model.denoiser
    net.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        theirs = draw(session)
    finally:
        net.disable_cache()
    for a, b in zip(ours.drawn, theirs.drawn, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
