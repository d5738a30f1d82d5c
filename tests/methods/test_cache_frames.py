"""The cache under the microscope: bits against the positions that the cache really holds, and what is said of them."""

from __future__ import annotations

import base64

import numpy as np

from app.race_cache import bits, summary
from studio_state.events import CacheFrame, CacheMap
from tests.methods.driving import attached, generate, make_session, prefill, prompt
from workers.families.cache_frames import frames_of, is_moment
from workers.policies.kv.adakv import AdaKV
from workers.policies.kv.snapkv import SnapKV


def test_every_bit_is_a_position_that_its_head_holds() -> None:
    session, prompts = make_session(), [prompt(40), prompt(23, seed=1)]
    with attached(session, AdaKV(keep=0.3, window=4)):
        state = prefill(session, *prompts)
    for row, frame in enumerate(frames_of(state, [40, 23], 1)):
        found = bits(frame, sum(layer.heads for layer in state.cache.layers))
        at = 0
        for layer in state.cache.layers:
            places = layer.held().places().expand(2, layer.heads, -1)[row]
            for head in places:
                assert set(np.flatnonzero(found[at])) == {int(p) for p in head if p >= 0}
                at += 1


def test_nothing_is_told_of_a_whole_cache_and_moments_follow_the_answer() -> None:
    session = make_session()
    assert generate(session, [prompt(40)], new=16).frames == []
    with attached(session, SnapKV(keep=0.3, window=4)):
        trace = generate(session, [prompt(40)], new=16)
    assert [(f.after, f.positions) for f in trace.frames[0]] == [(1, 40), (4, 43), (8, 47), (12, 51), (16, 55)]
    assert trace.heads == [2, 2]
    assert [n for n in range(1, 17) if is_moment(n, 16)] == [4, 8, 12, 16]


def test_the_summary_says_what_became_of_the_needle() -> None:
    held = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    packed = base64.b64encode(np.packbits(held, axis=1).tobytes()).decode()
    told = CacheMap(
        lane=1, item="i", heads=[1, 1], frames=[CacheFrame(after=8, positions=4, held=packed)], marked=[1, 3], image=[]
    )
    assert (bits(told.frames[0], 2) == held).all()
    before = "After 8 new tokens the heads hold 62 % of 4 positions; 1 of them no head holds any more. "
    after = "tokens 2 to 3: 0 of 2 heads hold all of it, 1 of its 2 tokens is gone from every head; the answer is wrong."
    assert summary(told, [], False) == f"{before}The needle is {after}"  # its words are not known
    assert summary(told, ["Is", " it", " 47", "?"], False) == f"{before}The needle, “it 47”, is {after}"
