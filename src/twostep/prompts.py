"""Prompt sets: a text or JSONL file, or the embedded world's captions."""

from __future__ import annotations

import json
from pathlib import Path

from twostep.emoji.scenes import training_scenes
from twostep.errors import UserError


class PromptError(UserError, ValueError):
    """A prompt file that cannot be used."""


def load_prompts(source: str, count: int | None = None, seed: int = 0) -> list[str]:
    """The first `count` distinct prompts of `source`, all of a file's if None.

    Args:
        source: `emoji` (captions of training scenes, two thirds English, one third Chinese), a
            .txt file with a prompt a line, or a .jsonl file whose objects have a `prompt`.

    Raises:
        PromptError: unreadable file, bad line (named), or no prompts at all.
    """
    if source != "emoji":
        prompts = _read(Path(source))
    elif count is None:
        raise PromptError("data.prompts: the embedded world has prompts without end; say how many")
    else:
        prompts = _emoji(count, seed)
    distinct = list(dict.fromkeys(p for p in prompts if p))[:count]
    if not distinct:
        raise PromptError(f"{source} holds no prompts")
    return distinct


def _emoji(count: int, seed: int) -> list[str]:
    scenes = training_scenes(2 * count + 64, seed)
    return [s.caption("zh" if i % 3 == 2 else "en") for i, s in enumerate(scenes)]


def _read(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise PromptError(
            f"data.prompts: expected emoji, a .txt or a .jsonl file, got {str(path)!r}"
        )
    if not path.is_file():
        raise PromptError(f"data.prompts: no file at {path}")
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".txt":
        return [line.strip() for line in lines]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PromptError(f"{path}:{number}: expected an object with a prompt") from error
        if not isinstance(prompt, str):
            raise PromptError(f"{path}:{number}: prompt must be a string, got {prompt!r}")
        prompts.append(prompt.strip())
    return prompts
