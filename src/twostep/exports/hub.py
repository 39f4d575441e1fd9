"""An export, or a run's student, to the Hugging Face hub: nothing of this machine goes with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from twostep.cards.card import renamed
from twostep.cards.origin import is_hub_id
from twostep.errors import ExportError
from twostep.models.student import LORA_INDEX
from twostep.runtime.checksums import verify, write_checksums
from twostep.runtime.files import write_text

# The kinds of exports that say what they are.
WITH_CARD = ("diffusers", "server", "lora")
# What stands beside a run's or an export's files and is nobody else's.
_IGNORED = ["*.tmp", ".*", "__pycache__"]


def check_repo(repo: str) -> None:
    """Raises ExportError if `repo` is no OWNER/NAME."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ExportError(f"push: {error}") from error
    if repo.count("/") != 1:
        raise ExportError(f"push: expected OWNER/NAME, got {repo!r}")


def check_has_card(target: str) -> None:
    """Raises ExportError if exports of the kind `target` are written without a card."""
    if target not in WITH_CARD:
        raise ExportError(
            f"push: {target} is written without a card; expected --to {', '.join(WITH_CARD)}"
        )


def prepare(folder: Path, repo: str, *, licence: str | None = None) -> None:
    """Makes a folder fit to be public: its card is for `repo` and names a licence.

    Args:
        folder: written by an export or a run; its card is changed.
        licence: its id on the hub, in place of the teacher's own.

    Raises:
        ExportError: for a folder without a card or a licence, or with a machine's path in it.
    """
    check_repo(repo)
    path = folder / "README.md"
    if not path.is_file():
        raise ExportError(f"push: {folder} has no card (README.md); `twostep export` writes one")
    card = ModelCard.load(path)
    if licence is not None:
        card.data.license = licence
        card.data.license_name = card.data.license_link = None
    if not card.data.license:
        raise ExportError(
            "license: the teacher's card names none, and what is public needs one; give --license"
        )
    for file, place in _places(folder):
        raise ExportError(
            f"push: {file.relative_to(folder)} names {place}, which nobody else has; "
            "export it with --base-model, the teacher's name on the hub"
        )
    write_text(path, renamed(card, repo))
    write_checksums(folder)


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Uploads a folder that is prepared; gives its address.

    Raises:
        ExportError: if the hub does not take the card, or cannot be asked.
    """
    verify(folder)
    api = HfApi()
    try:
        ModelCard.load(folder / "README.md").validate()
        api.create_repo(repo, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="A two-step student",
            ignore_patterns=_IGNORED,
        )
    except (ValueError, HfHubHTTPError, OSError) as error:
        raise ExportError(f"push: the hub did not take {repo}: {error}") from error
    return str(found.commit_url)


def _places(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folders of this machine that a configuration or an index names."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("tokenizer.json", "vocab.json"):
            continue
        for value in _strings(json.loads(path.read_text(encoding="utf-8"))):
            if Path(value).is_absolute() and len(Path(value).parts) > 2:
                yield path, value
    index = folder / LORA_INDEX
    if index.is_file():
        teacher = str(json.loads(index.read_text(encoding="utf-8"))["teacher"])
        if not is_hub_id(teacher) and not teacher.startswith("zoo:"):
            yield index, teacher


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)
    elif isinstance(value, str):
        yield value
