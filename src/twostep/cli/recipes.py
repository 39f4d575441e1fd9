"""`twostep recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twostep import zoo
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
    table = Table.grid(padding=(0, 2))
    for name in zoo.recipe_names():
        table.add_row(f"zoo:{name}", zoo.recipe_purpose(name))
    Console().print(table, highlight=False)
