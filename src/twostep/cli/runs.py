"""`twostep runs`: what ran, how far, how well, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.console import note, say
from twostep.errors import InputError


def runs(
    folder: Annotated[Path, typer.Argument(help="a folder of runs, or a run")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="print a line of JSON for each run")
    ] = False,
) -> None:
    """List distillations: what ran, how far it came, its best validation, how it ended.

    Example: twostep runs

    While one goes on: watch twostep runs runs/my-model
    """
    from twostep.distill.run_list import list_runs

    if not folder.is_dir():
        raise InputError(f"folder: no folder at {folder}")
    found = list(list_runs(folder))
    if not found:
        note(f"no runs in {folder}")
    for run in found:
        if as_json:
            say(run.as_json())
            continue
        best = "no validation yet"
        if run.distance is not None:
            best = f"best {run.distance:.3g} at turn {run.best_turn}"
        ago = "" if run.seconds_ago is None else f", {_ago(run.seconds_ago)} ago"
        turn = f"turn {run.turn} of {run.turns} ({100 * run.share:.0f}%)"
        say(f"{run.folder}: {run.state}, {turn}{ago}; {best}; teacher {run.teacher}")


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
