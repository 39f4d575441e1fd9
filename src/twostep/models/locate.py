"""Where a model lies that the user named: in the package, on this disk, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from twostep.errors import ModelError
from twostep.zoo import model_names, zoo_folder

# Pickled weights are never fetched, let alone opened.
WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.safetensors")
CONFIGURATIONS = ("*.json",)


@cache
def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    """A model of the hub, asked for once in a process."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is no local folder, nor could the hub be asked: {error}"
        ) from error


def locate(name: str, patterns: Sequence[str] = WEIGHTS) -> Path:
    """The folder that `name` means: `zoo:NAME`, a local folder, or a hub id.

    Args:
        patterns: the files that are fetched of a model on the hub.

    Raises:
        ModelError: if there is no such folder.
    """
    if name.startswith("zoo:"):
        return zoo_folder(name)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _fetch(name, tuple(patterns))
    hint = f"; did you mean zoo:{name}?" if name in model_names() else ""
    raise ModelError(f"no model folder at {name!r}{hint}")
