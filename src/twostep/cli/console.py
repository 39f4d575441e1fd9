"""What the commands say and show while they work."""

from __future__ import annotations

from rich.console import Console

_out, _notes = Console(), Console(stderr=True)


def say(text: object) -> None:
    """A line, or a table, for people; numbers and paths stay uncoloured and as they are."""
    _out.print(text, highlight=False, markup=False)


def note(text: str) -> None:
    """How far the work is, in rich's markup, on stderr."""
    _notes.print(text, highlight=False)


def alarm(text: str) -> None:
    """A line that must not be missed, in red where there is colour, on stderr."""
    _notes.print(text, style="bold red", markup=False, highlight=False)


def quiet() -> None:
    """Our own progress bars suffice: no other library's bar for each file it opens."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # What they warn of in weights we refuse ourselves, in a line.
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
