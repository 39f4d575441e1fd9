"""Models of others beside ours: a folder, its steps or sigmas, LoRA files, as one line of text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from twostep.errors import InputError
from twostep.evaluation.entries import Entry
from twostep.models.lora_files import LoraFile
from twostep.recipe.loras import split_lora

_FORM = "NAME=MODEL[,steps=N][,sigmas=1:S:...][,lora=FILE[:SCALE]][,guidance=G]"


def parse_baseline(text: str) -> Entry:
    """An entry from "NAME=MODEL,steps=4,lora=FILE:0.9", or with "sigmas=1:0.65".

    Sigmas are the noise levels at which the network is asked, after any shift, from 1 downwards;
    the last step leads to 0. `lora` may be given several times.

    Raises:
        InputError: naming what is wrong with it.
        ModelError: for a model or a LoRA that is missing or does not fit.
    """
    match = re.match(r"([A-Za-z0-9][\w.-]*)=([^,]+)((?:,\w+=[^,]*)*)$", text)
    if match is None or match[1] in ("teacher", "naive", "reference"):
        raise InputError(f"--baseline: expected {_FORM}, got {text!r}")
    settings: dict[str, list[str]] = {}
    for part in match[3].split(",")[1:]:
        key, _, value = part.partition("=")
        settings.setdefault(key, []).append(value)
    loras = tuple(_lora(value) for value in settings.pop("lora", []))
    steps, sigmas = _once(settings, "steps", text), _once(settings, "sigmas", text)
    guidance = _once(settings, "guidance", text)
    if settings or (steps is not None and sigmas is not None):
        raise InputError(f"--baseline: expected {_FORM}, steps or sigmas, got {text!r}")
    levels = None if sigmas is None else _sigmas(sigmas)
    entry = Entry(
        "baseline",
        match[1],
        match[2],
        len(levels) if levels is not None else _steps(steps),
        guidance_scale=_number("guidance", guidance or "0"),
        loras=loras,
        sigmas=levels,
    )
    return _checked(entry)


def with_baselines(entries: Sequence[Entry], baselines: Sequence[Entry]) -> list[Entry]:
    """The baselines after the others.

    Raises:
        InputError: if two would have the same key.
    """
    found = list(entries)
    for entry in baselines:
        if entry.key in {other.key for other in found}:
            raise InputError(f"--baseline: {entry.key!r} is there already, choose another NAME")
        found.append(entry)
    return found


def _checked(entry: Entry) -> Entry:
    folder = entry.open()
    if folder.student is None:
        return entry if entry.steps else replace(entry, steps=8)
    if entry.sigmas is not None or entry.guidance_scale or entry.steps not in (None, 2):
        raise InputError(
            f"--baseline: {entry.model} is a two-step student, which takes no steps, sigmas or "
            "guidance"
        )
    return replace(entry, steps=None)


def _once(settings: dict[str, list[str]], key: str, text: str) -> str | None:
    values = settings.pop(key, [])
    if len(values) > 1:
        raise InputError(f"--baseline: {key} is given twice in {text!r}")
    return values[0] if values else None


def _lora(value: str) -> LoraFile:
    try:
        path, scale = split_lora(value)
    except ValueError as error:
        raise InputError(f"--baseline: lora: {error}, got {value!r}") from error
    return LoraFile.open(Path(path), scale, option="--baseline: lora")


def _steps(value: str | None) -> int | None:
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise InputError(f"--baseline: steps must be a positive number, got {value!r}")
    return int(value)


def _number(key: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise InputError(f"--baseline: {key} must be a number of 0 or more, got {value!r}")
    return found


def _sigmas(value: str) -> tuple[float, ...]:
    levels = [_number("sigmas", part) for part in value.split(":")]
    if levels[-1:] == [0.0]:
        levels.pop()
    falling = all(a > b for a, b in pairwise(levels))
    if not levels or levels[0] != 1 or not falling:
        raise InputError(
            f"--baseline: sigmas must fall from 1 to above 0, such as 1:0.65, got {value!r}"
        )
    return tuple(levels)
