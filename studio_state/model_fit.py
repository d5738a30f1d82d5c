"""Whether a policy and its knobs fit a model, and which value would: pure functions over the card and the model's facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from studio_state.catalog import Card
from studio_state.experiment import ModelInfo
from studio_state.pipeline import Step

ATTENDING = ("kv.", "attention.")  # resources of layers that attend
_MOST_CANDIDATES = 65_536


class Misfit(NamedTuple):
    """One reason why a policy does not fit a model.

    Attributes:
        message: what was given, what is allowed, what to do.
        knob: the one that causes it; None = the policy as a whole.
        value: the nearest value of the knob that fits; None = there is none.
    """

    message: str
    knob: str | None = None
    value: int | None = None


def model_misfits(card: Card, step: Step, model: ModelInfo) -> list[Misfit]:
    """Everything about a policy that does not fit the model: family, traits, then the knobs that the model bounds."""
    if model.family not in card.families:
        return [Misfit(f"{card.title} works on {', '.join(card.families)} models; {model.name} is of family {model.family}")]
    missing = [t for t in card.traits if t not in model.traits] if model.inspected else []
    has = ", ".join(model.traits) or "none"
    out = [Misfit(f"{card.title} needs a model with the trait {t!r}; {model.name} has {has}") for t in missing]
    forbidden = [t for t in card.not_traits if t in model.traits]
    out += [Misfit(f"{card.title} cannot work on a model with the trait {t!r}, which {model.name} has") for t in forbidden]
    if "ssm" in model.traits and any((u.resource, u.mode) == ("kv.rollback", "needs") for u in card.uses(step.knobs)):
        text = f"{card.title} has to take refused tokens back, but {model.name} has state-space layers (trait 'ssm'), "
        out.append(Misfit(f"{text}whose running state keeps no history to go back to; remove it"))
    touched = sorted({u.resource for u in card.uses(step.knobs) if u.resource.startswith(ATTENDING)})
    if "ssm" in model.traits and "hybrid" not in model.traits and touched:
        text = f"{card.title} acts on {touched[0]}, but {model.name} has no attention layers, only running states; remove it"
        out.append(Misfit(text))
    if model.packed and card.changes_weights:
        text = f"{card.title} replaces weights, and those of {model.name} are packed already ({model.packed}); "
        out.append(Misfit(f"{text}remove it, or take the model that they were packed from"))
    knobs = card.filled(step.knobs)
    for name, prop in card.knobs.get("properties", {}).items():
        value = knobs.get(name)
        if any(knobs.get(other) not in allowed for other, allowed in prop.get("when", {}).items()):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and (found := _knob_misfit(name, value, prop, model)):
            out.append(found._replace(message=f"{card.title}: {found.message}"))
    return out


def _knob_misfit(name: str, value: int, prop: Mapping[str, Any], model: ModelInfo) -> Misfit | None:
    """Why one whole number does not fit, by what its schema says under ``fits``."""
    fits = prop.get("fits")
    if fits == "layers" and model.layers and value >= model.layers:
        least = [v for v in candidates(prop) if v < model.layers]
        text = f"{name} = {value}, but {model.name} has {model.layers} layers (0 to {model.layers - 1})"
        return Misfit(text, name, nearest_number(value, least))
    if fits == "context" and model.context and value > model.context:
        shorter = [v for v in candidates(prop) if v <= model.context]
        text = f"{name} = {value} is longer than the context of {model.name} ({model.context})"
        return Misfit(text, name, nearest_number(value, shorter))
    if fits == "divides-widths":
        return _division_misfit(name, value, prop, model, "width", (model.hidden, model.ffn))
    if fits == "divides-head":
        return _division_misfit(name, value, prop, model, "head width", (model.head_dim,))
    return None


def _division_misfit(
    name: str, value: int, prop: Mapping[str, Any], model: ModelInfo, what: str, widths: tuple[int | None, ...]
) -> Misfit | None:
    known = sorted({w for w in widths if w})
    bad = [w for w in known if value and w % value]
    if not bad:
        return None
    dividing = [v for v in candidates(prop) if v > 0 and not any(w % v for w in known)]
    advice = f"these do: {', '.join(map(str, dividing))}" if dividing else f"no allowed {name} does; use another format"
    text = f"{name} = {value} does not divide the {what} {' and '.join(map(str, bad))} of {model.name}; {advice}"
    return Misfit(text, name, nearest_number(value, dividing))


def candidates(prop: Mapping[str, Any]) -> list[int]:
    """The whole numbers that a knob's JSON Schema allows, ascending; empty where it does not bound them."""
    if "enum" in prop:
        return sorted(v for v in prop["enum"] if isinstance(v, int) and not isinstance(v, bool))
    low, high, step = prop.get("minimum"), prop.get("maximum"), prop.get("multipleOf", 1)
    if low is None or high is None or (high - low) // step > _MOST_CANDIDATES:
        return []
    first = -(-low // step) * step
    return list(range(first, high + 1, step))


def nearest_number(value: int, allowed: list[int]) -> int | None:
    """The allowed number nearest to ``value``, the smaller of two; None if there is none."""
    return min(allowed, key=lambda v: (abs(v - value), v), default=None)
