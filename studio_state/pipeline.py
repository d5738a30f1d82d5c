"""Pipelines: an ordered list of policies, and its three written forms.

* one line for people: ``rtn:bits=4+snapkv:keep=0.25``
* JSON or YAML files: ``{"name": ..., "steps": [{"policy": "rtn", "knobs": {"bits": 4}}]}``
* a URL-safe string for links

Unknown policies and knobs survive every round trip; they are shown and refused when run, never
dropped.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from studio_state.catalog import STAGES, Catalog
from studio_state.errors import SpecError

MAX_LINK_BYTES = 65_536
_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Step(BaseModel):
    """One policy with its knobs (only those that were set)."""

    model_config = ConfigDict(frozen=True, extra="allow")
    policy: str = Field(max_length=100)
    knobs: dict[str, Any] = Field(default_factory=dict)


class Pipeline(BaseModel):
    """An ordered list of policies. The empty pipeline is the baseline."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = Field("", max_length=200)
    steps: tuple[Step, ...] = Field((), max_length=64)

    def text(self) -> str:
        """The one-line form; ``baseline`` for the empty pipeline."""
        return "+".join(_step_text(s) for s in self.steps) or "baseline"

    def ordered(self, catalog: Catalog) -> Pipeline:
        """The effective order: by stage, and as written within a stage. Unknown policies go last."""

        def rank(step: Step) -> int:
            card = catalog.by_id.get(step.policy)
            return STAGES.index(card.stage) if card and card.stage else len(STAGES)

        return self.model_copy(update={"steps": tuple(sorted(self.steps, key=rank))})

    def with_knob(self, policy: str, knob: str, value: Any) -> Pipeline:
        """A copy in which every step of this policy has the knob set (for sweeps)."""
        steps = tuple(s.model_copy(update={"knobs": {**s.knobs, knob: value}}) if s.policy == policy else s for s in self.steps)
        return self.model_copy(update={"steps": steps})

    def link(self) -> str:
        """URL-safe string: base64url of compressed JSON."""
        return pack_link(self.model_dump(mode="json"))


def _step_text(step: Step) -> str:
    knobs = ",".join(f"{k}={_value_text(v)}" for k, v in step.knobs.items())
    return f"{step.policy}:{knobs}" if knobs else step.policy


def _value_text(value: Any) -> str:
    if isinstance(value, str) and not re.search(r"[+,:=\"\[\]{}\s]", value) and scalar(value) == value:
        return value
    return json.dumps(value, separators=(",", ":"))


def scalar(text: str) -> Any:
    """A number, true, false, null, list or quoted text as JSON reads it; anything else is the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, nested without end
        return text


def split_outside_quotes(text: str, separator: str) -> list[str]:
    """Split at a separator, but not inside double quotes, brackets or braces."""
    parts, depth, quoted, start, i = [], 0, False, 0, 0
    while i < len(text):
        c = text[i]
        if quoted and c == "\\":
            i += 1
        elif c == '"':
            quoted = not quoted
        elif not quoted and c in "[{":
            depth += 1
        elif not quoted and c in "]}":
            depth -= 1
        elif not quoted and depth == 0 and c == separator:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [*parts, text[start:]]


def parse_pipeline(text: str) -> Pipeline:
    """Read the one-line form, or ``@file.json`` / ``@file.yaml``.

    Raises:
        SpecError: the text or the file is not a pipeline; the message shows the right form.
    """
    text = text.strip()
    if text.startswith("@"):
        return read_pipeline(Path(text[1:]))
    if text in ("", "baseline"):
        return Pipeline()
    steps = []
    for part in split_outside_quotes(text, "+"):
        policy, _, rest = part.strip().partition(":")
        if not _ID.match(policy):
            raise SpecError(
                f"cannot read {part.strip()!r} in pipeline {text!r}: write policies joined by '+', knobs after ':', "
                "for example rtn:bits=4+snapkv:keep=0.25"
            )
        knobs = {}
        for pair in split_outside_quotes(rest, ",") if rest.strip() else []:
            name, sign, value = pair.partition("=")
            if not sign or not name.strip() or not value.strip():
                raise SpecError(f"cannot read knob {pair.strip()!r} of {policy}: write name=value, for example keep=0.5")
            knobs[name.strip()] = scalar(value.strip())
        steps.append(Step(policy=policy, knobs=knobs))
    return Pipeline(steps=tuple(steps))


def read_pipeline(path: Path) -> Pipeline:
    """Read a pipeline from a JSON or YAML file.

    Raises:
        SpecError: no such file, or it does not hold a pipeline.
    """
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"cannot read the pipeline file {path}: {e}; give a JSON or YAML file") from e
    return pipeline_from_text(raw, str(path))


def pipeline_from_text(raw: str, origin: str = "text") -> Pipeline:
    """Read a pipeline from JSON or YAML text (JSON is YAML).

    Raises:
        SpecError: the text does not hold a pipeline.
    """
    try:
        return pipeline_from_data(yaml.safe_load(raw), origin)
    except yaml.YAMLError as e:
        raise SpecError(f"{origin} is neither JSON nor YAML: {str(e).splitlines()[0]}") from e


def pipeline_from_data(data: Any, origin: str = "data") -> Pipeline:
    """Read a pipeline from parsed JSON or YAML: a mapping with ``steps``, or a list of steps.

    Raises:
        SpecError: the shape is wrong.
    """
    if isinstance(data, list):
        data = {"steps": data}
    if not isinstance(data, dict):
        raise SpecError(f"{origin} holds {type(data).__name__}, not a pipeline: give {{'steps': [{{'policy': 'rtn'}}]}}")
    try:
        return Pipeline.model_validate(data)
    except ValidationError as e:
        where = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors()[:3])
        raise SpecError(f"{origin} is not a pipeline: {where}") from e


def to_yaml(pipeline: Pipeline) -> str:
    """The pipeline as a YAML file."""
    return str(yaml.safe_dump(pipeline.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def pack_link(data: Any) -> str:
    """Any JSON value as a URL-safe string."""
    raw = json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.urlsafe_b64encode(zlib.compress(raw, 9)).decode().rstrip("=")


def unpack_link(text: str) -> Any:
    """Inverse of :func:`pack_link`, bounded to 64 KiB.

    Raises:
        SpecError: not such a string, or too long.
    """
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), MAX_LINK_BYTES)
        if inflate.unconsumed_tail:
            raise SpecError(f"this link holds more than {MAX_LINK_BYTES} bytes; share the pipeline as a file instead")
        return json.loads(raw)
    except (binascii.Error, zlib.error, ValueError) as e:
        raise SpecError("this link is damaged or is not a pipeline link; copy it again") from e


def sweep(pipelines: Iterable[Pipeline], policy: str, knob: str, values: Iterable[Any]) -> list[Pipeline]:
    """Every pipeline that contains the policy, once per value of the knob; the others once."""
    out: list[Pipeline] = []
    for p in pipelines:
        if any(s.policy == policy for s in p.steps):
            out += [p.with_knob(policy, knob, v) for v in values]
        else:
            out.append(p)
    return out
