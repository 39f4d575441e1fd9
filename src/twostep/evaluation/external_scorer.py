"""Scores by a program of the user's own, such as HPSv3 or ImageReward in their environments."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from twostep.evaluation.prompts import PromptSet
from twostep.runtime.images import to_pil

# A program may load a large model first.
START_SECONDS, PICTURE_SECONDS = 900.0, 60.0


def _finite(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


class ExternalScore:
    """`NAME=COMMAND`: the command is given a picture and its prompt a line, and answers a number.

    On its input, JSON lines `{"image": PATH, "prompt": TEXT}`; on its output as many lines, each a
    number or `null` for a picture that it does not judge. It is run once for each set of pictures.

    Raises:
        ValueError: if there is no name or no command.
    """

    def __init__(self, text: str) -> None:
        self.name, _, command = text.partition("=")
        self.command = shlex.split(command)
        if not self.name.isidentifier() or not self.command:
            raise ValueError(f"expected NAME=COMMAND, got {text!r}")

    def __call__(self, images: Tensor, prompts: PromptSet) -> dict[str, Tensor]:
        """Scores (N,), NaN for `null`.

        Raises:
            ValueError: if the command fails, or answers otherwise; with what it said.
        """
        limit = START_SECONDS + PICTURE_SECONDS * len(images)
        with tempfile.TemporaryDirectory() as folder:
            lines = []
            for number, (image, prompt) in enumerate(zip(images, prompts.captions, strict=True)):
                path = Path(folder) / f"{number:06d}.png"
                to_pil(image).save(path)
                lines.append(json.dumps({"image": str(path), "prompt": prompt}))
            try:
                done = subprocess.run(
                    self.command, input="\n".join(lines) + "\n", capture_output=True, text=True,
                    check=False, timeout=limit, errors="replace",
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise ValueError(
                    f"{self.name}: {self.command[0]} is not done with {len(lines)} pictures after "
                    f"{limit:.0f} seconds"
                ) from error
            except OSError as error:
                raise ValueError(f"{self.name}: cannot run {self.command[0]}: {error}") from error
        if done.returncode:
            raise ValueError(
                f"{self.name}: {self.command[0]} ended with {done.returncode}: "
                f"{done.stderr.strip()[-500:]}"
            )
        return {self.name: self._read(done.stdout.split("\n"), len(images))}

    def _read(self, lines: list[str], count: int) -> Tensor:
        answers = [line for line in lines if line.strip()]
        if len(answers) != count:
            raise ValueError(f"{self.name}: {count} pictures, but {len(answers)} answers")
        values = []
        for answer in answers:
            try:
                value = json.loads(answer)
                values.append(math.nan if value is None else _finite(value))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.name}: expected a finite number or null a line, got {answer[:100]!r}"
                ) from error
        return torch.tensor(values)
