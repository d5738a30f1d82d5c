"""Run cards: one experiment as a JSON file that another studio reads, keeps and runs again.

A card has the shape of the ``--json`` document (``experiment``, ``lanes``) with digests in the place of
outputs and prompts, and a seal: the sha256 over everything else, in canonical JSON. The seal shows that a
file was cut, edited or damaged on its way. It is no signature: who wants to forge a card can seal it anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state import events as ev
from studio_state.errors import SpecError, StoreError
from studio_state.experiment import ExperimentSpec, ModelInfo
from studio_state.metrics import Source
from studio_state.results import LaneResults, Results, results_of
from studio_state.zoo import find as find_in_zoo

FORMAT = "pareto-studio run card"
VERSION = 1
MAX_BYTES = 100_000_000
_HEAD_BYTES = 4096
_VERSION = re.compile(rf'"format"\s*:\s*"{FORMAT}"\s*,\s*"version"\s*:\s*(\d{{1,9}})\b')


class Spread(BaseModel):
    """Interval of a number, and how many values it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    low: float | None = None
    high: float | None = None
    n: int | None = None


class RatioNumbers(Spread):
    """Lane over reference."""

    value: float


class OutputDigest(BaseModel):
    """What one item ended in: not its text but the digest of text and tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    item: str
    repeat: int = 0
    kind: str = "text"
    correct: bool | None = None
    tokens: int | None = None
    digest: str


class CardLane(BaseModel):
    """One lane, with the names of the ``--json`` document."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    lane: int
    pipeline: str
    name: str = ""
    order: str = ""
    status: str
    message: str = ""
    flags: list[str] = Field(default_factory=list)
    interleaved: bool = True
    metrics: dict[str, float | None] = Field(default_factory=dict)
    sources: dict[str, Source] = Field(default_factory=dict)
    intervals: dict[str, Spread] = Field(default_factory=dict)
    ratios: dict[str, RatioNumbers] = Field(default_factory=dict)
    outputs: list[OutputDigest] = Field(default_factory=list)


