"""The page's table: a column for each model, a row for each figure that one of them has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twostep.evaluation.entries import Kind, read_key
from twostep.evaluation.report.words import (
    ACCURACY_NAMES,
    NONE,
    around,
    fraction,
    model_name,
    number,
    overall,
    percent,
    ratio,
    seconds,
    stage,
    with_interval,
)

_MORE_DISTANCES = {
    "kernel_to_teacher": "kernel distance (cubic)",
    "gaussian_to_teacher": "kernel distance (Gaussian, x 1000)",
}
_OVERLAPS = {
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
_SCORES = {"ocr": "Written text", "clip_score": "CLIPScore"}
# Numbers of a model that are no score.
_NO_SCORES = frozenset(
    ("frechet_to_teacher", "diversity", "vendi", "paired_distance", "gap_closed",
     "seconds_per_image", *_MORE_DISTANCES, *_OVERLAPS)
)  # fmt: skip
_STAGES = {"text": "text", "steps": "steps", "decode": "decoding"}


@dataclass(frozen=True)
class Row:
    """A figure of every model; `part` of the figure above it."""

    name: str
    cells: list[str]
    note: str = ""
    part: bool = False
    figure: str = ""


@dataclass(frozen=True)
class Column:
    key: str
    kind: Kind
    name: str
    steps: str


def _scores_of(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names of the scores by key: ours, and those of programs under the user's own names."""
    found = {k: k for m in models for k, v in m.items() if isinstance(v, float)}
    return _SCORES | {
        key: name for key, name in found.items() if key not in {*_NO_SCORES, *_SCORES}
    }


def table_columns(report: dict[str, Any]) -> list[Column]:
    columns = []
    for key, figures in report["models"].items():
        kind, name, steps = read_key(key, figures)
        columns.append(Column(key, kind, model_name(kind, name), f"{steps} steps"))
    return columns


def table_rows(report: dict[str, Any], columns: Sequence[Column]) -> list[Row]:
    """The table's rows; a row in which no model has a figure is left out."""
    models = [report["models"][column.key] for column in columns]
    closed = report.get("gap_closed", {})
    teacher: dict[str, Any] = next(
        (m for c, m in zip(columns, models, strict=True) if c.kind == "teacher"), {}
    )
    accuracies = [m.get("accuracy", {}) for m in models]
    previews = [m.get("preview", {}) for m in models]
    categories = dict.fromkeys(k for a in accuracies for k in a if k != "overall")
    rows = [
        Row(
            "Gap closed",
            [
                percent(closed.get(c.key)) + around(m, "gap_closed", percent)
                for c, m in zip(columns, models, strict=True)
            ],
        ),
        Row(
            "Fréchet distance",
            [with_interval(m, "frechet_to_teacher", number) for m in models],
            "to the teacher; lower is closer",
            figure="frechet_to_teacher",
        ),
        *(
            Row(name, [with_interval(m, key, number) for m in models], part=True, figure=key)
            for key, name in _MORE_DISTANCES.items()
        ),
        *(
            Row(name, [with_interval(m, key, fraction) for m in models], part=True, figure=key)
            for key, name in _OVERLAPS.items()
        ),
        Row(
            "Accuracy",
            [fraction(overall(m)) + around(m, "accuracy.overall", fraction) for m in models],
            "all that the prompt asks for is right",
            figure="accuracy",
        ),
        *(
            Row(ACCURACY_NAMES.get(k, k), [fraction(a.get(k)) for a in accuracies], part=True)
            for k in categories
        ),
        *(
            Row(name, [with_interval(m, key, fraction) for m in models], figure=key)
            for key, name in _scores_of(models).items()
        ),
        Row(
            "Diversity",
            [with_interval(m, "diversity", fraction) for m in models],
            "spread over seeds; the teacher’s is 1",
            figure="diversity",
        ),
        Row(
            "distinct images",
            [fraction(m.get("vendi")) for m in models],
            part=True,
            figure="vendi",
        ),
        Row(
            "Distance to its pair",
            [with_interval(m, "paired_distance", number) for m in models],
            "the teacher’s image of the same noise",
            figure="paired_distance",
        ),
        Row("Time per image", [seconds(m.get("seconds_per_image")) for m in models]),
        Row(
            "of the teacher’s",
            [fraction(ratio(m, teacher, "seconds_per_image")) for m in models],
            part=True,
        ),
        *(
            Row(name, [seconds(stage(m, key)) for m in models], part=True)
            for key, name in _STAGES.items()
        ),
        Row(
            "Step-1 preview, Fréchet distance",
            [number(p.get("frechet_to_teacher")) for p in previews],
        ),
        Row("Step-1 preview, accuracy", [fraction(overall(p)) for p in previews]),
    ]
    return [row for row in rows if any(cell != NONE for cell in row.cells)]
