"""Options that several commands have, and what their texts stand for."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.console import as_typed
from twostep.errors import InputError, ModelError
from twostep.runtime.devices import Memory

if TYPE_CHECKING:  # torch is imported by the commands alone
    import torch

    from twostep.models.lora_files import LoraFile

RecipeArgument = Annotated[
    str, typer.Argument(help="a YAML file, or zoo:NAME for one of `twostep recipes`")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. training.turns=500", show_default=False)
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="pixels: SIDE or WIDTHxHEIGHT; otherwise what the model was made for",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:NUMBER or mps")]
MemoryOption = Annotated[
    Memory,
    typer.Option(help="weights as they are, in 8 bits (half of bf16's), or a layer at a time"),
]
DecoderOption = Annotated[
    str | None, typer.Option(help="an AutoencoderTiny for the VAE: a folder, zoo:NAME or a hub id")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(help="a LoRA file on the model, FILE or FILE:SCALE; may be repeated"),
]
PromptCacheOption = Annotated[
    Path | None, typer.Option(help="a folder that keeps encoded prompts for the next run")
]
NewFolderOption = Annotated[Path, typer.Option(help="folder to write; must be empty or not there")]


def parse_usual_size(text: str | None) -> tuple[int, int] | None:
    """As `parse_size`; None stays None, the model's own size."""
    return None if text is None else parse_size(text)


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "SIDE" or "WIDTHxHEIGHT".

    Raises:
        InputError: for anything else, or more than `MAX_PIXELS`.
    """
    from twostep.families.family import MAX_PIXELS

    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise InputError(f"size: expected SIDE or WIDTHxHEIGHT in pixels, got {text!r}")
    width = int(match[1])
    height = int(match[2] or width)
    if width * height > MAX_PIXELS:
        raise InputError(f"size: at most {MAX_PIXELS} pixels, {text!r} has {width * height}")
    return height, width


def parse_model(text: str) -> tuple[str, int | None]:
    """(model, steps) from "MODEL" or "MODEL@STEPS".

    Raises:
        InputError: if what follows the last @ is no positive number.
    """
    model, at, steps = text.rpartition("@")
    if not at:
        return text, None
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(f"model: expected MODEL or MODEL@STEPS, got {text!r}")
    return model, int(steps)


def parse_dtype(text: str | None) -> torch.dtype | None:
    """A type of weights.

    Raises:
        InputError: for one that is not known.
    """
    if text is None:
        return None
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in known:
        raise InputError(f"--dtype: expected one of {', '.join(known)}, got {text!r}")
    return known[text]


def open_loras(texts: Sequence[str]) -> list[LoraFile]:
    """The LoRA files of "FILE" or "FILE:SCALE".

    Raises:
        InputError: for another kind of file or a scale that is no number.
        ModelError: for a file that is missing.
    """
    from twostep.recipe.loras import split_lora

    named = []
    for text in texts:
        try:
            named.append(split_lora(text))
        except ValueError as error:
            raise InputError(f"--lora: {error}, got {text!r}") from error
        if not Path(named[-1][0]).is_file():
            raise ModelError(f"--lora: no file at {named[-1][0]}")
    if not named:
        return []
    from twostep.models.lora_files import LoraFile

    return [LoraFile.open(Path(path), scale, option="--lora") for path, scale in named]


def parse_device(text: str) -> torch.device:
    """Where to compute; `auto` is CUDA if there is any.

    Raises:
        InputError: for a device that torch does not have.
    """
    from twostep.runtime.devices import pick_device

    return pick_device(text, option="--device")


def _stdin() -> Iterator[str]:
    from twostep.data.prompt_text import MOST_CHARACTERS, PromptError, checked

    most = 4 * MOST_CHARACTERS + 2  # bytes of the longest
    number = 0
    while line := sys.stdin.buffer.readline(most + 1):
        number += 1
        if len(line) > most:
            raise PromptError(f"stdin:{number}: a line of more than {most} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise PromptError(f"stdin:{number}: not UTF-8 text") from error
        yield checked(text, f"stdin:{number}")


def read_prompts(
    prompts: Sequence[str], file: str | None = None, *, option: str = "--prompts"
) -> list[str]:
    """Prompts given one by one, `-` standing for stdin's lines, then those of `file`.

    Args:
        option: which names `file`.

    Raises:
        InputError, PromptError: for an unreadable file, or no prompts at all.
    """
    from twostep.data.prompt_text import checked
    from twostep.data.prompts import load_prompts

    found: list[str] = []
    for prompt in map(as_typed, prompts):
        lines = list(_stdin()) if prompt == "-" else [checked(prompt, "prompt")]
        found.extend(line for line in lines if line or prompt != "-")
    if file is not None:
        found.extend(load_prompts(file, option=option))
    if not found:
        raise InputError("prompts: none given; name some, or --prompts FILE, or - for stdin")
    return found
