"""What the commands say and show while they work."""

from __future__ import annotations

import codecs
import io
import os
import sys

from rich.console import Console

from twostep.runtime.progress import is_terminal, write_line


def say(text: object) -> None:
    """A line, or a table, for people and programs; never wrapped or cut unless it is a table."""
    if isinstance(text, str):
        print(text, flush=True)
    else:
        console = Console()
        # Without a terminal a table is as wide as it is, not as 80 columns.
        width = None if console.is_terminal else 500
        console.print(text, highlight=False, markup=False, width=width, crop=False)


def note(text: str) -> None:
    """A line beside the result, on stderr."""
    write_line(text)


def strong(text: str) -> None:
    """A line that matters, bold where that can be, on stderr."""
    _styled(text, "bold")


def alarm(text: str) -> None:
    """A line that must not be missed, in red where there is colour, on stderr."""
    _styled(text, "bold red")


def _styled(text: str, style: str) -> None:
    if is_terminal():
        console = Console(stderr=True)
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
    else:
        write_line(text)


def any_terminal() -> None:
    """Output that a terminal's encoding lacks comes as escapes; names of files as they were."""
    codecs.register_error("twostep", _shown)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="twostep")


def _shown(error: UnicodeError) -> tuple[bytes | str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    try:
        return part.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return part.encode("ascii", "backslashreplace"), error.end


def as_typed(argument: str) -> str:
    """What a locale without UTF-8 made of an argument's text, as it was meant; not for paths."""
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError:
        return argument
