"""Folders of an `AutoencoderTiny`, looked at without reading weights."""

from __future__ import annotations

from pathlib import Path

from twostep.errors import ModelError
from twostep.models.foreign import check_folder, read_object
from twostep.models.locate import locate


def tiny_folder(name: str) -> Path:
    """The folder of an `AutoencoderTiny`: a folder, `zoo:NAME` or a hub id.

    Raises:
        ModelError: if there is none.
    """
    folder = locate(name, ("*.json", "*.safetensors"))
    check_folder(folder)
    config = folder / "config.json"
    found = read_object(config) if config.is_file() else {}
    if found.get("_class_name") != "AutoencoderTiny":
        raise ModelError(
            f"decoder: {name} must hold an AutoencoderTiny, "
            f"its config.json says {found.get('_class_name')}"
        )
    return folder
