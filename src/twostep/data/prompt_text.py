"""Lines of a text file of prompts, within limits; each mistake named with its line."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from twostep.errors import UserError

MOST_CHARACTERS = 20_000
_MOST_LINE_BYTES = 1 << 20
_MOST_BYTES = 4 << 30


class PromptError(UserError, ValueError):
    """A prompt source that cannot be used."""


def check_file(path: Path) -> None:
    """Raises PromptError for what is no ordinary file, or too large."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        raise PromptError(f"no file at {path}") from None
    if not stat.S_ISREG(state.st_mode):
        raise PromptError(f"no file at {path}: it is a folder, a pipe or a device")
    if state.st_size > _MOST_BYTES:
        raise PromptError(f"{path} has {state.st_size} bytes, at most {_MOST_BYTES} are read")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, without their ends; a byte order mark is dropped.

    Lines end with a line feed, after a carriage return or not, and nowhere else.

    Raises:
        PromptError: for a file that is not UTF-8 text, or a line without end.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > _MOST_LINE_BYTES:
                    raise PromptError(
                        f"{path}:{number}: a line of more than {_MOST_LINE_BYTES} bytes"
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise PromptError(
                        f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start})"
                    ) from error
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from error


def checked(prompt: str, where: str) -> str:
    """A prompt without spaces around it.

    Raises:
        PromptError: naming `where`, for one that no file and no tokenizer can hold, or too long.
    """
    if "\0" in prompt:
        raise PromptError(f"{where}: a prompt must not hold NUL characters")
    if len(prompt) > MOST_CHARACTERS:
        raise PromptError(
            f"{where}: a prompt of {len(prompt)} characters, at most {MOST_CHARACTERS} are read"
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: half a character ({prompt[error.start]!r}), which is no text"
        ) from error
    return prompt.strip()
