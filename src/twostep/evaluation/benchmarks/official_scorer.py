"""A benchmark's own scorer, a program in an environment of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostep.errors import InputError
from twostep.runtime.files import make_folder

PLACES = ("images", "model", "results", "prompts", "width", "height")
_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class OfficialScorer:
    """A command in which `{images}` and the other `PLACES` stand for what is to be scored."""

    command: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> OfficialScorer:
        """From a line as a shell takes it; none is started.

        Raises:
            InputError: without `{images}`, for a place that is not known, or no such program.
        """
        try:
            command = tuple(shlex.split(text))
        except ValueError as error:
            raise InputError(f"--official: {error}, got {text!r}") from error
        named = {name for part in command for name in _NAME.findall(part)}
        if not command or "images" not in named or named - set(PLACES):
            known = ", ".join(f"{{{name}}}" for name in PLACES)
            raise InputError(
                f"--official: expected a command with {{images}}, and no others than {known}; "
                f"got {text!r}"
            )
        if shutil.which(command[0]) is None:
            raise InputError(f"--official: no program {command[0]!r} here")
        return OfficialScorer(command)

    def run(self, places: Mapping[str, object], log: Path, figure: str | None) -> dict[str, Any]:
        """Runs it; what it says goes to `log` as it comes.

        Args:
            places: what each of `PLACES` stands for.
            figure: a pattern of the score in what it prints.

        Returns:
            `code`, and `score` or `said`, its last lines.

        Raises:
            InputError: if it cannot be started.
        """
        command = [_NAME.sub(lambda m: str(places[m[1]]), part) for part in self.command]
        make_folder(log.parent)
        try:
            with log.open("w", encoding="utf-8") as file:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                    check=False,
                )  # fmt: skip
        except OSError as error:
            raise InputError(f"--official: cannot run {command[0]}: {error}") from error
        text = log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(figure, text) if figure else []
        result: dict[str, Any] = {"code": done.returncode, "log": log.name}
        if found and not done.returncode:
            return result | {"score": float(found[-1])}
        return result | {"said": text.strip().splitlines()[-8:]}
