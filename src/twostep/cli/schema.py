"""`twostep schema` and `twostep --version`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema() -> None:
    """Print the JSON schema of a recipe, by which editors complete and check it.

    Example: twostep schema > recipe.schema.json

    The first line of a recipe then names it: # yaml-language-server: $schema=recipe.schema.json
    """
    from twostep.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))


def _print_version(asked: bool) -> None:
    if asked:
        from twostep import __version__

        print(f"twostep {__version__}")
        raise typer.Exit


def version(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version"),
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="open folders without reading their checksums")
    ] = False,
) -> None:
    """Options of the command as a whole."""
    if no_verify:
        from twostep.runtime.checksums import set_verifying

        set_verifying(False)
