"""Whether the roofline predicts: its order of some settings against the measured one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import torch
from scipy.stats import kendalltau

from studio_state.catalog import Card
from studio_state.costs import Device
from workers.analyzer import Analyzer, Measured
from workers.cards import knob
from workers.mechanisms.phases import NEW_TOKENS, ShortRun, library_runs_it
from workers.mechanisms.step_work import counting
from workers.meters.device_profile import device_profile
from workers.methods import card
from workers.workloads.base import Item


class RooflineOrder(Analyzer):
    """Whether the roofline predicts which of six settings decodes faster: three batches, each with a short and a long context.

    Yuan et al. 2024, arXiv:2402.16363, predict times from operations and bytes. Here random prompts of both lengths are read in
    batches of 1, 4 and 16; of the steps after them one is counted and the others are timed. Told are Kendall's tau between
    predicted and measured times, and the largest share of the allowed speed that was reached. Policies that run other code
    than the library's modules stay out.
    """

    card: ClassVar[Card] = card(
        id="roofline-order",
        title="Does the roofline predict?",
        paper="arXiv:2402.16363",
        kind="analyzer",
        families=("llm",),
    )
    short: int = knob(64, ge=1, le=4096, help="tokens of the short context")
    long: int = knob(512, ge=2, le=32768, help="tokens of the long context; higher = further apart, slower")
    timed: int = knob(3, ge=1, le=NEW_TOKENS - 2, help="timed steps of each setting; more = steadier")

    def analyze(self, run: ShortRun) -> dict[str, Any]:
        """Predicted seconds of a step, and measured ones, of every setting."""
        device, dtype = device_profile(run.session.device), str(run.session.dtype).removeprefix("torch.")
        settings = []
        with run.ready(library_runs_it):
            for batch in (1, 4, 16):
                for length in (self.short, self.long):
                    predicted, seconds = self._one(run, batch, length, device, dtype)
                    settings.append({"batch": batch, "length": length, "predicted": predicted, "seconds": seconds})
        return {"settings": settings, "device": device.model_dump(mode="json"), "dtype": dtype}

    def _one(self, run: ShortRun, batch: int, length: int, device: Device, dtype: str) -> tuple[float, list[float]]:
        draw = torch.Generator().manual_seed(run.session.spec.seed)
        ids = torch.randint(1, run.session.info.vocab, (batch, length), generator=draw).tolist()
        items = [Item(id=f"r{i}", prompt_ids=tuple(row)) for i, row in enumerate(ids)]
        steps = replace(run, items=items).steps()
        next(steps)  # the prompt
        with counting(run.session) as counted:
            next(steps)
        predicted = sum(w.seconds(device, dtype) for w in counted.take())
        seconds = [step.seconds for step in islice(steps, self.timed)]
        steps.close()  # type: ignore[attr-defined]
        return predicted, seconds

    def metrics(self, data: dict[str, Any]) -> Iterator[Measured]:
        """One value a timed step of all settings."""
        predicted = [s["predicted"] for s in data["settings"]]
        passes = list(zip(*(s["seconds"] for s in data["settings"]), strict=True))
        yield Measured("roofline_order", tuple(float(kendalltau(predicted, x).statistic) for x in passes))
        yield Measured("roofline_reached", tuple(max(p / s for p, s in zip(predicted, x, strict=True)) for x in passes))
