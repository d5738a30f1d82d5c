"""One process of the comparison with ``generate``: load, warm up, time, print one JSON line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
import typer

from studio_state.experiment import ExperimentSpec, WorkloadSpec
from workers.environment import pick_device, use_threads
from workers.host import ModelHost
from workers.session import Session
from workers.workloads.base import Item, ItemContext
from workers.workloads.registry import make_workload

REPEATS = 3  # the fastest of these counts: other processes only ever add time


def main(who: str, model: str, threads: int, prompt_tokens: int, new_tokens: int) -> None:
    """Time ``baseline`` (the studio's own loop) or ``generate`` (the library's), float32, greedy."""
    options = {"items": 1, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    spec = ExperimentSpec(model=model, workload=WorkloadSpec(id="speed", options=options), dtype="float32", threads=threads)
    session = _open(spec)
    item = make_workload(spec.workload).make_items(ItemContext(session.processor, 0, session.info.context))[0]
    decode = {"baseline": _studio, "generate": _library}[who]
    decode(session, item, 4)
    tokens: list[int] = []
    long, tokens = _fastest(lambda: decode(session, item, new_tokens))
    short, _ = _fastest(lambda: decode(session, item, 1))
    print(json.dumps({"tokens_per_s": (new_tokens - 1) / (long - short), "tokens": tokens}))


def _open(spec: ExperimentSpec) -> Session:
    host, device = ModelHost(), pick_device(spec.device)
    use_threads(spec.threads)
    info = host.inspect(spec)
    return host.open(spec, info, device)[0]


def _fastest(work: Callable[[], list[int]]) -> tuple[float, list[int]]:
    best, tokens = float("inf"), []  # type: float, list[int]
    for _ in range(REPEATS):
        start = time.perf_counter()
        tokens = work()
        best = min(best, time.perf_counter() - start)
    return best, tokens


def _studio(session: Session, item: Item, new: int) -> list[int]:
    with session.having(spec=session.spec.model_copy(update={"max_new_tokens": new})):
        trace = session.family.begin(session, [item])
        for _ in session.family.run(session, trace):
            pass
    return trace.results[0].token_ids


def _library(session: Session, item: Item, new: int) -> list[int]:
    model: Any = session.model
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([item.prompt_ids], device=session.device)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


if __name__ == "__main__":
    typer.run(main)
