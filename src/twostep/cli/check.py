"""`twostep check`: whether a folder is sound."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.console import say


def check(
    folder: Annotated[
        str, typer.Argument(help="a model, a teacher's cache or a run; zoo:NAME, too")
    ],
) -> None:
    """Read a model, a cache or a run from end to end: checksums, lengths, finite values.

    Example: twostep check runs/x/student
    """
    from twostep.distill import soundness
    from twostep.models.locate import locate

    path = locate(folder, ()) if folder.startswith("zoo:") else Path(folder)
    for line in soundness.check(path):
        say(line)
