"""The cost engine: operations, bytes and the roofline of a device. Pure arithmetic on numbers that somebody counted or measured.

Yuan et al. 2024 (LLM-Viewer), arXiv:2402.16363, section 3: an operation with F operations and B bytes moved takes
max(F / peak, B / bandwidth) seconds on a device; it is bound by memory where F / B is less than peak / bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Group = Literal["maps", "attention", "rest"]
GROUPS: dict[Group, str] = {
    "maps": "linear maps",
    "attention": "attention over the cache",
    "rest": "everything else",
}


class Device(BaseModel):
    """What a device can do at best.

    Attributes:
        bandwidth: bytes a second between memory and processor.
        peak: operations a second (a multiply-add counts as two), by number format.
        source: ``measured`` on this machine, or ``published`` by its maker.
        threads: CPU threads that the measurement used; None elsewhere.
        calibrated: day of a calibration (``2026-01-31``); empty where it was only measured in passing.
        reference: what a published profile is taken from.
        busy: other programs ran while it was measured, so the device can do more.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    bandwidth: float = Field(gt=0)
    peak: dict[str, float] = Field(min_length=1)
    source: Literal["measured", "published"] = "published"
    threads: int | None = None
    calibrated: str = ""
    reference: str = ""
    busy: bool = False

    def best(self, dtype: str) -> float:
        """Peak of a number format; of one that is not listed the highest that is, integers aside."""
        floats = [v for k, v in self.peak.items() if not k.startswith("int")]
        return self.peak.get(dtype, max(floats or self.peak.values()))

    @property
    def origin(self) -> str:
        """Where the numbers come from, in words."""
        if self.source == "published":
            return f"published ({self.reference})" if self.reference else "published"
        threads = f" on {self.threads} thread{'s' * (self.threads != 1)}" if self.threads else ""
        beside = " while other programs ran" if self.busy else ""
        if self.calibrated:
            return f"calibrated here on {self.calibrated}{threads}{beside}"
        return f"measured here in passing{threads}{beside}; `pareto-studio calibrate` measures longer"

    def ridge(self, dtype: str) -> float:
        """Operations a byte at which both limits are reached together."""
        return self.best(dtype) / self.bandwidth


class Work(BaseModel):
    """What some operations of one step do.

    Attributes:
        name: of the operation, or of the group.
        flops: operations, a multiply-add counted as two.
        weight_bytes, kv_bytes, activation_bytes: read or written once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    group: Group = "maps"
    flops: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """All that is moved."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    def seconds(self, device: Device, dtype: str) -> float:
        """The least time that the roofline allows."""
        return max(self.flops / device.best(dtype), self.bytes / device.bandwidth)

    def bound(self, device: Device, dtype: str) -> Literal["memory", "compute"]:
        """What limits it."""
        return "memory" if self.intensity < device.ridge(dtype) else "compute"


def total(work: Iterable[Work], name: str, group: Group) -> Work:
    """Several operations as one."""
    some = list(work)
    return Work(
        name=name,
        group=group,
        flops=sum(w.flops for w in some),
        weight_bytes=sum(w.weight_bytes for w in some),
        kv_bytes=sum(w.kv_bytes for w in some),
        activation_bytes=sum(w.activation_bytes for w in some),
    )


def amdahl(share: float) -> float:
    """The most that a step can gain if a share of its time (0..1) took no time at all; infinite where that is all of it."""
    return 1 / (1 - share) if share < 1 else float("inf")


def predicted_gain(before: Mapping[Group, float], share_before: Mapping[Group, float], after: Mapping[Group, float]) -> float:
    """Speed-up if each group's time shrinks as its roofline time does and the rest stays as it is.

    Args:
        before, after: roofline seconds of each group, of the reference and of the lane.
        share_before: measured share of the reference's step that each group takes.
    """
    left = 1.0
    for group, share in share_before.items():
        if before.get(group) and group in after:
            left += share * (after[group] / before[group] - 1)
    return 1 / left if left > 0 else float("inf")
