"""The models and recipes inside the package, by name (`zoo:NAME`).

Weights and YAML only: no code but the names, and a student's own pipeline.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from twostep.errors import InputError, ModelError, RecipeError

ZOO = Path(__file__).parent
# Tokenizer, text encoder, VAE and scheduler of all models whose folder has none of its own.
_PARTS = ZOO / "emoji-parts"
# In the repository, not in the wheel.
_CHECKOUT_ONLY = ("emoji-base",)
_SCHEMA_LINE = "# yaml-language-server:"


def model_names() -> list[str]:
    """The models' names, without `zoo:`."""
    return sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))


def zoo_folder(name: str) -> Path:
    """The whole diffusers folder of a model of the package, `name` with or without `zoo:`.

    What models share lies once in the package; such a model's folder is made of links on first use,
    below the user's cache directory ($XDG_CACHE_HOME or ~/.cache). Nothing may be written to it.

    Raises:
        ModelError: if the package has no such model.
    """
    name = name.removeprefix("zoo:")
    own = ZOO / name
    if name not in model_names():
        if name and (own / "config.json").is_file() and own.parent == ZOO:
            return own  # a single network
        if name in _CHECKOUT_ONLY:
            raise ModelError(
                f"'zoo:{name}' is not in the installed package, only in a checkout of twostep"
            )
        known = ", ".join(f"zoo:{each}" for each in model_names())
        raise ModelError(f"no model 'zoo:{name}' in the package; there are: {known}")
    files = _files_of(own)
    target = Path("twostep") / _key(files) / name
    for root in (_user_cache, _temporary_cache):
        try:
            return _assembled(root() / target, files)
        except (OSError, RuntimeError) as error:
            problem = error
    raise ModelError(f"'zoo:{name}': no folder for its links can be written: {problem}")


def _files_of(folder: Path) -> dict[str, Path]:
    """The files of a whole folder by their path in it: the model's own and the shared ones."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for part in index:
        if not (folder / part).exists() and (_PARTS / part).is_dir():
            shared = (p for p in (_PARTS / part).rglob("*") if p.is_file())
            found |= {p.relative_to(_PARTS).as_posix(): p for p in shared}
    return {k: p for k, p in sorted(found.items()) if "__pycache__" not in p.parts}


def _key(files: dict[str, Path]) -> str:
    """Another one for another installation or other files."""
    facts = [(k, str(p), p.stat().st_size, p.stat().st_mtime_ns) for k, p in files.items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _user_cache() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    named = named if named.is_absolute() else Path("~/.cache")
    return named.expanduser()


@cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="twostep-")  # goes with the process


def _temporary_cache() -> Path:
    return Path(_temporary_folder().name)


def _assembled(target: Path, files: dict[str, Path]) -> Path:
    """Makes `target` of links to `files`, or copies; several processes may do so at once."""
    if _is_whole(target, files):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for key, path in files.items():
            link = temporary / key
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                link.symlink_to(path)
            except (OSError, NotImplementedError):
                shutil.copyfile(path, link)
        for _ in range(10):
            try:
                temporary.rename(target)
            except OSError:
                if _is_whole(target, files):  # another process was first
                    return target
                if not target.exists():
                    raise
                damaged = temporary.with_name(f"{temporary.name}.old")
                if not damaged.exists():
                    target.rename(damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            else:
                return target
        raise OSError(f"{target} is damaged and cannot be replaced")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(folder: Path, files: dict[str, Path]) -> bool:
    """Sizes tell a copy that was cut short."""
    try:
        return all((folder / k).stat().st_size == p.stat().st_size for k, p in files.items())
    except OSError:
        return False


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


def copy_recipe(name: str, *, to: Path) -> None:
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
