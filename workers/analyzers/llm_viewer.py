"""LLM-Viewer: what the roofline allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from studio_state.catalog import Card
from studio_state.costs import GROUPS, Work, total
from workers.analyzer import Analyzer, Measured
from workers.mechanisms.phases import ShortRun, library_runs_it
from workers.mechanisms.step_work import counting
from workers.meters.device_profile import device_profile
from workers.methods import card


class LLMViewer(Analyzer):
    """What the roofline of this device allows: operations and bytes of every kind of linear map and of attention.

    Yuan et al. 2024, arXiv:2402.16363, section 3. Operations and bytes are counted on the shapes that go through the model, not derived
    from its config, so that every family, cut caches, pruned and packed weights are counted as they are. The device's
    bandwidth and peak are measured. Norms, activations and look-ups are left out: they are the part that is neither.
    """

    card: ClassVar[Card] = card(
        id="llm-viewer",
        title="What the roofline allows",
        paper="arXiv:2402.16363",
        kind="analyzer",
        families=("llm", "vlm", "vit", "diffusion"),
    )

    def analyze(self, run: ShortRun) -> dict[str, Any]:
        """Work of one step in each phase, its least time on this device, and what limits it."""
        device, dtype = device_profile(run.session.device), str(run.session.dtype).removeprefix("torch.")
        found = {}
        with run.ready(library_runs_it), counting(run.session) as counted:
            for phase in run.phases:
                work: list[Work] = []

                def around(do: Any, into: list[Work] = work) -> None:
                    counted.take()
                    do()
                    into += counted.take()

                steps = max(1, run.each(phase, around))
                each = [scaled(w, 1 / steps) for w in work]
                groups = {g: total((w for w in each if w.group == g), g, g) for g in GROUPS}
                found[phase] = {
                    "operations": [
                        {
                            **w.model_dump(),
                            "bytes": w.bytes,
                            "intensity": w.intensity,
                            "seconds": w.seconds(device, dtype),
                            "bound": w.bound(device, dtype),
                        }
                        for w in sorted(each, key=lambda w: -w.seconds(device, dtype))
                    ],
                    "seconds": {
                        g: sum(w.seconds(device, dtype) for w in each if w.group == g) for g, w in groups.items() if w.flops
                    },
                }
        return {"phases": found, "device": device.model_dump(mode="json"), "dtype": dtype}

    def metrics(self, data: dict[str, Any]) -> Iterator[Measured]:
        """Least times, and how much of them memory limits."""
        for phase, found in data["phases"].items():
            start = "prefill_" if phase == "prefill" else ""
            least = sum(o["seconds"] for o in found["operations"])
            memory = sum(o["seconds"] for o in found["operations"] if o["bound"] == "memory")
            yield Measured(f"roofline_{start or 'decode_'}s", (least,), "estimated")
            if least:
                yield Measured(f"{start}memory_bound_share", (memory / least,), "estimated")


def scaled(work: Work, factor: float) -> Work:
    """A share of some work."""
    numbers = {n: getattr(work, n) * factor for n in ("flops", "weight_bytes", "kv_bytes", "activation_bytes")}
    return work.model_copy(update=numbers)
