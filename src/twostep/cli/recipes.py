"""`twostep recipes`: the recipes of the package, listed and copied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# The schema's place is relative to the package's own file; a copy has `twostep schema` instead.
_SCHEMA = "# yaml-language-server: "


def recipes(
    copy: Annotated[
        str | None, typer.Option(metavar="NAME", help="write this recipe out, to be changed")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="the file; NAME.yaml in this folder if not given")
    ] = None,
) -> None:
    """List the recipes of the package, or copy one.

    Example: twostep recipes --copy zoo:z-image-turbo-lora --to mine.yaml
    """
    from twostep import zoo
    from twostep.errors import InputError
    from twostep.runtime.files import write_text

    if copy is None:
        for name, path in zoo.recipes().items():
            print(f"{zoo.PREFIX}{name}: {_purpose(path)}")
        return
    source = zoo.recipe_path(zoo.PREFIX + copy.removeprefix(zoo.PREFIX))
    target = to or Path(source.name)
    if target.exists():
        raise InputError(f"--to: {target} is there already")
    if not target.parent.is_dir():
        raise InputError(f"--to: no folder {target.parent}")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    write_text(target, "".join(line for line in lines if not line.startswith(_SCHEMA)))
    print(target)


def _purpose(path: Path) -> str:
    """The first comment that is meant for people."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith(_SCHEMA):
            return line.lstrip("# ")
    return ""
