"""The `parameters` of a PNG, by which A1111, ComfyUI and Civitai show how it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # no torch, for the server's pages
    from twostep.models.lora_files import LoraFile


def parameters_text(
    prompt: str,
    *,
    seed: int,
    steps: int,
    size: tuple[int, int],
    model: str,
    weights: str,
    loras: Sequence[LoraFile] = (),
) -> str:
    """The prompt, an empty negative one, which ComfyUI wants, and a line of settings, as A1111's.

    Args:
        size: (height, width) in pixels.
        model: a name without folders of this machine.
        weights: a checksum.
    """
    height, width = size
    settings: dict[str, object] = {
        "Steps": steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": 1,  # guidance 0
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model hash": weights[:10],
        "Model": _quoted(model),
    }
    if loras:
        hashes = ", ".join(f"{file.path.stem}: {file.sha256[:12]}" for file in loras)
        settings["Lora hashes"] = f'"{hashes}"'
    settings["Version"] = "twostep"
    names = "".join(f" <lora:{file.path.stem}:{file.scale:g}>" for file in loras)
    line = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"{prompt}{names}\nNegative prompt: \n{line}"


def _quoted(value: str) -> str:
    """As A1111 writes values that hold its separators."""
    if not any(mark in value for mark in ',:\n"'):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
