"""Taking rotary embeddings back, against the library's own projections, for every type of model that is known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from studio_state.errors import Unavailable
from tests import tiny
from tests.methods.driving import load, make_session, prefill, prompt
from tests.methods.unturned import library_states, rotation
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.rotary import TURNING, Rotary

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}
FOLDERS: dict[str, Callable[[], Path]] = {
    "llama": tiny.llama_folder,
    "llama, scaled": partial(tiny.llama_folder, "llama-yarn", rope_parameters=YARN),
    "mistral": tiny.mistral_folder,
    "qwen3": tiny.qwen3_folder,
    "gemma3_text": tiny.gemma3_folder,
    **{kind: partial(tiny.moe_folder, kind) for kind in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_queries_and_keys_come_back(name: str) -> None:
    folder, ids, seen = FOLDERS[name](), prompt(24), []
    session = make_session(folder, chunk_size=10)
    rotary = Rotary(session.family.backbone(session.model), name)

    def look(call: AttentionCall) -> None:
        at = call.forward.positions_at(call.layer)
        query, key = rotary.undo(call.query, at[:, None], call.layer), rotary.undo(call.keys, call.held.places(), call.layer)
        seen.append((call.layer, int(at[0, 0]), query[0].numpy(), key[0].numpy()))

    with session.hooked(session.observers, look):
        prefill(session, ids)
    expected = library_states(folder, ids)
    assert len(seen) == 2 * 3
    for layer, start, query, key in seen:
        np.testing.assert_allclose(query, expected[layer]["q"][:, start : start + query.shape[1]], atol=2e-5)
        np.testing.assert_allclose(key, expected[layer]["k"][:, : key.shape[1]], atol=2e-5)


def test_qwen2_is_known_too() -> None:
    from transformers import Qwen2Config, Qwen2Model

    shape = {k: v for k, v in tiny.LLAMA_SHAPE.items() if k != "head_dim"}
    backbone = Qwen2Model(Qwen2Config(**shape))
    rotary, x, at = Rotary(backbone, "qwen2"), torch.randn(1, 2, 5, 16), torch.arange(5)[None]
    cos, sin = backbone.rotary_emb(x, at)
    turned = x * cos + torch.cat((-x[..., 8:], x[..., :8]), -1) * sin
    torch.testing.assert_close(rotary.undo(turned, at[:, None], 0), x)
    assert set(TURNING) == {name.partition(",")[0] for name in FOLDERS} | {"qwen2"}


def test_ahead_is_the_mean_of_all_rotations() -> None:
    session, x = make_session(), torch.randn(2, 4, 3, 16, generator=torch.Generator().manual_seed(0))
    got = Rotary(session.family.backbone(session.model), "tiny").ahead(x, torch.tensor([9, 30]), 7, 1)
    for row, last in enumerate((9, 30)):
        turned = [x[row].double().numpy() @ rotation(last + i, 16).T for i in range(1, 8)]
        np.testing.assert_allclose(got[row].numpy(), np.mean(turned, 0), atol=1e-6)


def test_positions_may_differ_by_head() -> None:
    session, x = make_session(), torch.randn(2, 2, 5, 16)
    rotary = Rotary(session.family.backbone(session.model), "tiny")
    places = torch.tensor([[[0, 3, 4, 8, 9], [-1, -1, 2, 7, 9]], [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]])

    def alone(row: int, head: int) -> Tensor:
        return rotary.undo(x[row : row + 1, head : head + 1], places[row, head].view(1, 1, -1), 0)[0, 0]

    got = rotary.undo(x, places, 0)
    for row, head in np.ndindex(2, 2):
        torch.testing.assert_close(got[row, head], alone(row, head))


def test_the_models_own_module_is_left_alone() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = load(tiny.llama_folder("llama-dynamic", rope_parameters=dynamic, max_position_embeddings=64))
    before = model.model.rotary_emb.inv_freq.clone()
    Rotary(model.model, "tiny").ahead(torch.randn(1, 4, 1, 16), torch.tensor([60]), 40, 0)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_other_types_are_refused_in_one_sentence() -> None:
    session = make_session(tiny.gpt2_folder())
    with pytest.raises(
        Unavailable, match="some model is of type gpt2, whose rotary embedding cannot be taken back here; known: llama"
    ):
        Rotary(session.family.backbone(session.model), "some model")
