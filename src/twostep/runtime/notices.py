"""What a user should know of work that goes on, a line each on stderr."""

from __future__ import annotations

import sys


def notice(text: str) -> None:
    """Prints a line."""
    print(f"twostep: {printable(text)}", file=sys.stderr, flush=True)


def printable(text: str, limit: int = 2000) -> str:
    """Text for a terminal: control characters but line breaks as escapes, not above `limit`.

    What a stranger wrote into a file must not move the cursor or recolour the screen.
    """
    shown = "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in text)
    return shown if len(shown) <= limit else f"{shown[: limit - 20]} ... (cut short)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
