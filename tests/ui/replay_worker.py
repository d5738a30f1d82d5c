"""A worker that speaks the real line protocol but plays an experiment from a small script, quickly and the same each time.

It lets the page be tested for what it shows without loading a model. Journeys on the real worker lie elsewhere.
The workload option ``items`` and ``max_new_tokens`` set its length; ``seed`` = 13 makes it die, 14 makes it hang.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

STEP_S = float(os.environ.get("REPLAY_STEP_S", "0.01"))
INFO = {
    "name": "smollm2-135m", "title": "SmolLM2 135M Instruct", "family": "llm", "architecture": "LlamaForCausalLM",
    "traits": ["gqa", "tied-embeddings", "4-bit-source"], "licence": "Apache-2.0", "source": "replay", "parameters": 134_515_008,
    "stored_bytes": 541_614_528, "layers": 30, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152,
    "context": 8192, "note": "The weights come from a 4-bit (Q4_1) file.",
}  # fmt: skip
ESTIMATE = {
    "weight_bytes": 538_060_032,
    "kv_bytes": 11_796_480,
    "activation_bytes": 30_000_000,
    "free_bytes": 6_000_000_000,
    "device": "cpu",
}
PROMPT = [
    "The",
    "old",
    "lighthouse",
    "keeper",
    "wrote",
    "that",
    "the",
    "secret",
    "number",
    "for",
    "Lisbon",
    "is",
    "4711",
    "and",
    "then",
    "closed",
    "the",
    "heavy",
    "book",
    ".",
    "What",
    "is",
    "the",
    "secret",
    "number",
    "for",
    "Lisbon",
    "?",
]
ANSWER = [
    "The",
    "secret",
    "number",
    "for",
    "Lisbon",
    "is",
    "4711",
    ",",
    "as",
    "the",
    "keeper",
    "of",
    "the",
    "lighthouse",
    "wrote",
    "in",
    "his",
    "book",
    "before",
    "he",
    "closed",
    "it",
    "for",
    "the",
    "night",
    ".",
]
BASE = {"decode_tokens_per_s": 30.0, "ttft_s": 0.21, "prefill_tokens_per_s": 1210.0, "kv_bytes": 11_796_480.0}
WEIGHTS, PEAK = 538_060_032.0, 601_000_000.0


class Replay:
    """One device that pretends."""

    def __init__(self) -> None:
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[str] = set()

    def say(self, experiment: str, event: str, **fields: Any) -> None:
        """One event line; the dispatcher numbers it."""
        print(json.dumps({"event": event, "experiment": experiment, "seq": -1, "t": time.time(), **fields}), flush=True)

    def read(self) -> None:
        """Take requests; a cancel is heeded at once."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "cancel":
                self.cancelled.add(request["experiment"])
            else:
                self.requests.put(request)
        self.requests.put({"op": "shutdown"})

    def loop(self) -> None:
        """Serve until told to leave."""
        self.say("", "hello", device="cpu", environment={"replay": True}, unavailable={}, free_bytes=6_000_000_000)
        threading.Thread(target=self.read, daemon=True).start()
        while (request := self.requests.get())["op"] != "shutdown":
            if request["op"] == "run":
                self.run(request["experiment"], request["spec"])
            elif request["op"] == "unload":
                self.say(request.get("request", ""), "note", text="the model was unloaded; its memory is free again")
            elif request["op"] == "inspect":
                self.inspect(request["request"], str(request["model"]))

    def inspect(self, name: str, model: str) -> None:
        """What a model is."""
        if model.startswith("nobody/"):
            self.say(
                name,
                "failed",
                message=f"model {model!r} is not in the cache and the Hub cannot be reached; check the name",
                phase="inspect",
            )
            return
        other = {"family": "vlm", "title": "A vision model"} if "vlm" in model else {}
        other = {"family": "diffusion", "title": "Clothes from noise", "traits": ["dit"]} if "diffusion" in model else other
        self.say(name, "model", info={**INFO, "name": model, **other}, estimate=ESTIMATE, fits_baseline=True)

    def draw(self, name: str, lanes: int, items: int) -> None:
        """Play the constructed recording of pictures, a pause before every look at one."""
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.ui import drawn

        for event in (*drawn.playing(lanes), *drawn.race(items)):
            if name in self.cancelled:
                self.say(name, "cancelled", message="cancelled")
                return
            if getattr(event, "lane", 0) < lanes:
                fields = event.model_dump(exclude={"event", "experiment", "seq", "t"})
                time.sleep(STEP_S if event.event == "preview" else 0)
                self.say(name, event.event, **fields)

    def run(self, name: str, spec: dict[str, Any]) -> None:
        """Play all lanes over all items, interleaved."""
        if spec["workload"]["id"] == "generate-images":
            return self.draw(name, len(spec["lanes"]), int(spec["workload"]["options"].get("items", 2)))
        lanes, items = spec["lanes"], int(spec["workload"]["options"].get("items", 2))
        self.say(name, "started", environment={"replay": True})
        self.say(name, "model", info=INFO, estimate=ESTIMATE, fits_baseline=True)
        self.say(name, "phase", name="load", done=0.5, text="")
        if spec["seed"] == 13:
            os.kill(os.getpid(), 9)
        if spec["seed"] == 14:
            time.sleep(600)
        for lane, pipeline in enumerate(lanes):
            self.say(
                name, "lane", lane=lane, order=" → ".join(s["policy"] for s in pipeline["steps"]) or "baseline", interleaved=True
            )
        for index in range(items):
            for turn in range(len(lanes)):
                lane = (index + turn) % len(lanes)
                if not self.item(name, spec, lane, index, items):
                    return self.say(name, "cancelled", message="cancelled")
            self.ratios(name, len(lanes), index + 1)
        for lane in range(len(lanes)):
            self.summary(name, lane, items)
            self.say(name, "lane_finished", lane=lane, status="finished", flags=[])
        return self.say(name, "finished", seconds=1.0)

    def item(self, name: str, spec: dict[str, Any], lane: int, index: int, of: int) -> bool:
        """One item of one lane; False once cancelled."""
        item, factor = f"item-{index}", 1 + 0.4 * lane
        self.say(name, "phase", name="run", lane=lane, done=index / of)
        self.say(
            name, "item", lane=lane, item=item, index=index, of=of, prompt=" ".join(PROMPT), pieces=[w + " " for w in PROMPT]
        )
        if lane:
            share = [1.0 if i < 3 or i > 20 else [0.0, 0.33, 1.0][(i + lane) % 3] for i in range(len(PROMPT))]
            self.say(name, "kept", lane=lane, item=item, share=share, layers=[])
        words = list(ANSWER)
        if lane:
            words[12:14] = ["man", "in"]
        for i, word in enumerate(words[: spec["max_new_tokens"] or len(words)]):
            if name in self.cancelled:
                return False
            time.sleep(STEP_S)
            self.say(
                name, "tokens", lane=lane, item=item, ids=[hash_of(word)], text=word + " ", at=[0.21 / factor + i / (30 * factor)]
            )
        for metric, value in BASE.items():
            change = factor if metric.endswith("per_s") else 1 / factor
            self.say(name, "metric", lane=lane, name=metric, value=value * change * (1 + 0.01 * (index % 3)), item=item)
        self.say(name, "metric", lane=lane, name="accuracy", value=float(lane == 0 or index % 2 == 0), item=item)
        self.say(
            name,
            "output",
            lane=lane,
            item=item,
            kind="text",
            text=" ".join(words),
            expected="4711",
            correct=lane == 0 or index % 2 == 0,
        )
        return True

    def ratios(self, name: str, lanes: int, n: int) -> None:
        """Ratios of every lane to the baseline after n items."""
        for lane in range(1, lanes):
            factor = 1 + 0.4 * lane
            for metric, value in (("decode_tokens_per_s", factor), ("ttft_s", 1 / factor), ("kv_bytes", 1 / factor)):
                width = 0.1 / n
                self.say(
                    name, "ratio", lane=lane, name=metric, value=value, low=value * (1 - width), high=value * (1 + width), n=n
                )

    def summary(self, name: str, lane: int, n: int) -> None:
        """What is known only at the end."""
        factor = 1 + 0.4 * lane
        for metric, value in (("weight_bytes", WEIGHTS), ("peak_memory_bytes", PEAK / factor)):
            self.say(name, "metric", lane=lane, name=metric, value=value, n=n)
        if lane:
            self.say(name, "metric", lane=lane, name="kl_to_baseline", value=0.0123, n=n)
            self.say(name, "metric", lane=lane, name="top1_agreement", value=0.964, n=n)


def hash_of(word: str) -> int:
    """A token id that is the same in every process."""
    return sum(ord(c) * 31**i for i, c in enumerate(word)) % 49152


if __name__ == "__main__":
    Replay().loop()
