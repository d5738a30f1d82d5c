"""Every cache policy on prompts with real image tokens: how many positions each layer holds, and that image tokens are among those that leave."""

from __future__ import annotations

import numpy as np
import pytest

from tests.methods.calling import kept
from tests.methods.driving import attached
from tests.methods.seeing import prefilled
from tests.methods.test_vision_contract import CATALOG, FITTING, MODELS, POLICIES, item_for, session_of
from workers.mechanisms.evictor import Budgeted

SEEING = [m for m, (family, _, _) in MODELS.items() if family == "vlm"]
CACHES = [n for n, cls in POLICIES.items() if cls.card.stage == "kv"]
FOR_WORDS = {  # turning back needs positions that run in one direction; a draft and a repeated context are read without the image
    "expected-attention", "kvzip", "leverage-score", "speckv", "speckv-pc",
}  # fmt: skip
IMAGE_TOKENS = {"llava": 64, "llava_next": 336, "smolvlm": 272, "qwen2_5_vl": 64}


def expected(name: str, prompt: int, held: list[float]) -> list[int]:
    """Positions in each layer's heads at default knobs, mean over heads."""
    policy, layers = POLICIES[name](), len(held)
    if name == "simlayerkv":  # a lazy layer keeps 4 sinks and the newest quarter; which layers are lazy its own test says
        lazy = 4 + round(prompt / 4)
        assert min(held) == lazy
        return [lazy if n < prompt else prompt for n in held]
    if name == "pyramidkv":  # beside the 32 that vote a line from nearly twice the mean of what they leave to a twentieth of it
        mean = 0.5 * prompt - 32
        return [32 + round(n) for n in np.linspace(2 * mean - mean / 20, mean / 20, layers)]
    return [round(policy.keep * prompt) if isinstance(policy, Budgeted) else prompt] * layers


def test_who_is_run_here() -> None:
    assert {n for n in CACHES if "vlm" not in CATALOG.by_id[n].families} == FOR_WORDS
    assert {(n, m) for n, m in FITTING if n in CACHES and m in SEEING} == {
        (n, m) for n in CACHES if n not in FOR_WORDS for m in SEEING
    }


@pytest.mark.parametrize("model", SEEING)
@pytest.mark.parametrize("name", [n for n in CACHES if n not in FOR_WORDS])
def test_counts_with_an_image_in_the_prompt(name: str, model: str) -> None:
    session, item = session_of(model), item_for(model)
    ids = session.family.begin(session, [item]).results[0].prompt_ids
    image = {place for place, token in enumerate(ids) if token == session.model.config.image_token_id}
    assert len(image) == IMAGE_TOKENS[model]
    with attached(session, POLICIES[name]()):
        state = prefilled(session, item)
    held = [layer.stored for layer in state.cache.layers]
    assert held == expected(name, len(ids), held)
    gone = [image - {int(p) for p in places.flat} for places in kept(state)]
    assert any(gone) == any(n < len(ids) for n in held)  # where anything leaves, image tokens leave too
    if name == "look-m":  # every head keeps words first; image tokens fill what is left
        words = len(ids) - len(image)
        for places, n in zip(kept(state), held, strict=True):
            assert [sum(int(p) not in image for p in head) for head in places] == [min(words, n)] * len(places)