class CardExperiment(BaseModel):
    """What was run, on what, where.

    Attributes:
        model_digest: commit of the model, sha256 of its file, or the fingerprint of a local folder's weights.
        workload_digest: over the prompts that the model saw and the expected answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    status: str
    message: str = ""
    submitted_at: float | None = None
    seconds: float | None = None
    spec: ExperimentSpec
    digest: str
    model: ModelInfo | None = None
    model_digest: str = ""
    environment: dict[str, Any] = Field(default_factory=dict)
    workload_digest: str = ""


class RunCard(BaseModel):
    """One experiment, sealed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: str = FORMAT
    version: int = VERSION
    sha256: str = ""
    experiment: CardExperiment
    lanes: list[CardLane]

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return self.model_dump(mode="json")

    def text(self) -> str:
        """The file: format and version in its first bytes."""
        return json.dumps(self.document(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# -- out ---------------------------------------------------------------------------------------
def make_card(events: Iterable[ev.Event]) -> RunCard:
    """The card of an experiment that has ended.

    Raises:
        StoreError: nothing was submitted, or it has not ended yet.
    """
    found = results_of(events)
    if found.spec is None:
        raise StoreError("there is no such experiment in the record; `pareto-studio history` lists what there is")
    if found.status not in ev.TERMINAL:
        raise StoreError(f"experiment {found.experiment} is still {found.status}; a run card is made once it has ended")
    card = RunCard(experiment=_experiment(found, found.spec), lanes=[_lane(found.spec, i, x) for i, x in enumerate(found.lanes)])
    return card.model_copy(update={"sha256": seal(card.document())})


def seal(document: dict[str, Any]) -> str:
    """sha256 over the canonical JSON of a card without its seal."""
    return _digest({k: v for k, v in document.items() if k != "sha256"})


def output_digest(text: str, token_ids: list[int] | None) -> str:
    """sha256 over the text of an output and its tokens."""
    return _digest([text, token_ids])


def _digest(content: Any) -> str:
    raw = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(raw.encode("utf-8", "surrogatepass")).hexdigest()


def _experiment(found: Results, spec: ExperimentSpec) -> CardExperiment:
    return CardExperiment(
        id=found.experiment,
        status=found.status,
        message=found.message,
        submitted_at=found.submitted_at,
        seconds=found.seconds,
        spec=spec,
        digest=spec.digest(),
        model=found.model,
        model_digest=_model_digest(found.model),
        environment=found.environment,
        workload_digest=_workload_digest(found),
    )


def _model_digest(model: ModelInfo | None) -> str:
    if model is None:
        return ""
    entry = find_in_zoo(model.name)
    return model.revision or str(getattr(entry.source, "sha256", "") if entry else "") or model.fingerprint


def _workload_digest(found: Results) -> str:
    if not found.prompts:
        return ""
    expected = {item: o.expected for lane in found.lanes for (item, _), o in lane.outputs.items()}
    return _digest([[item, prompt, expected.get(item)] for item, prompt in sorted(found.prompts.items())])


def _lane(spec: ExperimentSpec, index: int, lane: LaneResults) -> CardLane:
    pipeline = spec.lanes[index]
    names = [n for n in dict.fromkeys([*lane.values, *lane.samples]) if n in lane.values or lane.value(n) is not None]
    return CardLane(
        lane=index,
        pipeline=pipeline.text(),
        name=pipeline.name,
        order=lane.order,
        status=lane.status,
        message=lane.message,
        flags=lane.flags,
        interleaved=lane.interleaved,
        metrics={n: _finite(lane.value(n)) for n in names},
        sources={n: lane.values[n].source if n in lane.values else "measured" for n in names},
        intervals={
            n: Spread(low=m.low, high=m.high, n=m.n) for n, m in lane.values.items() if m.low is not None or m.n is not None
        },
        ratios={n: RatioNumbers(value=r.value, low=r.low, high=r.high, n=r.n) for n, r in lane.ratios.items()},
        outputs=[_output(o) for o in lane.outputs.values()],
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _output(o: ev.Output) -> OutputDigest:
    ids = o.data.get("token_ids")
    if ids is None and "digest" in o.data:  # an imported experiment holds the digest alone
        tokens, digest = o.data.get("tokens"), str(o.data["digest"])
    else:
        tokens, digest = len(ids) if ids else None, output_digest(o.text, ids)
    return OutputDigest(item=o.item, repeat=o.repeat, kind=o.kind, correct=o.correct, tokens=tokens, digest=digest)


# -- in ----------------------------------------------------------------------------------------
def is_card(head: bytes) -> bool:
    """True if a file that begins like this says that it is a run card."""
    return FORMAT.encode() in head[:_HEAD_BYTES]


def read_card(path: Path) -> RunCard:
    """A card from its file. Size and version are looked at before anything is parsed.

    Raises:
        SpecError: it cannot be read, is too large, from a newer version, no run card, or not as it was sealed.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SpecError(
                f"{path.name} has {size / 1e6:,.0f} MB; a run card has at most {MAX_BYTES / 1e6:,.0f} MB, so this is something else"
            )
        with open(path, "rb") as file:
            return card_from_bytes(file.read(MAX_BYTES + 1), path.name)
    except OSError as e:
        raise SpecError(f"cannot read the run card {path}: {e.strerror or e}; give a file that was exported by the studio") from e


def card_from_bytes(raw: bytes, name: str = "this file") -> RunCard:
    """A card from the bytes of its file (an upload).

    Raises:
        SpecError: as :func:`read_card`.
    """
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{name} has more than {MAX_BYTES / 1e6:,.0f} MB, the most a run card may have; this is something else")
    head = raw[:_HEAD_BYTES]
    found = _VERSION.search(head.decode("utf-8", "replace"))
    if found and int(found[1]) > VERSION:
        raise SpecError(
            f"{name} is a run card of version {found[1]}; this studio reads version {VERSION}: update it, then import again"
        )
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{name} is no run card: it is not JSON or was cut off; export it again") from e
    return card_from_data(data, name)


def card_from_data(data: Any, name: str = "this file") -> RunCard:
    """A card from parsed JSON.

    Raises:
        SpecError: no run card, from a newer version, or not as it was sealed.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("version"), int):
        raise SpecError(
            f"{name} is no run card: it does not say format {FORMAT!r} and a version; give a file that was exported as one"
        )
    if data["version"] > VERSION:
        raise SpecError(
            f"{name} is a run card of version {data['version']}; this studio reads version {VERSION}: update it, then import again"
        )
    if data.get("sha256") != seal(data):
        raise SpecError(
            f"{name} was changed after it was exported: its content does not match its sha256; ask for the original file"
        )
    try:
        return RunCard.model_validate(data)
    except ValidationError as e:
        first = e.errors()[0]
        raise SpecError(
            f"{name} is a damaged run card: {'.'.join(map(str, first['loc']))}: {first['msg']}; export it again"
        ) from e
