"""The page that shows a comparison: verdict, pictures, figures, curves of the training."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from torch import Tensor

from twostep.evaluation.report.curves import PLOT, draw_charts
from twostep.runtime.files import write_atomically
from twostep.runtime.images import to_pil

_TEMPLATE = Path(__file__).with_name("report.html")
# Twice the shown size: sharp on dense screens, and a page of large pictures stays light.
_LONGEST_SIDE = 256
_NONE = "–"

_MODEL_NAMES = {
    "teacher": "Teacher",
    "naive": "Same weights",
    "student": "Student",
    "shipped": "Shipped student",
}
_ACCURACY_NAMES = {
    "single": "one object",
    "two": "two objects",
    "counting": "counting",
    "position": "position",
    "background": "background",
}
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
_ORIGIN = {
    "date": "Date",
    "machine": "Machine",
    "commit": "Commit",
    "command": "Command",
    "minutes": "Minutes, in all",
    "turns": "Training turns",
    "best_turn": "Best turn",
    "steps": "Steps",
}


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
    name: str
    steps: str


def write_report(
    folder: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    captions: list[str],
    curves: list[dict[str, Any]],
    title: str,
    pairs: Sequence[Pair] = (),
) -> Path:
    """Writes `folder/report.html`: one file that needs no network and no script.

    Args:
        folder: made when missing.
        report: figures in the shape of `Comparison.figures`, with where they come from (`command`,
            `commit`, `machine`, `date`, `minutes`, `turns`, `recipe`); what is absent is not shown.
        panels: a row of pictures per model, (K, 3, H, W) in -1..1; column k shows prompt k at
            equal noise.
        captions: K prompts.
        curves: records of the training, each with `turn`; other keys may be absent.
        pairs: a student's pictures beside the teacher's, shown by kind.

    Returns:
        The page's path.

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
        charts=draw_charts(curves),
        plot=PLOT,
        measured=_measured(report),
        origin=[(name, report[key]) for key, name in _ORIGIN.items() if key in report],
        recipe=json.dumps(report.get("recipe"), indent=2, ensure_ascii=False)
        if report.get("recipe")
        else "",
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
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


# Words and figures.


def _columns(report: dict[str, Any]) -> list[_Column]:
    columns = []
    for key in report["models"]:
        name, _, steps = key.rpartition("_")
        columns.append(_Column(key, _MODEL_NAMES.get(name, name), f"{steps} steps"))
    return columns


def verdict(report: dict[str, Any]) -> str:
    """What the figures come to, in a sentence per student."""
    models, closed = report["models"], report.get("gap_closed", {})
    students = [key for key in models if not key.startswith(("teacher_", "naive_"))]
    if not students:
        return "No student was compared with the teacher."
    teacher_key = next((key for key in models if key.startswith("teacher_")), "teacher_8")
    teacher, teacher_steps = models.get(teacher_key, {}), teacher_key.rpartition("_")[2]
    first, *others = students
    sentences = []
    ratio = _ratio(models[first], teacher, "seconds_per_image")
    accuracy, of_teacher = _overall(models[first]), _overall(teacher)
    sentence = _who(first) + _closes(
        closed.get(first),
        f" of the gap between the teacher’s weights at 2 steps and at {teacher_steps}",
        _around(models[first], "gap_closed", _percent),
    )
    if ratio is not None:
        sentence += f", at {ratio:.2f} of the teacher’s time per image"
    if accuracy is not None and of_teacher is not None:
        sentence += f"; overall accuracy {accuracy:.2f} against the teacher’s {of_teacher:.2f}"
    diversity = models[first].get("diversity")
    if diversity is not None and math.isfinite(diversity):
        sentence += f"; diversity {_percent(diversity)} of the teacher’s"
    sentence += _worst_category(models[first], teacher)
    sentences.append(f"{sentence}.")
    for key in others:
        sentence, accuracy = _who(key) + _closes(closed.get(key), " of it"), _overall(models[key])
        if accuracy is not None:
            sentence += f"; overall accuracy {accuracy:.2f}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _who(key: str) -> str:
    return f"The {_MODEL_NAMES.get(name := key.rpartition('_')[0], name).lower()}"


