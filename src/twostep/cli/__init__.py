"""The `twostep` command: one file for each group of commands, requests made of options.

Heavy imports stay inside the commands; nothing is computed here.
"""

from __future__ import annotations

import sys

import typer

from twostep.cli import demo, evaluate, export, pictures, recipes, schema, serve, train
from twostep.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Distil a few-step text-to-image flow model into two steps, check it, and run it.",
)
app.callback()(schema.version)
for command in (
    train.teach, train.distill, train.plan,
    pictures.generate, pictures.compare,
    serve.serve,
    evaluate.evaluate,
    export.export, export.assemble, export.average,
    demo.demo,
    recipes.recipes,
    schema.schema,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Entry point: a user's mistake ends in one clear message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"twostep: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
