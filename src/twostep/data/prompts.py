"""Prompt sets: files, datasets of the hub, PartiPrompts, or the embedded world's captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from twostep.emoji.scenes import training_scenes
from twostep.errors import UserError

HUB = "hf:"
_PARTI = Path(__file__).parent / "prompt_sets" / "parti.tsv"


class PromptError(UserError, ValueError):
    """A prompt source that cannot be used."""


def load_prompts(
    source: str,
    count: int | None = None,
    seed: int = 0,
    column: str = "prompt",
    split: str = "train",
) -> list[str]:
    """The first `count` distinct prompts of `source`, all of it if None.

    Args:
        source: `emoji` (captions of training scenes, two thirds English, one third Chinese),
            `parti` (PartiPrompts), a .txt file with a prompt a line, a .jsonl or .parquet file, or
            `hf:OWNER/NAME`, a dataset of the Hugging Face hub. Parquet and datasets are read only
            as far as they are needed, and want `pip install "twostep[datasets]"`.
        column: where a .jsonl or .parquet file or a dataset has its prompts.
        split: of a dataset.

    Raises:
        PromptError: unreadable source, bad line (named), or no prompts at all.
    """
    if count is None and (source == "emoji" or source.startswith(HUB)):
        raise PromptError(f"data.prompts: {source} may be without end; say how many prompts")
    if source == "emoji":
        assert count is not None
        prompts = iter(_emoji(count, seed))
    elif source == "parti":
        prompts = _parti()
    elif source.startswith(HUB):
        prompts = _dataset(source.removeprefix(HUB), column, split)
    else:
        prompts = _file(Path(source), column)
    distinct = list(islice(_distinct(prompts), count))
    if not distinct:
        raise PromptError(f"{source} holds no prompts")
    return distinct


def _distinct(prompts: Iterator[str]) -> Iterator[str]:
    seen = {""}
    for prompt in prompts:
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def _emoji(count: int, seed: int) -> list[str]:
    scenes = training_scenes(2 * count + 64, seed)
    return [s.caption("zh" if i % 3 == 2 else "en") for i, s in enumerate(scenes)]


def _parti() -> Iterator[str]:
    with _PARTI.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["Prompt"].strip()


def _file(path: Path, column: str) -> Iterator[str]:
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".txt": lambda path, _: map(str.strip, path.read_text(encoding="utf-8").splitlines()),
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    if path.suffix not in readers:
        raise PromptError(
            "data.prompts: expected emoji, parti, hf:OWNER/NAME, or a .txt, .jsonl or .parquet "
            f"file, got {str(path)!r}"
        )
    if not path.is_file():
        raise PromptError(f"data.prompts: no file at {path}")
    return readers[path.suffix](path, column)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)[column]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PromptError(f"{path}:{number}: expected an object with a {column}") from error
        yield _text(prompt, column, f"{path}:{number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _not_installed(str(path), error) from error
    try:
        file = ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise PromptError(f"{path} cannot be read as Parquet: {error}") from error
    _check_column(column, file.schema_arrow.names, str(path))
    for batch in file.iter_batches(columns=[column]):
        for prompt in batch.column(0).to_pylist():
            yield _text(prompt, column, str(path))


def _dataset(name: str, column: str, split: str) -> Iterator[str]:
    """Streamed, so that a large set costs no more than the prompts that are taken from it."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise _not_installed(name, error) from error
    try:
        rows = load_dataset(name, split=split, streaming=True)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise PromptError(f"data.prompts: dataset {name!r}, split {split!r}: {error}") from error
    first = next(iter(rows.take(1)), None)
    _check_column(column, list(first or ()), f"{name} ({split})")
    for row in rows.select_columns([column]):
        yield _text(row[column], column, name)


def _check_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise PromptError(
            f"data.prompt_column: {where} has no {column!r}; it has {', '.join(columns) or 'none'}"
        )


def _text(prompt: object, column: str, where: str) -> str:
    if not isinstance(prompt, str):
        raise PromptError(f"{where}: {column} must be a string, got {prompt!r}")
    return prompt.strip()


def _not_installed(source: str, error: ImportError) -> PromptError:
    return PromptError(
        f'data.prompts: {source} needs an extra: pip install "twostep[datasets]" ({error})'
    )
