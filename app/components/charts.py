"""Charts as pure functions: a DataFrame in, a Vega-Lite specification out.

Colours of text and axes are set by the browser, so that one specification serves light and dark. Field names are
fixed words; what people wrote appears in data values only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd

from app.components.numbers import SHARES, metric_title
from studio_state.metrics import METRICS

Spec = dict[str, Any]
HEIGHT = 320
NAMED_POINTS = 14  # with more, names overlap; the table has them
_SCALES = {"bytes": (1e6, "MB"), "s": (1e3, "ms")}
INK, QUIET = "var(--ps-ink)", "var(--ps-quiet)"


@dataclass(frozen=True)
class Band:
    """Where the baseline may lie by chance: a range of x, a range of y, and from how many items."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    n: int = 0

    def holds(self, x: float, y: float) -> bool:
        """True if a point lies inside in both directions."""
        return self.x_low <= x <= self.x_high and self.y_low <= y <= self.y_high


def scaled(name: str) -> tuple[float, str]:
    """(factor, axis title) of a metric: bytes in MB, seconds in ms, shares in percent; the arrow shows which way is better."""
    info = METRICS[name]
    way = {"higher": " → better", "lower": "← better "}.get(info.better, "")
    if name in SHARES:
        factor, unit = 100.0, "%"
    elif info.unit == "bytes":
        factor, unit = 1 / _SCALES["bytes"][0], "MB"
    elif info.unit == "s":
        factor, unit = _SCALES["s"][0], "ms"
    else:
        factor, unit = 1.0, info.unit
    title = f"{metric_title(name)}, {unit}" if unit else metric_title(name)
    return factor, (f"{way}· {title}" if info.better == "lower" else f"{title} ·{way}") if way else title


def _y_axis(name: str) -> alt.Axis:
    """The title lies above the axis, in reading direction."""
    return alt.Axis(title=scaled(name)[1], titleAngle=0, titleAlign="left", titleAnchor="end", titleX=-36, titleY=-12)


def _specification(chart: Any, height: int = HEIGHT) -> Spec:
    spec: Spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)  # the browser gives it, by theme
    return spec


def pareto_chart(frame: pd.DataFrame, x: str, y: str, band: Band | None) -> Spec:
    """Points of :func:`app.compare_pareto.pareto_frame`, those with ``dim`` dimmed, the front as a line, the baseline's noise as a band.

    The parameter ``chosen`` is the id of the run that is ringed; a datum's ``run`` is its id.
    """
    kx, ky = scaled(x)[0], scaled(y)[0]
    data = frame.assign(x=frame["x"] * kx, y=frame["y"] * ky).drop(columns=["group"])
    xs = alt.X("x:Q", title=scaled(x)[1], axis=alt.Axis(tickCount=8), scale=alt.Scale(zero=False, nice=False, padding=28))
    ys = alt.Y("y:Q", axis=_y_axis(y), scale=alt.Scale(zero=False, nice=False, padding=22))
    tip = [
        alt.Tooltip("name:N", title="Run"),
        alt.Tooltip("x:Q", title=metric_title(x), format=".4~g"),
        alt.Tooltip("y:Q", title=metric_title(y), format=".4~g"),
    ]
    chosen = alt.param(name="chosen", value="")
    base = alt.Chart(data).encode(x=xs, y=ys)
    layers = [*_band_layers(band, kx, ky)]
    front = data[~data["dominated"]].sort_values(["x", "y"])
    if len(front) > 1 and not front["baseline"].all():
        layers.append(
            alt.Chart(front)
            .mark_line(color=QUIET, strokeDash=[3, 3], strokeWidth=1, interpolate="linear")
            .encode(x="x:Q", y="y:Q")
        )
    opacity = alt.condition("datum.dim", alt.value(0.5), alt.value(1.0))
    ring = base.mark_point(shape="circle", size=420, filled=False, strokeWidth=2, color="#0072B2").encode(
        opacity=alt.condition("datum.run === chosen", alt.value(1.0), alt.value(0.0))
    )
    points = base.mark_text(fontSize=17, cursor="pointer").encode(
        text="mark:N", color=alt.Color("colour:N", scale=None, legend=None), opacity=opacity, tooltip=tip
    )
    layers += [ring, points]
    if len(data) <= NAMED_POINTS:
        layers += _names(data, xs, ys)
    return _specification(alt.layer(*layers).add_params(chosen), 360)


