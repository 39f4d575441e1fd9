"""The `twostep` command: one file for each group of commands, requests made of options.

Heavy imports stay inside the commands; nothing is computed here.
"""

from __future__ import annotations

import os
import sys

import typer

from twostep.cli import (
    check,
    demo,
    evaluate,
    export,
    pictures,
    recipes,
    runs,
    schema,
    serve,
    train,
    vote,
)
from twostep.cli.console import any_terminal
from twostep.cli.endings import ended_by_signals, reason
from twostep.errors import UserError
from twostep.runtime.notices import notice

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
    help="Distil a few-step text-to-image flow model into two steps, check it, and run it.",
)
app.callback()(schema.version)
for command in (
    train.teach, train.distill, train.plan,
    pictures.generate, pictures.compare,
    serve.serve,
    evaluate.evaluate,
    export.export, export.push, export.assemble, export.average,
    vote.vote,
    demo.demo,
    recipes.recipes,
    recipes.models,
    runs.runs,
    check.check,
    schema.schema,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point. Every ending is one of these, and none but our own mistakes has a traceback.

    0; 1 with a reason (training cannot go on, a disk refuses); 2 for what the user can mend; 130
    after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    any_terminal()
    try:
        _run()
    except SystemExit as ended:
        # Imported where several processes trained, and nowhere else in vain.
        distributed = sys.modules.get("twostep.runtime.distributed")
        if distributed is not None:
            distributed.end_process(ended.code if isinstance(ended.code, int) else 0)
        raise


def _run() -> None:
    try:
        with ended_by_signals():
            app()
    except UserError as error:
        notice(str(error))
        raise SystemExit(error.exit_code) from error
    except (OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from error
        notice(f"stopped: {reason(error)}")
        raise SystemExit(1) from error
    except RuntimeError as error:  # what torch says of a device's memory
        if "out of memory" not in str(error):
            raise
        notice(f"stopped, out of memory: {str(error)[:300]}")
        raise SystemExit(1) from error
