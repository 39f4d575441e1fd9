"""Where a model lies that the user named: in the package, on this disk, or on the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from twostep.errors import ModelError
from twostep.zoo import model_names, zoo_folder

# Pickled weights are never fetched, let alone opened.
WEIGHTS = ("*.json", "*.jinja", "*.txt", "*.safetensors", "README.md")
CONFIGURATIONS = ("*.json",)


@dataclass(frozen=True)
class Hub:
    """How a model is fetched of the hub, in `huggingface_hub`'s own words.

    Attributes:
        revision: a branch, a tag or a commit.
        token: whose; None: the user's own, if there is one.
        cache_dir: in place of the user's own.
        local_files_only: take what was fetched before.
        force_download: fetch again.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    @staticmethod
    def of(options: Mapping[str, Any]) -> Hub:
        """From a `from_pretrained`'s keywords; others are left alone."""
        found = {key: options[key] for key in asdict(Hub()) if options.get(key) is not None}
        if "cache_dir" in found:
            found["cache_dir"] = str(found["cache_dir"])
        return Hub(**found)


@cache
def _fetch(name: str, patterns: tuple[str, ...], hub: Hub) -> Path:
    """A model of the hub, asked for once in a process."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(name, allow_patterns=list(patterns), **asdict(hub))
        return Path(found)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is no local folder, nor could the hub be asked: {error}"
        ) from error


def locate(name: str, patterns: Sequence[str] = WEIGHTS, hub: Hub | None = None) -> Path:
    """The folder that `name` means: `zoo:NAME`, a local folder, or a hub id.

    Args:
        patterns: the files that are fetched of a model on the hub.
        hub: how.

    Raises:
        ModelError: if there is no such folder.
    """
    if name.startswith("zoo:"):
        return zoo_folder(name)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _fetch(name, tuple(patterns), hub or Hub())
    hint = f"; did you mean zoo:{name}?" if name in model_names() else ""
    raise ModelError(f"no model folder at {name!r}{hint}")
