"""Run cards: sealed, refused in one sentence where they cannot be trusted, and compared with a second run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli_replay import read_card as read_for_replay
from studio_state import events as ev
from studio_state import zoo
from studio_state.errors import SpecError, StoreError
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.journal import read_journal, replay
from studio_state.paths import DataDir
from studio_state.replay import compare_runs
from studio_state.runcard import MAX_BYTES, RunCard, card_from_bytes, make_card, read_card
from studio_state.runcard_record import events_of, export_card, import_card
from studio_state.spool import SpoolWriter, read_spool

EXPERIMENT = "20260131-094500-abcdef"


def events(tokens: list[int] | None = None, speed: float = 20.0, threads: int = 2, torch: str = "2.13.0") -> list[ev.Event]:
    """A small experiment as a worker tells it."""
    spec = ExperimentSpec.model_validate(
        {"model": "smollm2-135m", "workload": {"id": "prompts"}, "lanes": [{}, {"steps": [{"policy": "knorm"}]}]}
    )
    told: list[ev.Event] = [
        ev.Submitted(spec=spec, t=1000.0),
        ev.Started(environment={"device_name": "a chip", "threads": threads, "versions": {"torch": torch}}),
        ev.ModelLoaded(info=ModelInfo(name="smollm2-135m", family="llm")),
    ]
    for lane in (0, 1):
        told += [
            ev.LaneStarted(lane=lane, order=spec.lanes[lane].text()),
            ev.ItemStarted(lane=lane, item="one", prompt="" if lane else "Say hi"),
            ev.Metric(lane=lane, name="new_tokens", value=3.0, item="one"),
            ev.Metric(lane=lane, name="kv_bytes", value=4096.0 / (lane + 1), n=1),
            ev.Metric(lane=lane, name="decode_tokens_per_s", value=speed * (1 + lane), low=None, high=None, n=6),
            ev.Output(
                lane=lane,
                item="one",
                text="hi there",
                expected="hi",
                correct=True,
                data={"token_ids": (tokens if lane and tokens else [5, 6, 7])},
            ),
        ]
    told += [ev.Ratio(lane=1, name="decode_tokens_per_s", value=2.0, low=1.9, high=2.1, n=6)]
    told += [ev.LaneFinished(lane=lane, status="finished", flags=["no effect: short"] * lane) for lane in (0, 1)]
    told.append(ev.Finished(seconds=12.5))
    return [e.model_copy(update={"experiment": EXPERIMENT, "seq": i}) for i, e in enumerate(told)]


def sentence(read: Callable[[], Any]) -> str:
    with pytest.raises((SpecError, StoreError)) as refused:
        read()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_card_holds_the_numbers_and_digests_but_no_text(tmp_path: Path) -> None:
    card = make_card(events())
    assert [lane.metrics["kv_bytes"] for lane in card.lanes] == [4096.0, 2048.0]
    assert card.lanes[1].metrics["new_tokens"] == 3.0
    assert card.lanes[1].ratios["decode_tokens_per_s"].model_dump() == {"value": 2.0, "low": 1.9, "high": 2.1, "n": 6}
    assert card.lanes[1].flags == ["no effect: short"]
    source = zoo.get("smollm2-135m").source
    assert card.experiment.model_digest == source.sha256  # type: ignore[union-attr]
    assert card.experiment.spec.lanes[1].text() == "knorm"
    raw = json.dumps(["hi there", [5, 6, 7]], separators=(",", ":"))
    assert card.lanes[0].outputs[0].digest == hashlib.sha256(raw.encode()).hexdigest()
    assert (card.lanes[0].outputs[0].tokens, card.lanes[0].outputs[0].correct) == (3, True)
    items = json.dumps([["one", "Say hi", "hi"]], separators=(",", ":"))
    assert card.experiment.workload_digest == hashlib.sha256(items.encode()).hexdigest()
    assert "hi there" not in card.text()
    assert "Say hi" not in card.text()


def test_the_seal_is_the_sha256_of_the_canonical_rest() -> None:
    document = json.loads(make_card(events()).text())
    sealed = document.pop("sha256")
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert sealed == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_card_survives_its_file(tmp_path: Path) -> None:
    card = make_card(events())
    file = tmp_path / "card.json"
    file.write_text(card.text(), encoding="utf-8")
    assert read_card(file) == card
    assert card_from_bytes(file.read_bytes()) == card
    spec, document = read_for_replay(file)
    assert (spec, document["sha256"]) == (card.experiment.spec, card.sha256)


def test_any_change_breaks_the_seal(tmp_path: Path) -> None:
    text = make_card(events()).text()
    for old, new in (
        ("2048.0", "1024.0"),
        ('"knorm"', '"h2o"'),
        ('"a chip"', '"b chip"'),
        ('"status": "finished"', '"status": "failed"'),
    ):
        assert text.count(old)
        assert "was changed after it was exported" in sentence(lambda: card_from_bytes(text.replace(old, new, 1).encode()))  # noqa: B023
    relaid = json.dumps(json.loads(text))  # white space is not content
    assert card_from_bytes(relaid.encode()) == make_card(events())


def test_a_newer_version_is_refused_before_it_is_parsed() -> None:
    text = make_card(events()).text().replace('"version": 1', '"version": 2', 1)
    said = "is a run card of version 2; this studio reads version 1: update it"
    assert said in sentence(lambda: card_from_bytes(text.encode()))
    assert said in sentence(lambda: card_from_bytes(text[:200].encode()))  # what follows may be anything
    late = {k: v for k, v in sorted(json.loads(text).items(), reverse=True)}  # version after the first 4 kB, or not first
    assert said in sentence(lambda: card_from_bytes(json.dumps({"padding": "x" * 5000, **late}).encode()))


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    with open(file, "wb") as out:
        out.write(make_card(events()).text().encode())
        out.truncate(MAX_BYTES + 1)  # a hole: takes no room
    assert sentence(lambda: read_card(file)) == "huge.json has 100 MB; a run card has at most 100 MB, so this is something else"
    assert "at most 100 MB" in sentence(lambda: read_for_replay(file))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is no run card: it is not JSON"),
        (b"\x00\xff\xfe", "is no run card: it is not JSON"),
        (b"[" * 200_000, "is no run card: it is not JSON"),
        (b"[1]", "does not say format"),
        (b'{"format": "pareto-studio run card"}', "does not say format"),
        (b'{"format": "pareto-studio run card", "version": 1}', "was changed after"),
    ],
)
def test_other_files_are_refused_in_one_sentence(raw: bytes, words: str) -> None:
    assert words in sentence(lambda: card_from_bytes(raw, "x.json"))


def test_a_resealed_card_with_a_wrong_shape_is_refused() -> None:
    from studio_state.runcard import seal

    data = json.loads(make_card(events()).text())
    data["lanes"][0]["metrics"] = {"kv_bytes": "many"}
    data["sha256"] = seal(data)
    assert "is a damaged run card: lanes.0.metrics.kv_bytes" in sentence(lambda: card_from_bytes(json.dumps(data).encode()))


def test_only_what_has_ended_can_be_exported(tmp_path: Path) -> None:
    data = DataDir.at(tmp_path).open()
    assert "there is no such experiment" in sentence(lambda: export_card(data, EXPERIMENT))
    assert "is still running" in sentence(lambda: make_card(events()[:-1]))


def test_an_imported_card_becomes_an_experiment_of_its_own(tmp_path: Path) -> None:
    data = DataDir.at(tmp_path).open()
    card = make_card(events())
    new = import_card(data, card, "card.json", by="ann")
    assert new != EXPERIMENT
    again = export_card(data, new)
    assert [lane.model_dump() for lane in again.lanes] == [lane.model_dump() for lane in card.lanes]
    assert again.experiment.spec == card.experiment.spec
    assert next(iter(read_spool(data.spool(new)))).origin == "import"  # type: ignore[attr-defined]
    entry = next(iter(replay(read_journal(data.journal).entries).imports.values()))
    assert (entry.experiment, entry.source, entry.by) == (new, "card.json", "ann")
    kept = RunCard.model_validate_json(data.artifact(entry.digest).read_bytes())
    assert kept == card


@pytest.mark.parametrize("end", [ev.Failed(message="it broke"), ev.Cancelled(message="stopped")])
def test_cards_of_what_did_not_finish_say_so(end: ev.Event) -> None:
    told = [*events()[:-1], end.model_copy(update={"experiment": EXPERIMENT, "seq": 99})]
    card = make_card(told)
    assert (card.experiment.status, card.experiment.message) == (end.event, end.message)  # type: ignore[attr-defined]
    assert events_of(card)[-1].event == end.event  # type: ignore[attr-defined]


def test_the_same_run_again_is_the_same_even_if_it_was_slower() -> None:
    found = compare_runs(make_card(events()).document(), make_card(events(speed=10.0)).document())
    assert found.verdict == "same"
    assert [r.verdict for r in found.rows if r.metric == "decode_tokens_per_s"] == ["different", "different"]
    assert [(r.metric, r.verdict) for r in found.ratios] == [("decode_tokens_per_s", "same")]
    assert [(o.same, o.total) for o in found.outputs] == [(1, 1), (1, 1)]
    assert found.why == []


def test_other_tokens_are_different_and_the_set_up_says_why() -> None:
    before, now = make_card(events()), make_card(events(tokens=[5, 6, 8], threads=4, torch="2.14.0"))
    found = compare_runs(before.document(), now.document())
    assert found.verdict == "different"
    assert [(o.lane, o.same, o.total, o.first) for o in found.outputs] == [(0, 1, 1, ""), (1, 0, 1, "one")]
    assert found.why == ["another number of CPU threads: 2 then, 4 now", "another version of torch: 2.13.0 then, 2.14.0 now"]
    assert found.sentences()[0].startswith("different: ")


def test_other_items_and_another_request_are_told() -> None:
    before = make_card(events()).document()
    now = json.loads(json.dumps(before))
    now["experiment"]["workload_digest"] = "0" * 64
    now["experiment"]["spec"]["seed"] = 7
    why = compare_runs(before, now).why
    assert why[0] == "asked for differently: seed was 0, is 7"
    assert why[1].startswith("the items are other ones: ")


def test_a_document_and_a_card_of_one_run_are_the_same(tmp_path: Path) -> None:
    from app.report import document

    told = [e for e in read_back(tmp_path, events())]
    found = compare_runs(document(told), make_card(told).document())
    assert found.verdict == "same"
    assert sum(o.total for o in found.outputs) == 2


def read_back(folder: Path, told: list[ev.Event]) -> list[ev.Event]:
    data = DataDir.at(folder).open()
    with SpoolWriter(data.spool(EXPERIMENT)) as spool:
        spool.append_all(told)
    return list(read_spool(data.spool(EXPERIMENT)))