def _names(data: pd.DataFrame, xs: alt.X, ys: alt.Y) -> list[alt.Chart]:
    """Names beside the points, in turn above and below, so that neighbours do not cover each other.

    The browser leaves out layers whose name begins with ``wide`` where the chart is narrow.
    """
    ordered = data.sort_values(["y", "x"]).reset_index(drop=True)
    right = (ordered["x"] - ordered["x"].min()) > 0.7 * (ordered["x"].max() - ordered["x"].min())  # these would leave the chart
    above = ordered.index % 2 == 0
    dim = alt.condition("datum.dim", alt.value(0.75), alt.value(1.0))
    return [
        alt.Chart(part, name=f"wide_{i}")
        .mark_text(align=align, dx=dx, dy=dy, fontSize=11, limit=200, color=INK)
        .encode(x=xs, y=ys, text="name:N", opacity=dim)
        for i, (part, align, dx, dy) in enumerate([
            (ordered[above & ~right], "left", 10, -10), (ordered[~above & ~right], "left", 10, 11),
            (ordered[above & right], "right", -10, -10), (ordered[~above & right], "right", -10, 11),
        ])
        if len(part)
    ]  # fmt: skip


def _band_layers(band: Band | None, kx: float, ky: float) -> list[alt.Chart]:
    if band is None:
        return []
    data = pd.DataFrame([{"x1": band.x_low * kx, "x2": band.x_high * kx, "y1": band.y_low * ky, "y2": band.y_high * ky}])
    chart = alt.Chart(data)
    layers = [chart.mark_rect(color=INK, opacity=0.16).encode(x="x1:Q", x2="x2:Q", y="y1:Q", y2="y2:Q")]
    if band.x_high > band.x_low:
        layers.append(chart.mark_rect(color=INK, opacity=0.05).encode(x="x1:Q", x2="x2:Q"))
    if band.y_high > band.y_low:
        layers.append(chart.mark_rect(color=INK, opacity=0.05).encode(y="y1:Q", y2="y2:Q"))
    return layers


def sweep_chart(frame: pd.DataFrame, knob: str, metric: str, noise: tuple[float, float] | None = None) -> Spec:
    """One metric against one knob, a line a sweep. Frame: ``sweep knob value colour mark name base``; ``base`` is the baseline's value,
    ``noise`` the range in which it may lie by chance."""
    k = scaled(metric)[0]
    numeric = pd.api.types.is_numeric_dtype(frame["knob"]) and not pd.api.types.is_bool_dtype(frame["knob"])
    data = frame.assign(value=frame["value"] * k, base=frame["base"] * k)
    if not numeric:
        data = data.assign(knob=data["knob"].astype(str))
    x = alt.X(
        "knob:Q" if numeric else "knob:N",
        title=knob,
        scale=alt.Scale(zero=False, nice=False, padding=24) if numeric else alt.Undefined,
        axis=alt.Axis(labelAngle=0),
    )
    base = alt.Chart(data).encode(
        x=x, y=alt.Y("value:Q", axis=_y_axis(metric), scale=alt.Scale(zero=False, nice=False, padding=14))
    )
    colour = alt.Color("colour:N", scale=None, legend=None)
    tip = [alt.Tooltip("name:N", title="Run"), alt.Tooltip("value:Q", title=metric_title(metric), format=".4~g")]
    layers: list[Any] = []
    if noise is not None:
        span = pd.DataFrame([{"low": noise[0] * k, "high": noise[1] * k}])
        layers.append(alt.Chart(span).mark_rect(color=INK, opacity=0.07).encode(y="low:Q", y2="high:Q"))
    if data["base"].notna().any():
        layers.append(
            alt.Chart(data)
            .mark_rule(color=INK, strokeDash=[5, 4], strokeWidth=1.2)
            .encode(y=alt.Y("mean(base):Q"), detail="sweep:N")
        )
    layers += [
        base.mark_line(strokeWidth=2).encode(detail="sweep:N", color=colour),
        base.mark_text(fontSize=15).encode(text="mark:N", color=colour, tooltip=tip),
    ]
    return _specification(alt.layer(*layers), 240)


def latency_chart(frame: pd.DataFrame) -> Spec:
    """Share of tokens that came at most this late. Frame: ``run name ms share colour``."""
    low = max(float(frame["ms"].min()), 1e-3)
    base = alt.Chart(frame).encode(
        x=alt.X("ms:Q", title="inter-token latency, ms (logarithmic)", scale=alt.Scale(type="log", nice=False, domainMin=low), axis=alt.Axis(format=".2~g", tickCount=6)),
        y=alt.Y("share:Q", axis=alt.Axis(title="% of tokens that came at most this late", titleAngle=0, titleAlign="left", titleAnchor="end", titleX=-36, titleY=-12), scale=alt.Scale(domain=[0, 100])),
        color=alt.Color("colour:N", scale=None, legend=None), detail="run:N",
    )  # fmt: skip
    tip = [
        alt.Tooltip("name:N", title="Run"),
        alt.Tooltip("ms:Q", title="ms", format=".3~g"),
        alt.Tooltip("share:Q", title="% of tokens", format=".3~g"),
    ]
    return _specification(base.mark_line(strokeWidth=2, interpolate="step-after").encode(tooltip=tip), 260)
