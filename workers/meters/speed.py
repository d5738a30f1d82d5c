"""Speed of one run, from its step times."""

from __future__ import annotations

import numpy as np

from workers.families.base import RunTrace


def speed(trace: RunTrace) -> dict[str, float]:
    """Metrics of one run of one batch; tokens of all rows together.

    A step may bring several tokens (speculative decoding): its time is shared among them, so that
    latencies stay comparable.
    """
    if trace.items[0].task == "classify":
        seconds = sum(s.seconds for s in trace.steps)
        return {"images_per_s": len(trace.items) / seconds, "end_to_end_s": seconds}
    if trace.items[0].task == "draw":
        return drawing_speed(trace)
    prefill, later = trace.steps[0], trace.steps[1:]
    prompt = sum(len(r.prompt_ids) for r in trace.results)
    out = {
        "prompt_tokens": prompt / len(trace.results),
        "prefill_tokens_per_s": prompt / prefill.seconds,
        "end_to_end_s": prefill.seconds + sum(s.seconds for s in later),
    }
    if trace.items[0].task != "generate":
        scored, seconds = sum(len(ids) for s in later for ids in s.new), sum(s.seconds for s in later)
        if scored and seconds > 0:
            out["score_tokens_per_s"] = scored / seconds
        return out
    out["ttft_s"] = prefill.seconds
    out["new_tokens"] = sum(len(r.token_ids) for r in trace.results) / len(trace.results)
    made = sum(len(ids) for s in later for ids in s.new)
    seconds = sum(s.seconds for s in later)
    if made and seconds > 0:
        out["decode_tokens_per_s"] = made / seconds
        gaps = np.concatenate([np.full(n, s.seconds / n) for s in later if (n := max(map(len, s.new), default=0))])
        out["itl_p50_s"], out["itl_p90_s"] = (float(x) for x in np.percentile(gaps, (50, 90)))
        if gaps.size >= 100:
            out["itl_p99_s"] = float(np.percentile(gaps, 99))
    return out


def drawing_speed(trace: RunTrace) -> dict[str, float]:
    """Metrics of one batch of pictures: from what is asked for to the decoded picture, and of the denoising steps alone."""
    rows, total = len(trace.items), sum(s.seconds for s in trace.steps)
    steps = [s.seconds for s in trace.steps if s.kind == "step"]
    out = {"seconds_per_image": total / rows, "images_per_s": rows / total, "end_to_end_s": total}
    if steps:
        out["denoising_steps_per_s"] = rows * len(steps) / sum(steps)
    return out
