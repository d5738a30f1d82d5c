"""Calibration: the statistics against plain arithmetic on what the library's own modules were given, and the files they are kept in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from studio_state.errors import SpecError
from studio_state.experiment import WorkloadSpec
from tests import tiny, tiny_vision
from tests.methods.driving import attached, make_session, seeing_session
from workers.mechanisms import calibration
from workers.mechanisms.calibration import Seen, calibration_items, gathered
from workers.policies.prune.magnitude import Magnitude
from workers.session import Session
from workers.workloads.base import ItemContext
from workers.workloads.registry import make_workload

BOTH: frozenset[calibration.Want] = frozenset({"moment", "sample"})
NAMES = [
    f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("PARETO_STUDIO_CACHE", str(tmp_path))
    return tmp_path / "calibration"


def seen(session: Session, names: list[str] = NAMES, samples: int = 3) -> dict[str, Seen]:
    return {n: s for _, group in gathered(session, names, BOTH, samples) for n, s in group.items()}


def inputs(session: Session, samples: int) -> dict[str, Tensor]:
    """What the library gives each map, [R, K] float64, by its own forward."""
    found: dict[str, list[Tensor]] = {n: [] for n in NAMES}
    handles = [
        session.model.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: found[n].append(args[0].flatten(0, 1)))
        for n in NAMES
    ]
    with torch.inference_mode():
        for item in calibration_items(session, samples):
            session.model(torch.tensor([item.prompt_ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x).double() for n, x in found.items()}


def test_statistics_are_those_of_what_goes_in() -> None:
    session = make_session()
    mine, theirs = seen(session), inputs(session, 3)
    for name in NAMES:
        x, s = theirs[name], mine[name]
        assert s.rows == len(x)
        assert torch.allclose(s.mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)
        assert torch.allclose(s.max_abs.double(), x.abs().amax(0), rtol=1e-4, atol=1e-6)
        assert s.moment is not None
        assert torch.allclose(s.moment.double(), x.T @ x / len(x), rtol=1e-3, atol=1e-6)
        assert s.sample is not None
        assert len(s.sample) == calibration.SAMPLE_ROWS
        assert float(torch.cdist(s.sample.double(), x).amin(1).max()) < 1e-4  # rows that really went in
    assert [mine[n].beside for n in NAMES] == [NAMES[0], NAMES[0], NAMES[2], NAMES[3], NAMES[4]]


def test_groups_that_fit_the_budget_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session()
    whole = seen(session)
    monkeypatch.setattr(calibration, "GROUP_BYTES", 200_000)
    groups = [list(g) for g, _ in gathered(session, NAMES, BOTH, 3)]
    assert len(groups) > 1
    assert [n for g in groups for n in g] == NAMES
    for name, part in seen(session).items():
        assert torch.equal(part.mean_abs, whole[name].mean_abs)


def test_kept_by_content(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session()
    first = seen(session)
    (file,) = home.glob("*.safetensors")
    ran: list[str] = []
    inner = calibration._run
    monkeypatch.setattr(calibration, "_run", lambda *a: (ran.append("ran"), inner(*a))[1])
    again = seen(session)
    assert not ran
    assert all(torch.equal(first[n].moment, again[n].moment) and first[n].beside == again[n].beside for n in NAMES)  # type: ignore[arg-type]
    with attached(session, Magnitude(sparsity=0.5)):  # other weights, other inputs
        other = seen(session)
    assert ran == ["ran"]
    assert not torch.equal(first[NAMES[-1]].mean_abs, other[NAMES[-1]].mean_abs)
    file.write_bytes(b"torn")
    assert torch.equal(seen(session)[NAMES[0]].max_abs, first[NAMES[0]].max_abs)
    assert ran == ["ran", "ran"]


def test_old_files_give_way(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session()
    seen(session)
    monkeypatch.setattr(calibration, "CACHE_BYTES", 1)
    seen(session, samples=2)
    assert len(list(home.glob("*.safetensors"))) == 1


def test_a_text_is_cut_to_the_models_context_and_nothing_of_the_session_stays() -> None:
    session = make_session()
    before: Any = (session.spec, dict(session.counts), dict(session.acted))
    items = calibration_items(session, 4)
    assert len({i.prompt_ids for i in items}) == 4
    assert all(len(i.prompt_ids) <= min(calibration.TEXT_TOKENS, session.info.context) for i in items)
    seen(session)
    assert (session.spec, dict(session.counts), dict(session.acted)) == before
    assert not any(m._forward_pre_hooks for m in session.model.modules())


@pytest.mark.parametrize("count", [4, 60])
def test_a_model_that_sees_gets_pictures_that_are_not_measured(count: int) -> None:
    """The questions about scenes are the same whatever the seed: more of them are about scenes that come later."""
    session = seeing_session(tiny_vision.llava_folder(4))
    spec = session.spec.model_copy(update={"workload": WorkloadSpec(id="vqa", options={"items": count})})
    with session.having(spec=spec):
        items = calibration_items(session, 5)
        measured = make_workload(spec.workload).make_items(ItemContext(session.processor, spec.seed, session.info.context, ()))
    assert len(items) == 5
    assert len({(i.prompt, i.image.open().tobytes()) for i in items if i.image}) == 5
    assert not {i.image.open().tobytes() for i in items if i.image} & {i.image.open().tobytes() for i in measured if i.image}
    with session.having(spec=spec.model_copy(update={"workload": WorkloadSpec(id="perplexity")})):
        assert [i.id for i in calibration_items(session, 2)] == ["calibration-0", "calibration-1"]
    with (
        session.having(spec=spec.model_copy(update={"workload": WorkloadSpec(id="vqa", options={"source": "photos"})})),
        pytest.raises(SpecError, match="vqa: with these options it has no items besides those that are measured"),
    ):
        calibration_items(session, 2)


def test_maps_of_experts_are_seen_one_by_one() -> None:
    from workers.mechanisms.expert_linears import ExpertLinears
    from workers.mechanisms.weight_places import places

    session = make_session(tiny.moe_folder())
    name = places(session).experts[0]
    experts = ExpertLinears.of(session.model.get_submodule(name))
    names = [f"{name}.{n}" for n in experts.names()]
    with session.swapped({name: experts}):
        found = seen(session, names, samples=1)
    rows = [found[n].rows for n in names if n in found and "gate_up" in n]
    (item,) = calibration_items(session, 1)
    assert sum(rows) == 2 * len(item.prompt_ids)  # two experts a token
