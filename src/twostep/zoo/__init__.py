"""The models and recipes inside the package, by name (`zoo:NAME`).

Weights and YAML only: no code but the names, and a student's own pipeline.py.
"""

from __future__ import annotations

from pathlib import Path

from twostep.errors import InputError, RecipeError

ZOO = Path(__file__).parent
_SCHEMA_LINE = "# yaml-language-server:"


def recipe_names() -> list[str]:
    """The recipes' names, without `zoo:`."""
    return sorted(path.stem for path in (ZOO / "recipes").glob("*.yaml"))


def recipe_path(name: str | Path) -> Path:
    """The file that `name` means: `zoo:NAME`, or a path, which need not exist.

    Raises:
        RecipeError: if the package has no such recipe.
    """
    if not str(name).startswith("zoo:"):
        return Path(name)
    known = recipe_names()
    if (short := str(name).removeprefix("zoo:")) not in known:
        names = ", ".join(f"zoo:{each}" for each in known)
        raise RecipeError(f"no recipe '{name}' in the package; there are: {names}")
    return ZOO / "recipes" / f"{short}.yaml"


def recipe_purpose(name: str) -> str:
    """What a recipe of the package is for: the first sentence of its comment."""
    words: list[str] = []
    for line in _own_lines(name):
        if not line.startswith("#"):
            break
        words += line.removeprefix("#").split()
        if words[-1].endswith("."):
            break
    return " ".join(words).split(". ")[0].removesuffix(".")


def copy_recipe(name: str, to: Path) -> None:
    """Writes a recipe of the package to a new file `to`.

    Raises:
        RecipeError: if the package has no such recipe.
        InputError: if `to` exists or cannot be written.
    """
    text = "".join(_own_lines(name))
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"to: {to} exists, expected the path of a new file") from None
    except OSError as error:
        raise InputError(f"to: {to} cannot be written: {error.strerror}") from error


def _own_lines(name: str) -> list[str]:
    """Lines of a recipe without the one that names the schema beside it."""
    path = recipe_path(f"zoo:{name.removeprefix('zoo:')}")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if not line.startswith(_SCHEMA_LINE)]
