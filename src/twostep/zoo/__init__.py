"""The models and recipes inside the package, by name (`zoo:NAME`).

Weights and YAML only: no code but the names, and a student's own pipeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from twostep.errors import ModelError, RecipeError

ZOO = Path(__file__).parent
PREFIX = "zoo:"


def model_folder(name: str) -> Path:
    """The folder of `zoo:NAME`.

    Raises:
        ModelError: naming the models that there are.
    """
    folder = ZOO / name.removeprefix(PREFIX)
    if not folder.is_dir():
        known = (path.parent.name for path in ZOO.glob("*/model_index.json"))
        raise ModelError(f"no model {name!r} in the package; there are: {_listed(known)}")
    return folder


def recipes() -> dict[str, Path]:
    """The recipes of the package by name, without the prefix."""
    return {p.stem: p for p in sorted((ZOO / "recipes").glob("*.yaml"), key=lambda p: p.stem)}


def recipe_path(name: str | Path) -> Path:
    """The file of `zoo:NAME`; any other name is a path already.

    Raises:
        RecipeError: naming the recipes that there are.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name)
    found = recipes().get(text.removeprefix(PREFIX))
    if found is None:
        raise RecipeError(f"no recipe {text!r} in the package; there are: {_listed(recipes())}")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(PREFIX + name for name in sorted(names))
