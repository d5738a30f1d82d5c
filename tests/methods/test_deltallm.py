"""DeltaLLM against an attention function of its own that the library runs over the whole text, one key after the other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from tests import tiny
from tests.methods.driving import forced, generate, library_model, make_session, prefill, prompt, tokens
from workers.mechanisms.reference_keys import follow
from workers.policies.kv.deltallm import DeltaLLM

ORACLE = "delta-oracle"
Array = NDArray[np.float64]


class Oracle:
    """What the attention function below is asked for and what it counted."""

    alpha = 0.5
    window = 8
    sinks = 2
    prompt = 40
    needed = 0
    taken = 0


def references(keys: Array, limit: float) -> tuple[Array, list[int]]:
    """Reference key behind each key [L, D] of a head, and how many numbers changed, by plain loops."""
    found, changed = [], []
    reference = keys[0].copy()
    for place, key in enumerate(keys):
        change = [place < max(1, Oracle.sinks) or abs(k - r) >= limit for k, r in zip(key, reference, strict=True)]
        reference = np.array([k if c else r for k, r, c in zip(key, reference, change, strict=True)])
        found.append(reference)
        changed.append(sum(change))
    return np.stack(found), changed


def delta_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any) -> Any:
    """Attention of one row over a whole text: exact keys inside the window, references outside; counts as it goes."""
    q, k, v = (x[0].double().numpy() for x in (query, key, value))
    length, width = k.shape[1:]
    out = np.zeros_like(q)
    for head in range(len(q)):
        own, values = k[head // (len(q) // len(k))], v[head // (len(q) // len(k))]
        limit = Oracle.alpha * np.sqrt((own[: Oracle.prompt] ** 2).mean())
        older, changed = references(own, limit)
        for i in range(length):
            near = [i - j < Oracle.window for j in range(i + 1)]
            seen = np.array([own[j] if near[j] else older[j] for j in range(i + 1)])
            logits = seen @ q[head, i] * scaling
            chances = np.exp(logits - logits.max())
            out[head, i] = chances / chances.sum() @ values[: i + 1]
            Oracle.needed += (i + 1) * width
            Oracle.taken += sum(width if n else changed[j] for j, n in enumerate(near))
    return torch.tensor(out, dtype=query.dtype).transpose(0, 1)[None], None


@cache
def oracle_model() -> Any:
    AttentionInterface.register(ORACLE, delta_attention)
    return AutoModelForCausalLM.from_pretrained(tiny.llama_folder(), dtype=torch.float32, attn_implementation=ORACLE).eval()


def over_the_whole_text(ids: Sequence[int]) -> Tensor:
    """Log-probabilities [L, V] behind every token."""
    Oracle.needed = Oracle.taken = 0
    with torch.inference_mode():
        logits: Tensor = oracle_model()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("more", [1, 2, 18])
def test_prompt_and_answer_equal_one_pass_over_the_whole_text(more: int, sinks: int) -> None:
    """More tokens than a chunk of the decode path, one alone, and two, one of which comes from the prompt."""
    session, ids, later = make_session(), prompt(40), prompt(more, seed=7)
    Oracle.sinks = sinks
    with DeltaLLM(alpha=0.5, window=8, sinks=sinks).attach(session):
        got = forced(session, ids, later)
    expected = over_the_whole_text([*ids, *later[:-1]])[39:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert session.counts["skipped_macs"] == pytest.approx(1 - Oracle.taken / Oracle.needed, abs=1e-6)
    assert session.counts["skipped_macs"] > 0.1


def test_single_steps_equal_chunks() -> None:
    session, ids, later = make_session(), prompt(40), prompt(12, seed=7)
    with DeltaLLM(window=4, sinks=1).attach(session), torch.inference_mode():
        together = forced(session, ids, later)
        counted = session.counts["skipped_macs"]
        session.counts.clear()
        state = prefill(session, ids)
        rows = [state.logits[0], *(session.family.step(session, state, torch.tensor([[t]]))[0, 0] for t in later[:-1])]
    torch.testing.assert_close(torch.stack(rows).log_softmax(-1), together, rtol=1e-5, atol=1e-5)
    assert session.counts["skipped_macs"] == pytest.approx(counted)


@pytest.mark.parametrize("knobs", [{"window": 64}, {"alpha": 1e-12, "window": 1, "sinks": 0}])
def test_a_window_over_everything_and_a_threshold_of_nothing_change_nothing(knobs: dict[str, float]) -> None:
    session, ids, later = make_session(), prompt(40), prompt(12, seed=7)
    expected = forced(session, ids, later)
    with DeltaLLM(**knobs).attach(session):
        got = forced(session, ids, later)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert session.counts["skipped_macs"] == 0
    assert "deltallm" not in session.acted


def test_references_by_hand() -> None:
    keys = torch.tensor([[0.0, 5.0], [0.4, 5.0], [0.6, 4.0], [1.2, 4.4], [1.3, 4.5]])
    whole = torch.tensor([True, False, False, False, False])
    found, changed = follow(keys[None, None], whole[None, None], torch.tensor([[0.5]]), 0, 5)
    assert found[0, 0].tolist() == torch.tensor([[0.0, 5.0], [0.0, 5.0], [0.6, 4.0], [1.2, 4.0], [1.2, 4.5]]).tolist()
    assert changed[0, 0].tolist() == [2, 0, 2, 1, 1]
    rest, _ = follow(torch.cat((found[:, :, :3], keys[None, None, 3:]), 2), whole[None, None], torch.tensor([[0.5]]), 3, 5)
    assert torch.equal(rest, found[:, :, 3:])
    query, deltas = torch.tensor([2.0, -1.0]), found[0, 0].diff(dim=0, prepend=torch.zeros(1, 2))
    torch.testing.assert_close((deltas @ query).cumsum(0), found[0, 0] @ query)  # what the multiply-adds that are left add up to
    assert int((deltas != 0).sum()) <= int(changed.sum())


def test_older_keys_stay_within_the_threshold_and_bytes_stay_the_same() -> None:
    session, ids, library = make_session(), prompt(60), DynamicCache()
    plain = generate(session, [ids], new=5)
    with torch.inference_mode():
        library_model(tiny.llama_folder(), "sdpa")(input_ids=torch.tensor([ids]), past_key_values=library)
    with DeltaLLM(alpha=0.5, window=8, sinks=2).attach(session):
        stored = prefill(session, ids).cache.layers[0].held().keys  # keys of the first layer do not depend on attention
        trace = generate(session, [ids], new=5)
    keys = library.layers[0].keys
    apart, limit = (stored - keys).abs(), 0.5 * keys.square().mean((2, 3), keepdim=True).sqrt()
    assert bool((apart < limit + 1e-5).all())
    assert bool((apart[:, :, 2:53].amax((2, 3)) > 0.4 * limit[..., 0, 0]).all())
    assert float(apart[:, :, :2].max()) < 1e-5  # sinks
    assert float(apart[:, :, 53:].max()) < 1e-5  # those that the next query sees as they are
    assert {n: trace.counts[n] for n in ("kv_bytes", "prefill_kv_bytes")} == {
        n: plain.counts[n] for n in ("kv_bytes", "prefill_kv_bytes")
    }


def test_rows_of_a_padded_batch_equal_single_runs() -> None:
    session, rows = make_session(), [prompt(50), prompt(31, seed=1), prompt(9, seed=2)]
    with DeltaLLM(alpha=0.5, window=8).attach(session):
        together = generate(session, rows, new=6)
        alone = [generate(session, [row], new=6) for row in rows]
    assert tokens(together) == [tokens(x)[0] for x in alone]
    pairs = [sum(n + i + 1 for i in range(5)) + n * (n + 1) / 2 for n in (50, 31, 9)]  # of queries and keys, in every head
    skipped = sum(p * x.counts["skipped_macs"] for p, x in zip(pairs, alone, strict=True)) / sum(pairs)
    assert together.counts["skipped_macs"] == pytest.approx(skipped, abs=1e-6)
