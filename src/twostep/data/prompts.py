"""Prompt sets: files, datasets of the hub, PartiPrompts, or the embedded world's captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from twostep.data.prompt_text import PromptError, check_file, checked, lines_of
from twostep.errors import missing_extra
from twostep.runtime.notices import notice

HUB = "hf:"
__all__ = ["HUB", "PromptError", "load_prompts"]
_PARTI = Path(__file__).parent / "prompt_sets" / "parti.tsv"


class _ColumnError(PromptError):
    """A table without the column that should hold prompts."""


def load_prompts(
    source: str,
    count: int | None = None,
    *,
    seed: int = 0,
    column: str = "prompt",
    split: str = "train",
    option: str = "data.prompts",
) -> list[str]:
    """The first `count` distinct prompts of `source`, all of it if None.

    Args:
        source: `emoji` (captions of training scenes, two thirds English, one third Chinese),
            `parti` (PartiPrompts), a .txt file with a prompt a line, a .jsonl or .parquet file, or
            `hf:OWNER/NAME`, a dataset of the Hugging Face hub. Parquet and datasets are read only
            as far as they are needed, and want the extra "datasets".
        column: where a .jsonl or .parquet file or a dataset has its prompts.
        split: of a dataset.
        option: where the user named `source`; every message begins with it.

    Raises:
        PromptError: unreadable source, bad line (named), or no prompts at all.
        MissingExtraError: for Parquet and datasets, without the packages that read them.
    """
    try:
        distinct = list(
            islice(_distinct(_read(source, count, seed=seed, column=column, split=split)), count)
        )
        if not distinct:
            raise PromptError(f"{source} holds no prompts")
        if count is not None and len(distinct) < count and source != "parti":
            notice(f"{option}: {source} has {len(distinct)} distinct prompts, not {count}")
    except _ColumnError as error:
        named = "data.prompt_column" if option == "data.prompts" else option
        raise PromptError(f"{named}: {error}") from error
    except PromptError as error:
        raise PromptError(f"{option}: {error}") from error
    except ImportError as error:
        raise missing_extra("datasets", error, option=f"{option}: {source}") from error
    return distinct


def check_source(source: str, *, option: str) -> None:
    """Raises PromptError, naming `option`, for a source that cannot be one; reads nothing."""
    if source in ("emoji", "parti") or source.startswith(HUB):
        return
    try:
        _check_kind(Path(source))
    except PromptError as error:
        raise PromptError(f"{option}: {error}") from error


def _read(source: str, count: int | None, *, seed: int, column: str, split: str) -> Iterator[str]:
    """All of `source`, repetitions too; at least `count` of the embedded world's."""
    if count is None and (source == "emoji" or source.startswith(HUB)):
        raise PromptError(f"{source} may be without end; say how many prompts")
    if source == "emoji":
        assert count is not None
        return iter(_emoji(count, seed))
    if source == "parti":
        return _parti()
    if source.startswith(HUB):
        return _dataset(source.removeprefix(HUB), column, split)
    return _file(Path(source), column)


def _distinct(prompts: Iterator[str]) -> Iterator[str]:
    seen = {""}
    for prompt in prompts:
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def _emoji(count: int, seed: int) -> list[str]:
    from twostep.emoji.scenes import training_scenes

    scenes = training_scenes(2 * count + 64, seed)
    return [s.caption("zh" if i % 3 == 2 else "en") for i, s in enumerate(scenes)]


def _parti() -> Iterator[str]:
    with _PARTI.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["Prompt"].strip()


def _file(path: Path, column: str) -> Iterator[str]:
    readers: dict[str, Callable[[Path, str], Iterator[str]]] = {
        ".txt": lambda path, _: (checked(text, f"{path}:{n}") for n, text in lines_of(path)),
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    _check_kind(path)
    return readers[path.suffix](path, column)


def _check_kind(path: Path) -> None:
    if path.suffix not in (".txt", ".jsonl", ".parquet"):
        raise PromptError(
            "expected emoji, parti, hf:OWNER/NAME, or a .txt, .jsonl or .parquet "
            f"file, got {str(path)!r}"
        )
    check_file(path)


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: expected an object with a {column}") from error
        yield _text(prompt, column, f"{path}:{number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path} cannot be read as Parquet: {error}") from error
    _check_column(column, file.schema_arrow.names, str(path))
    number = 0
    try:
        for batch in file.iter_batches(columns=[column]):
            for prompt in batch.column(0).to_pylist():
                number += 1
                yield _text(prompt, column, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"{path} cannot be read after row {number}: {error}") from error


def _dataset(name: str, column: str, split: str) -> Iterator[str]:
    """Streamed, so that a large set costs no more than the prompts that are taken from it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        rows = load_dataset(name, split=split, streaming=True)
    except (DatasetNotFoundError, ValueError, OSError) as error:
        raise PromptError(f"dataset {name!r}, split {split!r}: {error}") from error
    first = next(iter(rows.take(1)), None)
    _check_column(column, list(first or ()), f"{name} ({split})")
    for row in rows.select_columns([column]):
        yield _text(row[column], column, name)


def _check_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise _ColumnError(f"{where} has no {column!r}; it has {', '.join(columns) or 'none'}")


def _text(prompt: object, column: str, where: str) -> str:
    if not isinstance(prompt, str):
        raise PromptError(f"{where}: {column} must be a string, got {repr(prompt)[:60]}")
    return checked(prompt, where)
