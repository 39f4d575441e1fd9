"""The report's words: the verdict, the notes on what was measured, and how figures are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from twostep.evaluation.entries import Kind, read_key

NONE = "–"
# Images below which a distance is mostly chance.
_FEW = 128

_STUDENT_NAMES = {"student": "Student", "shipped": "Shipped student"}
ACCURACY_NAMES = {
    "single": "one object",
    "two": "two objects",
    "counting": "counting",
    "position": "position",
    "background": "background",
}
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


def model_name(kind: Kind, name: str) -> str:
    """What the page calls a model."""
    if kind in ("student", "baseline"):
        return _STUDENT_NAMES.get(name, name)
    return {"teacher": "Teacher", "naive": "Same weights"}[kind]


def verdict(report: dict[str, Any]) -> str:
    """What the figures come to, in a sentence per student."""
    models, closed = report["models"], report.get("gap_closed", {})
    read = {key: read_key(key, figures) for key, figures in models.items()}
    students = [key for key, (kind, _, _) in read.items() if kind == "student"]
    if not students:
        return "No student was compared with the teacher."
    teachers = [key for key, (kind, _, _) in read.items() if kind == "teacher"]
    teacher, teacher_steps = (models[teachers[0]], read[teachers[0]][2]) if teachers else ({}, "8")
    who = {key: f"The {model_name(*read[key][:2]).lower()}" for key in students}
    first, *others = students
    sentences = []
    time = ratio(models[first], teacher, "seconds_per_image")
    accuracy, of_teacher = overall(models[first]), overall(teacher)
    sentence = who[first] + _closes(
        closed.get(first),
        f" of the gap between the teacher’s weights at 2 steps and at {teacher_steps}",
        around(models[first], "gap_closed", percent),
    )
    if time is not None:
        sentence += f", at {time:.2f} of the teacher’s time per image"
    if accuracy is not None and of_teacher is not None:
        sentence += f"; overall accuracy {accuracy:.2f} against the teacher’s {of_teacher:.2f}"
    diversity = models[first].get("diversity")
    if diversity is not None and math.isfinite(diversity):
        sentence += f"; diversity {percent(diversity)} of the teacher’s"
    sentence += _worst_category(models[first], teacher)
    sentences.append(f"{sentence}.")
    if report.get("images", _FEW) < _FEW:
        sentences.append(
            f"That is on {report['images']} images of {report['prompts']} prompts: "
            "too few to judge."
        )
    for key in others:
        sentence, accuracy = who[key] + _closes(closed.get(key), " of it"), overall(models[key])
        if accuracy is not None:
            sentence += f"; overall accuracy {accuracy:.2f}"
        sentences.append(f"{sentence}.")
    return " ".join(sentences)


def _worst_category(student: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Where the student falls furthest behind the teacher, if by a point or more."""
    own, other = student.get("accuracy", {}), teacher.get("accuracy", {})
    short = {k: 100 * (other[k] - own[k]) for k in own if k in other and k != "overall"}
    worst = max(short, key=lambda k: short[k], default=None)
    if worst is None or short[worst] < 1:
        return ""
    points = f"{short[worst]:.0f} point{'s' if round(short[worst]) > 1 else ''}"
    return f"; furthest behind in {ACCURACY_NAMES.get(worst, worst)}, {points} short"


def _closes(share: float | None, gap: str, interval: str = "") -> str:
    if share is None or not math.isfinite(share):
        return " was compared with the teacher"
    if share < 0:
        return (
            " is further from the teacher than the teacher’s own weights at 2 steps"
            f" (gap closed: {percent(share)})"
        )
    return f" closes {percent(share)}{interval}{gap}"


def notes(report: dict[str, Any]) -> list[str]:
    """What was measured on what, and what the figures mean."""
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
        f"distance to that set is the floor{f', {number(floor)}' if floor is not None else ''}. "
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


def origin(report: dict[str, Any]) -> list[tuple[str, Any]]:
    """Where the figures come from, by name."""
    return [(name, report[key]) for key, name in _ORIGIN.items() if key in report]


def with_interval(model: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    return write(model.get(key)) + around(model, key, write)


def around(model: dict[str, Any], key: str, write: Callable[[float | None], str]) -> str:
    """ " ± 0.03", or nothing where no interval is known."""
    value: Any = model.get("interval", {})
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return "" if value is None else f" ± {write(value).removesuffix('%')}"


def overall(model: dict[str, Any]) -> float | None:
    return model.get("accuracy", {}).get("overall")


def ratio(model: dict[str, Any], teacher: dict[str, Any], key: str) -> float | None:
    return model[key] / teacher[key] if model.get(key) and teacher.get(key) else None


def number(value: float | None) -> str:
    """Three significant digits."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
    return text.replace("-", "−")


def fraction(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.2f}"


def percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{100 * value:.0f}%".replace("-", "−")


def seconds(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.2f} s" if value >= 1 else f"{number(1000 * value)} ms"


def stage(model: dict[str, Any], key: str) -> float | None:
    value = model.get("latency", {}).get(key)
    return sum(value) if isinstance(value, list) else value
