"""A LoRA file as a user names it: `PATH` or `PATH:SCALE`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

SUFFIX = ".safetensors"

# Larger ones are a slip of the hand; weights have no such numbers.
_MOST_SCALE = 1e4


def split_lora(text: str) -> tuple[str, float]:
    """(path, scale) from "PATH" or "PATH:SCALE".

    Raises:
        ValueError: for another kind of file, or a scale that is no finite number.
    """
    if text.endswith(SUFFIX):
        return text, 1.0
    path, _, tail = text.rpartition(":")
    if not path.endswith(SUFFIX):
        raise ValueError(f"expected FILE{SUFFIX} or FILE{SUFFIX}:SCALE")
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not -_MOST_SCALE <= scale <= _MOST_SCALE:
        raise ValueError(
            f"expected a number from -{_MOST_SCALE:g} to {_MOST_SCALE:g} as the scale after {path}:"
        )
    return path, scale


def _or_text(schema: dict[str, Any]) -> None:
    """Editors know the short form, too."""
    whole = dict(schema)
    schema.clear()
    schema["anyOf"] = [{"type": "string"}, whole]


class Lora(BaseModel):
    """A LoRA that is added to the teacher's weights; `PATH` or `PATH:SCALE` for short."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_or_text)

    path: Path = Field(description="a .safetensors file in diffusers', PEFT's or kohya's layout")
    scale: float = Field(
        1.0, ge=-_MOST_SCALE, le=_MOST_SCALE, allow_inf_nan=False, description="multiplies it"
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="of the file, which must then be this one"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        path, scale = split_lora(value)
        return {"path": path, "scale": scale}
