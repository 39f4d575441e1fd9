"""A recipe from YAML: overrides, and one line for each mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from twostep.errors import RecipeError
from twostep.recipe.reading import read_file, read_value, short
from twostep.recipe.schema import Recipe
from twostep.zoo import recipe_path

_MOST_LINES = 8
# Keys of earlier versions: what to write now, by the value that was given; "" for any other.
RENAMED: dict[str, dict[str, str]] = {
    "student.parameters": {
        "decoupled": "student.steps: decoupled (with student.weights: full)",
        "shared": "student.steps: shared (with student.weights: full)",
        "lora": "student.weights: lora (with student.steps: decoupled)",
        "": "student.steps (decoupled or shared) and student.weights (full or lora)",
    },
    "data.shard_size": {"": "data.samples_per_file"},
    "training.tensorboard": {"": "training.report_to: [tensorboard]"},
}


def load(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a YAML recipe, a file or `zoo:NAME`.

    Args:
        overrides: `key.path=value`, the value parsed as YAML.

    Raises:
        RecipeError: unreadable file, unknown key, or a value out of range.
    """
    path = recipe_path(name)
    values = read_file(path)
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold a mapping, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse(values)


def parse(values: Mapping[str, Any]) -> Recipe:
    """Validates a nested mapping.

    Raises:
        RecipeError: with one line per mistake.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [_explain(e)[:500] for e in found[:_MOST_LINES]]
        if len(found) > _MOST_LINES:
            lines.append(f"and {len(found) - _MOST_LINES} mistakes more")
        raise RecipeError("\n".join(lines)) from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(
            f"override {short(override)}: expected key=value, e.g. training.turns=500"
        )
    *parents, leaf = key.split(".")
    for parent in parents:
        section = values.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {short(override)}: {parent[:100]} is not a section")
        values = section
    values[leaf] = read_value(text, override)


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = re.sub(r"\.(\d+)\b", r"[\1]", ".".join(location))
    if error["type"] == "extra_forbidden":
        renamed = RENAMED.get(key)
        if renamed is not None:
            return f"{key}: is now {renamed.get(str(error['input']), renamed[''])}"
        known = _keys_of_section(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {short(error['input'])}" if key else message


def _keys_of_section(path: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)
