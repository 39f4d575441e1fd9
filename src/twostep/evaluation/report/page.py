"""The page that shows a comparison: verdict, pictures, figures, curves of the training."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from twostep.evaluation.entries import Kind, read_key
from twostep.evaluation.report.curves import PLOT, draw_charts
from twostep.evaluation.report.votes import votes_section
from twostep.evaluation.report.words import (
    ACCURACY_NAMES,
    NONE,
    around,
    fraction,
    model_name,
    notes,
    number,
    origin,
    overall,
    percent,
    ratio,
    seconds,
    stage,
    verdict,
    with_interval,
)
from twostep.runtime.files import write_text
from twostep.runtime.images import to_pil

_TEMPLATE = Path(__file__).with_name("report.html")
# Twice the shown size: sharp on dense screens, and a page of large pictures stays light.
_LONGEST_SIDE = 256

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
_STAGES = {"text": "text", "steps": "steps", "decode": "decoding"}


@dataclass(frozen=True)
class Pair:
    """A student's image and the teacher's of the same prompt and noise, (3, H, W) in -1..1.

    `kind` is the heading it is shown under, such as "furthest apart".
    """

    kind: str
    caption: str
    teacher: Tensor
    student: Tensor


@dataclass(frozen=True)
class _Row:
    """A figure of every model; `part` of the figure above it."""

    name: str
    cells: list[str]
    note: str = ""
    part: bool = False


@dataclass(frozen=True)
class _Column:
    key: str
    kind: Kind
    name: str
    steps: str


def write_report(
    folder: Path,
    report: dict[str, Any],
    *,
    panels: Mapping[str, Tensor],
    captions: Sequence[str],
    title: str,
    curves: Sequence[dict[str, Any]] = (),
    pairs: Sequence[Pair] = (),
    votes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `folder/report.html`, its path: one file that needs no network and no script.

    Args:
        folder: made when missing.
        report: figures in the shape of `Comparison.figures`, with where they come from (`command`,
            `commit`, `machine`, `date`, `minutes`, `turns`, `recipe`); what is absent is not shown.
        panels: a row of pictures per model, (K, 3, H, W) in -1..1; column k shows prompt k at
            equal noise.
        captions: K prompts.
        curves: records of the training, each with `turn`; other keys may be absent.
        pairs: a student's pictures beside the teacher's, shown by kind.
        votes: as in `votes.json`.

    Raises:
        ValueError: a panel does not hold one picture per caption.
    """
    for label, images in panels.items():
        if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(captions):
            raise ValueError(
                f"panel {label!r} must have shape ({len(captions)}, 3, H, W), a picture per "
                f"caption; got {tuple(images.shape)}"
            )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    columns = _columns(report)
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        verdict=verdict(report),
        panels={label: [_data_uri(i) for i in images] for label, images in panels.items()},
        captions=[(caption, _language(caption)) for caption in captions],
        pairs=_by_kind(pairs),
        columns=columns,
        rows=_rows(report, columns),
        votes=votes_section(votes),
        charts=draw_charts(curves),
        plot=PLOT,
        measured=notes(report),
        origin=origin(report),
        recipe=json.dumps(report.get("recipe"), indent=2, ensure_ascii=False)
        if report.get("recipe")
        else "",
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_text(path, page)
    return path


def _by_kind(pairs: Sequence[Pair]) -> dict[str, list[tuple[str, str, str, str]]]:
    """(caption, its language, the teacher's picture, the student's), by kind."""
    shown: dict[str, list[tuple[str, str, str, str]]] = {}
    for pair in pairs:
        row = (
            pair.caption,
            _language(pair.caption),
            _data_uri(pair.teacher),
            _data_uri(pair.student),
        )
        shown.setdefault(pair.kind, []).append(row)
    return shown


def _data_uri(image: Tensor) -> str:
    picture, buffer = to_pil(image), io.BytesIO()
    picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _language(caption: str) -> str:
    return "zh" if any("\u4e00" <= character <= "\u9fff" for character in caption) else "en"


def _columns(report: dict[str, Any]) -> list[_Column]:
    columns = []
    for key, figures in report["models"].items():
        kind, name, steps = read_key(key, figures)
        columns.append(_Column(key, kind, model_name(kind, name), f"{steps} steps"))
    return columns


def _rows(report: dict[str, Any], columns: Sequence[_Column]) -> list[_Row]:
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
        _Row(
            "Gap closed",
            [
                percent(closed.get(c.key)) + around(m, "gap_closed", percent)
                for c, m in zip(columns, models, strict=True)
            ],
        ),
        _Row(
            "Fréchet distance",
            [with_interval(m, "frechet_to_teacher", number) for m in models],
            "to the teacher; lower is closer",
        ),
        *(
            _Row(name, [with_interval(m, key, number) for m in models], part=True)
            for key, name in _MORE_DISTANCES.items()
        ),
        *(
            _Row(name, [with_interval(m, key, fraction) for m in models], part=True)
            for key, name in _OVERLAPS.items()
        ),
        _Row(
            "Accuracy",
            [fraction(overall(m)) + around(m, "accuracy.overall", fraction) for m in models],
            "all that the prompt asks for is right",
        ),
        *(
            _Row(ACCURACY_NAMES.get(k, k), [fraction(a.get(k)) for a in accuracies], part=True)
            for k in categories
        ),
        *(
            _Row(name, [with_interval(m, key, fraction) for m in models])
            for key, name in _SCORES.items()
        ),
        _Row(
            "Diversity",
            [with_interval(m, "diversity", fraction) for m in models],
            "spread over seeds; the teacher’s is 1",
        ),
        _Row("distinct images", [fraction(m.get("vendi")) for m in models], part=True),
        _Row(
            "Distance to its pair",
            [with_interval(m, "paired_distance", number) for m in models],
            "the teacher’s image of the same noise",
        ),
        _Row("Time per image", [seconds(m.get("seconds_per_image")) for m in models]),
        _Row(
            "of the teacher’s",
            [fraction(ratio(m, teacher, "seconds_per_image")) for m in models],
            part=True,
        ),
        *(
            _Row(name, [seconds(stage(m, key)) for m in models], part=True)
            for key, name in _STAGES.items()
        ),
        _Row(
            "Step-1 preview, Fréchet distance",
            [number(p.get("frechet_to_teacher")) for p in previews],
        ),
        _Row("Step-1 preview, accuracy", [fraction(overall(p)) for p in previews]),
    ]
    return [row for row in rows if any(cell != NONE for cell in row.cells)]
