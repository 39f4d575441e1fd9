"""What a student is made of: its teacher, its run's recipe and outcome, figures, pictures."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

# As the hub has names: OWNER/NAME.
_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
_FRONT = re.compile(r"\A---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)


def is_hub_id(name: str) -> bool:
    """Whether `name` is a model of the hub, and no folder on this machine."""
    return _ID.fullmatch(name) is not None and not name.startswith(".") and not Path(name).is_dir()


@dataclass(frozen=True)
class Origin:
    """What a card says of a student beside how it is run.

    Attributes:
        teacher: as its owner called it; None if nobody knows.
        licence: of the teacher, as its own card has it: `license`, `license_name`, `license_link`.
        datasets: ids of the hub.
        recipe: its YAML, without a folder of this machine.
        size: (height, width) in pixels that it was trained at.
        outcome: how the run ended, as `run.json` has it.
        figures: of an evaluation.
        pictures: files of the run, for people to look at.
    """

    teacher: str | None = None
    licence: dict[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    recipe: str | None = None
    size: tuple[int, int] | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] | None = None
    pictures: tuple[Path, ...] = ()

    @staticmethod
    def of(student: Path, *, teacher: str | None = None, base: Path | None = None) -> Origin:
        """What the run around a student's folder tells about it, as far as there is one.

        Args:
            teacher: if it is known otherwise.
            base: the teacher's folder, for its licence.
        """
        run = student.parent
        recipe = _yaml(run / "recipe.yaml")
        outcome: dict[str, Any] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):
            outcome = dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["outcome"])
        figures = None
        for path in (run / "check" / "metrics.json", run / "report.json"):
            if path.is_file():
                figures = json.loads(path.read_text(encoding="utf-8"))
                break
        named = teacher or _at(recipe, "teacher", "model")
        prompts = str(_at(recipe, "data", "prompts") or "")
        shown = yaml.safe_dump(_public(recipe), sort_keys=False, allow_unicode=True)
        return Origin(
            teacher=named,
            licence=_licence(base or Path(str(named))),
            datasets=(prompts.removeprefix("hf:"),) if prompts.startswith("hf:") else (),
            recipe=shown if recipe else None,
            size=_size(_at(recipe, "data", "height"), _at(recipe, "data", "width")),
            outcome=outcome,
            figures=figures,
            pictures=tuple(sorted((run / "samples").glob("turn-*.png"))[-1:]),
        )


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    known = isinstance(height, int) and isinstance(width, int)
    return (height, width) if known else None


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _at(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _public(value: Any) -> Any:
    """Of folders and files on this machine the last name alone."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    is_place = isinstance(value, str) and value.startswith(("/", "~", "./", "../", "file:"))
    return Path(value).name if is_place else value


def _licence(teacher: Path) -> dict[str, str]:
    """From the front matter of the card in the teacher's folder."""
    try:
        match = _FRONT.match((teacher / "README.md").read_text(encoding="utf-8"))
        front = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    keys = ("license", "license_name", "license_link")
    found = {key: front.get(key) for key in keys} if isinstance(front, dict) else {}
    return {key: value for key, value in found.items() if isinstance(value, str)}
