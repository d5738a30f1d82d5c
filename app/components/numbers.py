"""How numbers are written, once, for every chart, table and column of the screen."""

from __future__ import annotations

import math
from typing import NamedTuple

from studio_state.metrics import METRICS

SHARES = frozenset(
    {
        "accuracy",
        "top1_agreement",
        "same_output",
        "class_agreement",
        "zero_weights",
        "quantized_kv_share",
        "unread_kv_share",
        "skipped_macs",
        "skipped_inputs",
    }
)
NO_VALUE = "–"
WIDEST_INTERVAL = 100.0  # upper over lower end of what is shown in digits
TITLES = {
    "load_s": "Loading",
    "build_s": "Building",
    "warmup_s": "Warm-up",
    "ttft_s": "Time to first token",
    "prefill_tokens_per_s": "Prefill speed",
    "decode_tokens_per_s": "Decode speed",
    "score_tokens_per_s": "Scoring speed",
    "images_per_s": "Image speed",
    "seconds_per_image": "Time per picture",
    "denoising_steps_per_s": "Denoising speed",
    "encode_s": "Encoding images",
    "visual_tokens": "Image tokens",
    "end_to_end_s": "End to end",
    "itl_p50_s": "Inter-token latency, median",
    "itl_p90_s": "Inter-token latency, p90",
    "itl_p99_s": "Inter-token latency, p99",
    "nll": "Negative log-likelihood",
    "kl_to_baseline": "KL to baseline",
    "top1_agreement": "Same top token as baseline",
    "same_output": "Same output as baseline",
    "first_divergence": "First differing token",
    "psnr": "PSNR to baseline",
    "ssim": "SSIM to baseline",
    "class_agreement": "Seen as asked for",
    "frechet_distance": "Fréchet distance",
    "frechet_noise": "Fréchet distance of real pictures",
    "kv_bytes": "KV cache",
    "prefill_kv_bytes": "KV cache after prefill",
    "weight_bytes": "Weights",
    "theoretical_weight_bytes": "Weights by their bits",
    "scale_bytes": "Scales of weights",
    "padding_bytes": "Padding of weights",
    "mean_bits": "Bits a weight",
    "peak_memory_bytes": "Peak memory",
    "peak_activation_bytes": "Peak activations",
    "worker_rss_bytes": "Worker process",
    "p_value": "p-value against the reference",
    "quantized_kv_share": "KV cache in few bits",
    "unread_kv_share": "KV cache left unread",
    "skipped_macs": "Multiply-adds not needed",
    "skipped_inputs": "Inputs left out",
    "kept_prompt_tokens": "Prompt tokens kept",
    "denoiser_calls": "Runs of the denoiser",
    "cache_hits": "Steps that reused work",
}


class Quantity(NamedTuple):
    """A number as text and its unit, apart, so that columns can align them."""

    text: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.unit}".strip()


def digits(value: float, significant: int = 3) -> str:
    """A plain decimal with this many significant digits; thousands get a comma, never an exponent."""
    if not math.isfinite(value):
        return NO_VALUE
    if value == 0:
        return "0"
    power = int(f"{value:.{significant - 1}e}".partition("e")[2])  # after rounding: 0.9997 is 1.00, not 1.000
    places = max(0, significant - 1 - power)
    text = f"{value:,.{min(places, 9)}f}"
    if text.strip("-0.,") == "":
        return "0"
    return text


def byte_quantity(value: float) -> Quantity:
    """Bytes in B, kB, MB, GB or TB (powers of 1000)."""
    size, unit = abs(value), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return Quantity(digits(math.copysign(size, value)) if unit != "B" else f"{value:.0f}", unit)


def seconds_quantity(value: float) -> Quantity:
    """Seconds as µs, ms, s, or minutes and seconds."""
    size = abs(value)
    if size < 0.9995e-3 and value:
        return Quantity(digits(value * 1e6), "µs")
    if size < 0.9995 and value:
        return Quantity(digits(value * 1e3), "ms")
    if size < 119.5:
        return Quantity(digits(value), "s")
    return Quantity(clock(value))


def clock(seconds: float) -> str:
    """A duration for people: ``8 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def metric_quantity(name: str, value: float | None) -> Quantity:
    """The value of a metric in the unit that reads best.

    Args:
        name: a key of ``METRICS``; other names are written as plain numbers.
    """
    if value is None or not math.isfinite(value):
        return Quantity(NO_VALUE)
    info = METRICS.get(name)
    if name in SHARES:
        return Quantity(digits(100 * value), "%")
    if info is None or not info.unit:
        return Quantity(digits(value))
    if info.unit == "bytes":
        return byte_quantity(value)
    if info.unit == "s":
        return seconds_quantity(value)
    if info.unit in ("tokens", "passes", "modules", "steps", "calls", "hits"):
        return Quantity(f"{value:,.0f}" if float(value).is_integer() else digits(value, 4), info.unit)
    return Quantity(digits(value), info.unit)


def ratio_text(value: float | None) -> str:
    """A ratio such as ``1.34×``; two decimals up to 10, so that columns of ratios compare."""
    if value is None or not math.isfinite(value):
        return NO_VALUE
    return f"{value:.2f}×" if 0.095 <= abs(value) < 9.995 else f"{digits(value)}×"


def interval_text(low: float | None, high: float | None) -> str:
    """An interval of a ratio: ``1.31 to 1.37``; empty where there is none.

    With two or three noisy pairs an interval may span a factor of a million; such digits say nothing, so words do.
    """
    if low is None or high is None:
        return ""
    if low > 0 and high / low > WIDEST_INTERVAL:
        return "too few items to tell"
    return f"{ratio_text(low)[:-1]} to {ratio_text(high)[:-1]}"


def metric_title(name: str) -> str:
    """The name shown for a metric; the metric's own name in words where none is given."""
    return TITLES.get(name, name.replace("_", " ").capitalize())
