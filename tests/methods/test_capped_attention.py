"""Models that cap the logits of their attention (Gemma 2): what the model attends to, and what policies see of it."""

from __future__ import annotations

import numpy as np
import torch

from tests import tiny
from tests.methods.calling import best, kept, library_maps
from tests.methods.driving import attached, library_model, make_session, prefill, prompt
from workers.mechanisms.gathered_attention import SUMS
from workers.policies.kv.h2o import H2O
from workers.policies.kv.tova import TOVA


def test_the_prefill_is_the_librarys() -> None:
    folder, ids = tiny.gemma2_folder(), prompt(40)
    with torch.inference_mode():
        expected = library_model(folder, "eager")(input_ids=torch.tensor([ids])).logits[:, -1]
    torch.testing.assert_close(prefill(make_session(folder), ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_sums_and_choices_follow_the_capped_attention() -> None:
    folder, ids = tiny.gemma2_folder(), prompt(40)
    maps = library_maps(folder, ids)
    session = make_session(folder)
    with attached(session, H2O(keep=0.9, when="decode")):
        state = prefill(session, ids)
    for layer, own in zip(state.cache.layers, maps, strict=True):
        sums = own.sum(1).reshape(2, 2, -1).mean(1)
        np.testing.assert_allclose(layer.group.tracked[SUMS][0].numpy(), sums, rtol=1e-4, atol=1e-5)
    with attached(session, TOVA(keep=0.25)):
        found = kept(prefill(session, ids))
    for places, own in zip(found, maps, strict=True):
        assert np.array_equal(places, [best(own[:, -1].mean(0), 10)] * 2)