def _worst_category(student: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Where the student falls furthest behind the teacher, if by a point or more."""
    own, other = student.get("accuracy", {}), teacher.get("accuracy", {})
    short = {k: 100 * (other[k] - own[k]) for k in own if k in other and k != "overall"}
    worst = max(short, key=lambda k: short[k], default=None)
    if worst is None or short[worst] < 1:
        return ""
    points = f"{short[worst]:.0f} point{'s' if round(short[worst]) > 1 else ''}"
    return f"; furthest behind in {_ACCURACY_NAMES.get(worst, worst)}, {points} short"


def _closes(share: float | None, gap: str, around: str = "") -> str:
    if share is None or not math.isfinite(share):
        return " was compared with the teacher"
    if share < 0:
        return (
            " is further from the teacher than the teacher’s own weights at 2 steps"
            f" (gap closed: {_percent(share)})"
        )
    return f" closes {_percent(share)}{around}{gap}"


def _rows(report: dict[str, Any], columns: Sequence[_Column]) -> list[_Row]:
    """The table's rows; a row in which no model has a figure is left out."""
    models = [report["models"][column.key] for column in columns]
    closed = report.get("gap_closed", {})
    teacher: dict[str, Any] = next(
        (m for c, m in zip(columns, models, strict=True) if c.name == "Teacher"), {}
    )
    accuracies = [m.get("accuracy", {}) for m in models]
    previews = [m.get("preview", {}) for m in models]
    categories = dict.fromkeys(k for a in accuracies for k in a if k != "overall")
    rows = [
        _Row(
            "Gap closed",
            [
                _percent(closed.get(c.key)) + _around(m, "gap_closed", _percent)
                for c, m in zip(columns, models, strict=True)
            ],
        ),
        _Row(
            "Fréchet distance",
            [_with_interval(m, "frechet_to_teacher", _number) for m in models],
            "to the teacher; lower is closer",
        ),
        *(
            _Row(name, [_with_interval(m, key, _number) for m in models], part=True)
            for key, name in _MORE_DISTANCES.items()
        ),
        *(
            _Row(name, [_with_interval(m, key, _fraction) for m in models], part=True)
            for key, name in _OVERLAPS.items()
        ),
        _Row(
            "Accuracy",
            [_fraction(_overall(m)) + _around(m, "accuracy.overall", _fraction) for m in models],
            "all that the prompt asks for is right",
        ),
        *(
            _Row(_ACCURACY_NAMES.get(k, k), [_fraction(a.get(k)) for a in accuracies], part=True)
            for k in categories
        ),
        *(
            _Row(name, [_with_interval(m, key, _fraction) for m in models])
            for key, name in _SCORES.items()
        ),
        _Row(
            "Diversity",
            [_with_interval(m, "diversity", _fraction) for m in models],
            "spread over seeds; the teacher’s is 1",
        ),
        _Row("distinct images", [_fraction(m.get("vendi")) for m in models], part=True),
        _Row(
            "Distance to its pair",
            [_with_interval(m, "paired_distance", _number) for m in models],
            "the teacher’s image of the same noise",
        ),
        _Row("Time per image", [_seconds(m.get("seconds_per_image")) for m in models]),
        _Row(
            "of the teacher’s",
            [_fraction(_ratio(m, teacher, "seconds_per_image")) for m in models],
            part=True,
        ),
        *(
            _Row(name, [_seconds(_stage(m, key)) for m in models], part=True)
            for key, name in _STAGES.items()
        ),
        _Row(
            "Step-1 preview, Fréchet distance",
            [_number(p.get("frechet_to_teacher")) for p in previews],
        ),
        _Row("Step-1 preview, accuracy", [_fraction(_overall(p)) for p in previews]),
    ]
    return [row for row in rows if any(cell != _NONE for cell in row.cells)]


def _with_interval(model: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    return write(model.get(key)) + _around(model, key, write)


def _around(model: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    """ " ± 0.03", or nothing where no interval is known."""
    value: Any = model.get("interval", {})
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else f" ± {write(value).removesuffix('%')}"


def _stage(model: dict[str, Any], key: str) -> float | None:
    value = model.get("latency", {}).get(key)
    return sum(value) if isinstance(value, list) else value


def _measured(report: dict[str, Any]) -> list[str]:
    images, prompts, floor = (report.get(key) for key in ("images", "prompts", "floor"))
    extractor = report.get("extractor", "the inspector")
    lines = []
    if images and prompts:
        lines.append(
            f"{images} images per model, of {prompts} held-out prompts; "
            "every model starts from the same noise."
        )
    lines.append(
        f"Distances are squared Fréchet distances between features ({extractor}) of a model’s "
        "images and of a second set of the teacher’s, made from other noise. The teacher’s own "
        f"distance to that set is the floor{f', {_number(floor)}' if floor is not None else ''}. "
        "Gap closed = 1 − (student − floor) / (same weights at 2 steps − floor)."
    )
    accuracy = (
        "Accuracy is the share of images in which a detector finds the objects, their number, "
        "their places and the background that the prompt asks for."
    )
    if images:
        accuracy += (
            f" With {images} images, chance alone moves an accuracy by up to ±"
            f"{1 / math.sqrt(images):.2g} (two standard errors)."
        )
    lines.append(accuracy)
    if report.get("halves"):
        lines.append(
            "± is half of a 95% interval, 1.96 standard deviations of the figure over "
            f"{report['halves']} random halves of the prompts."
        )
    lines.append(
        "Diversity is the mean distance, in the same features, between images of one prompt from "
        "different noise, relative to the teacher’s. Time is from prompt to pixels, warm."
    )
    return lines


def _overall(model: dict[str, Any]) -> float | None:
    return model.get("accuracy", {}).get("overall")


def _ratio(model: dict[str, Any], teacher: dict[str, Any], key: str) -> float | None:
    return model[key] / teacher[key] if model.get(key) and teacher.get(key) else None


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return _NONE
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return text.replace("-", "−")


def _fraction(value: float | None) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def _percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{100 * value:.0f}%".replace("-", "−")


def _seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{value:.2f} s" if value >= 1 else f"{_number(1000 * value)} ms"
