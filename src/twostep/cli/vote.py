"""`twostep vote`: people judge an evaluation's pictures, blind."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.console import say, strong
from twostep.errors import missing_extra


def vote(
    run: Annotated[Path, typer.Argument(help="the --out of `twostep evaluate`, or of demo")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="whose pictures, by their keys in metrics.json, such as student_2, "
            "student_2/preview or reference; may be repeated (teacher and students)"
        ),
    ] = None,
    goal: Annotated[int, typer.Option(min=1, help="votes after which a voter is thanked")] = 100,
    results: Annotated[
        bool, typer.Option("--results", help="write and show the results, open no page")
    ] = False,
    browser: Annotated[bool, typer.Option(help="open the page in a browser")] = True,
    host: Annotated[
        str, typer.Option(help="others than this machine's get a link with an invitation")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one")] = 0,
) -> None:
    """Judge pictures blind: a prompt, two pictures, which is better; by several people at once.

    Votes are kept in RUN/votes.sqlite; Ctrl-C ends, the same command goes on. Then, or by
    --results: win rates with intervals in RUN/votes.json, every vote in RUN/votes.csv, and a
    section in RUN/report.html.

    Example: twostep vote runs/check
    """
    from twostep.evaluation.picture_index import PictureIndex
    from twostep.evaluation.report.votes import votes_text

    try:
        from twostep.voting import server as voting
        from twostep.voting.results import write_results
    except ImportError as error:
        raise missing_extra("serve", error, option="vote") from error

    index = PictureIndex.read(run)
    keys = voting.choose(index, model or ())
    box = voting.open_box(run, index)
    if not results:
        server = voting.VoteServer(index, box, keys=keys, host=host, port=port, goal=goal)
        strong(f"ready at {server.url}; Ctrl-C ends")
        if browser and sys.stdout.isatty():
            webbrowser.open(server.url)
        server.run()
    summary = write_results(run, index, box)
    box.close()
    say(votes_text(summary))
    say(f"votes: {run / 'votes.csv'}\n       {run / 'votes.json'}")
