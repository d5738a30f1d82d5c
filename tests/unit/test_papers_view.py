"""What the papers page shows, worked out by hand; and how a claim is carried from its experiments to the journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.claim_run import check_claim, specs_of
from app.papers_view import NOT_BUILT, RUNS_HERE, WITH_CLAIM, claim_page, found_numbers, paper_list, verdict_list
from studio_state import events as ev
from studio_state.catalog import Catalog
from studio_state.claims import Claim, find_claim, load_claims
from studio_state.errors import SpecError, StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.journal import GiveVerdict
from studio_state.papers import Papers
from studio_state.paths import DataDir
from studio_state.problems import Problem
from studio_state.results import Results, results_of
from studio_state.store import Store


def two_experiments() -> Claim:
    experiments = [{"id": i, "workload": {"id": "speed"}, "lanes": ["baseline", "snapkv"]} for i in ("z", "a")]
    checks = [
        {"id": e, "text": "smaller", "source": "s", "kind": "ratio", "metric": "kv_bytes", "experiment": e, "at_most": 0.5}
        for e in ("z", "a")
    ]
    return Claim.model_validate({
        "id": "x", "title": "X", "reference": "arXiv:1", "headline": "h", "source": "s", "fallback": "f", "minutes": 1, "experiments": experiments,
        "checks": checks, "log": [{"date": "2026-01-31", "digest": "0" * 16, "reason": "set before the first run"}],
    })  # fmt: skip


def ran(experiment: str, bytes_kept: float, end: ev.Event | None = None) -> Results:
    values = (1000.0, bytes_kept)
    told: list[ev.Event] = [ev.Submitted(experiment=experiment, spec=two_experiments().experiments[0].spec())]
    told += [ev.Metric(experiment=experiment, lane=i, name="kv_bytes", value=v) for i, v in enumerate(values)]
    told += [ev.LaneFinished(experiment=experiment, lane=i, status="finished") for i in range(2)]
    return results_of([*told, end or ev.Finished(experiment=experiment, seconds=1.0)])


# -- the list ----------------------------------------------------------------------------------
def listed(**running: bool) -> list[dict[str, Any]]:
    return paper_list(
        Papers.load().papers, load_claims(), lambda m: f"link-{m}", lambda c: {"verdict": "", "running": running.get(c, False)}
    )


def test_every_system_once_and_the_claims_on_other_papers() -> None:
    rows = listed(snapkv=True)
    assert len([r for r in rows if r["listed"]]) == len({r["id"] for r in rows if r["listed"]}) == 68
    assert {c["id"] for r in rows for c in r["claims"]} == set(load_claims())
    others = {r["claims"][0]["id"]: r for r in rows if not r["listed"]}
    assert set(others) == {c.id for c in load_claims().values() if not c.paper}
    assert others["snapkv"]["runs_as"] == [{"id": "snapkv", "link": "link-snapkv"}]
    assert [r["claims"][0]["id"] for r in rows if any(c["running"] for c in r["claims"])] == ["snapkv"]


def test_groups_stand_in_order_and_the_newest_first() -> None:
    rows = listed()
    groups = [r["group"] for r in rows]
    assert groups == sorted(groups, key=(WITH_CLAIM, RUNS_HERE, NOT_BUILT).index)
    assert all(bool(r["claims"]) == (r["group"] == WITH_CLAIM) and bool(r["runs_as"]) == (r["group"] != NOT_BUILT) for r in rows)
    dates = [r["date"] for r in rows if r["group"] == NOT_BUILT]
    assert dates == sorted(dates, reverse=True)


# -- a claim -----------------------------------------------------------------------------------
def test_a_claim_in_words() -> None:
    page = claim_page(find_claim("snapkv"), Catalog.load())
    assert (page["takes"], page["set"]) == ("about 4 min on two CPU cores", "2026-11-23")
    assert page["reference"] == {"text": "arXiv:2404.14469", "link": "https://arxiv.org/abs/2404.14469"}
    checks = {c["text"]: c for c in page["checks"]}
    growth = checks["the gain in decoding speed grows from 512 to 2048 prompt tokens"]
    assert (growth["compared"], growth["where"], growth["headline"]) == (
        "Decode speed: snapkv:keep=0.12 / baseline",
        "in long against short",
        False,
    )
    assert checks["decoding is 3.6 times faster"]["asked"] == "at least 3.6"
    order = next(c for c in claim_page(find_claim("rtn-against-magnitude"), Catalog.load())["checks"] if "<" in c["compared"])
    assert order["compared"] == "Same top token as baseline: magnitude:sparsity=0.5 < rtn:bits=4"


@pytest.mark.parametrize(
    ("kind", "numbers", "shown"),
    [
        ("ratio", (0.714, 0.7, 0.73), ("0.71×", "0.70 to 0.73")),
        ("value", (0.5, 0.4, 0.6), ("50.0 %", "40.0 % to 60.0 %")),
        ("difference", (-0.1, -0.2, 0.0), ("-0.100", "-0.200 to 0")),
        ("ordering", (0.25, 0.1, 0.4), ("0.250", "0.100 to 0.400")),
        ("ratio", (None, None, None), ("–", "")),
    ],
)  # fmt: skip
def test_numbers_are_written_by_kind(kind: str, numbers: tuple[float | None, ...], shown: tuple[str, str]) -> None:
    assert found_numbers(kind, "accuracy", *numbers) == shown


# -- from the experiments to the journal -------------------------------------------------------
def judged(store: Store, claim: Claim, runs: dict[str, Results]) -> None:
    check_claim(
        claim, specs_of(claim, None, "cpu", lambda _: []), lambda name, _: runs[name], lambda e: store.record(*e), by="studio"
    )


def test_a_verdict_goes_through_the_record_to_the_page(tmp_path: Path) -> None:
    claim, data = two_experiments(), DataDir.at(tmp_path).open()
    with Store(data) as store:
        for shares in ((200.0, 400.0), (200.0, 900.0)):
            runs = {"z": ran(f"z{shares[1]:.0f}", shares[0]), "a": ran(f"a{shares[1]:.0f}", shares[1])}
            judged(store, claim, runs)
        store.record(GiveVerdict(experiment="z400", claim="y", verdict="reproduced"))
        rows = store.verdicts_on("x")
    assert sorted(r.experiment for r in rows) == ["a400", "a900", "z400", "z900"]
    shown = verdict_list(rows, claim)
    assert [(v["verdict"], v["runs"]) for v in shown] == [("direction only", [["z", "z900"], ["a", "a900"]]), ("reproduced", [["z", "z400"], ["a", "a400"]])]  # fmt: skip
    assert [(c["value"], c["interval"]) for c in shown[0]["checks"]] == [("0.20×", "exact"), ("0.90×", "exact")]
    assert shown[0]["changed"] == ""
    other = claim.model_copy(update={"unchecked": ("a part",)})
    assert verdict_list(rows, other)[0]["changed"] == "The checks of this claim were other ones then."


def test_nothing_is_kept_after_a_cancel_or_a_failure() -> None:
    claim, begun, kept = two_experiments(), list[str](), list[GiveVerdict]()
    specs = specs_of(claim, None, "cpu", lambda _: [])

    def failing(name: str, spec: ExperimentSpec) -> Results:
        begun.append(name)
        return ran("z1", 200.0, ev.Failed(experiment="z1", message="it broke"))

    with pytest.raises(StudioError, match="experiment z ended as failed: it broke"):
        check_claim(claim, specs, failing, kept.extend, "studio")
    assert check_claim(claim, specs, lambda name, spec: None, kept.extend, "studio") is None
    assert (begun, kept) == (["z"], [])


def test_problems_of_all_experiments_are_told_at_once() -> None:
    with pytest.raises(SpecError) as refused:
        specs_of(two_experiments(), None, "cpu", lambda spec: [Problem(message=f"{spec.workload.id} is not there")])
    assert len(refused.value.problems) == 2
