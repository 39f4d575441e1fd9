"""The curves of a training, laid out for the report's SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MAX_CHARTS = 6
# Title and the records' keys, most telling first; the first six that have data are drawn.
_CHARTS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "Kernel distance to the teacher",
        {"validation/kernel_distance": "2 steps", "validation/step1_distance": "step-1 preview"},
    ),
    ("Diversity, teacher = 1", {"validation/diversity": "2 steps"}),
    (
        "Distribution matching",
        {"final/distribution_matching": "final", "step1/distribution_matching": "step 1"},
    ),
    ("Critic accuracy", {"critic/accuracy_final": "final", "critic/accuracy_step1": "step 1"}),
    (
        "Gradient norm",
        {"gradient_norm/first": "first step", "gradient_norm/second": "second step"},
    ),
    ("Student’s loss", {"loss": "all terms"}),
    ("Fakes’ loss", {"fake/step1": "step 1", "fake/final": "final"}),
    ("Spread of the latents", {"latents/std": "final"}),
)
_WIDTH, _HEIGHT = 320.0, 170.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 10.0, 10.0, 24.0
_MAX_POINTS = 120
# Values that span more than this are drawn on a logarithmic axis.
_LOG_SPAN = 50.0
# What the page needs to draw a chart's frame.
PLOT = {"left": _LEFT, "right": _WIDTH - _RIGHT, "width": _WIDTH, "height": _HEIGHT}


@dataclass(frozen=True)
class Tick:
    """A label on an axis, `at` along it."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """Points as in SVG's `points`, "x,y x,y"."""

    name: str
    points: str


@dataclass(frozen=True)
class Chart:
    """A title, lines and where the axes' ticks lie, in SVG units."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    logarithmic: bool


def draw_charts(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Charts of the keys that `records` hold, each record with its `turn`."""
    turns = [float(record["turn"]) for record in records]
    charts = []
    for title, keys in _CHARTS:
        series = {name: _series(records, key) for key, name in keys.items()}
        series = {name: points for name, points in series.items() if len(points) > 1}
        if series:
            charts.append(_chart(title, series, (min(turns), max(turns))))
    return charts[:_MAX_CHARTS]


def _series(records: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(turn, value); neighbours averaged until at most _MAX_POINTS are left."""
    points = [
        (float(r["turn"]), float(r[key])) for r in records if key in r and math.isfinite(r[key])
    ]
    stride = math.ceil(len(points) / _MAX_POINTS) or 1
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _chart(
    title: str, series: dict[str, list[tuple[float, float]]], turns: tuple[float, float]
) -> Chart:
    """A chart whose horizontal axis spans `turns`, the first and the last of the run."""
    values = [y for points in series.values() for _, y in points]
    logarithmic = min(values) > 0 and max(values) > _LOG_SPAN * min(values)
    ticks = _decades(min(values), max(values)) if logarithmic else _round_ticks(values)
    scale = math.log10 if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    first, last = turns

    def place_x(turn: float) -> float:
        share = (turn - first) / (last - first) if last > first else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def place_y(value: float) -> float:
        share = (scale(value) - low) / (high - low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    lines = [
        Line(name, " ".join(f"{place_x(x)},{place_y(y)}" for x, y in points))
        for name, points in series.items()
    ]
    return Chart(
        title=title,
        lines=lines,
        x_ticks=[Tick(place_x(x), f"{x:,.0f}") for x in dict.fromkeys((first, last))],
        y_ticks=[Tick(place_y(y), f"{y:g}".replace("-", "−")) for y in ticks],
        logarithmic=logarithmic,
    )


def _round_ticks(values: Sequence[float]) -> list[float]:
    """Three to five round numbers that enclose `values`."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / 3)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten that enclose `low` and `high`, four steps at most."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 4) or 1
    last = first + stride * math.ceil((last - first) / stride)
    return [10.0**i for i in range(first, last + 1, stride)]
