"""The numbers of a folder's configurations, looked at before any network is made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from twostep.errors import ModelError
from twostep.families.family import Family
from twostep.models.foreign import read_object

# No width, depth or count of a model has more; one that has would take minutes to refuse itself.
_MOST, _LONGEST = 1 << 24, 256
_SCALES = (
    ("vae", "scaling_factor", 1.0, 0.0),
    ("vae", "shift_factor", 0.0, -math.inf),
    ("scheduler", "shift", 1.0, 1e-4),
)


def check_configurations(base: Path, family: Family) -> None:
    """Whether a folder's configurations have what is read of them.

    Raises:
        ModelError: naming the part, and the key or what is wrong with it.
    """
    for part in ("transformer", "vae", "text_encoder"):
        _check_numbers(read_object(base / part / "config.json"), base / part)
    transformer = read_object(base / "transformer" / "config.json")
    try:
        space = family.latent_space(transformer, 1)
        found = {
            "in_channels": space.channels,
            "axes_lens": family.caption_tokens(transformer),
            "cap_feat_dim": family.caption_width(transformer),
            "n_layers": family.depth(transformer),
        }
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{base / 'transformer'}: config.json: {said}") from error
    for key, number in found.items():
        if number < 1:
            raise ModelError(f"{base / 'transformer'}: config.json: {key} allows nothing: {number}")
    stages = read_object(base / "vae" / "config.json").get("block_out_channels")
    if not isinstance(stages, list) or not 0 < len(stages) < 10 or not all(map(_is_size, stages)):
        raise ModelError(
            f"{base / 'vae'}: config.json: block_out_channels must be a list of 1 to 9 positive "
            f"integers, got {repr(stages)[:50]}"
        )
    _check_scales(base)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST


def _check_numbers(value: Any, part: Path, key: str = "config.json") -> None:
    """Every number finite, integers and lists of a size that some model could have."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(inner, part, str(name)[:50])
    elif isinstance(value, list):
        if len(value) > _LONGEST:
            raise ModelError(f"{part}: {key} has {len(value)} entries, at most {_LONGEST} are read")
        for inner in value:
            _check_numbers(inner, part, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        # rope_theta and the like are large and no sizes, but floats or below this.
        too_large = isinstance(value, int) and abs(value) > _MOST
        if too_large or not math.isfinite(value):
            raise ModelError(
                f"{part}: {key} must be a finite number, an integer at most {_MOST}, "
                f"got {repr(value)[:50]}"
            )


def _check_scales(base: Path) -> None:
    """Numbers by which every picture is multiplied."""
    values = {
        "vae": read_object(base / "vae" / "config.json"),
        "scheduler": read_object(base / "scheduler" / "scheduler_config.json"),
    }
    for part, key, usual, low in _SCALES:
        value = values[part].get(key)
        value = usual if value is None else value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Beyond, levels of noise or pictures are all alike.
        if not is_number or not low < value < 1e4:
            raise ModelError(
                f"{base / part}: {key} must be a number above {low:g} and below 10000, "
                f"got {repr(value)[:50]}"
            )
