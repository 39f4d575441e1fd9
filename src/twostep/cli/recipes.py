"""`twostep recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep import zoo
from twostep.cli.console import say
from twostep.errors import InputError


def recipes(
    copy: Annotated[
        str | None, typer.Option("--copy", metavar="NAME", help="write this one to a file")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="the new file, with --copy")] = None,
) -> None:
    """List the recipes of the package, or copy one to change it.

    Example: twostep recipes --copy zoo:emoji-demo --to my-recipe.yaml
    """
    if copy is not None:
        to = to or Path(f"{copy.removeprefix('zoo:')}.yaml")
        zoo.copy_recipe(copy, to=to)
        print(to)
        return
    if to is not None:
        raise InputError("to: goes with --copy NAME")
    for name in zoo.recipe_names():
        say(f"zoo:{name:24}  {zoo.recipe_purpose(name)}")


def models() -> None:
    """List the models of the package, and what the embedded world knows.

    Example: twostep models
    """
    from twostep.emoji.scenes import BACKGROUNDS, OBJECTS
    from twostep.models.folder import ModelFolder

    for name in zoo.model_names():
        folder = ModelFolder.open(f"zoo:{name}")
        (height, width), *_ = folder.sizes
        kind = "two-step student" if folder.student is not None else "teacher"
        say(f"zoo:{name:24}  {kind}, {width}x{height}")
    say(f"objects: {', '.join(each.name for each in OBJECTS)}")
    say(f"backgrounds: {', '.join(BACKGROUNDS)}")
