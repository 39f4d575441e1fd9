"""A diffusers transformer as such: read as it is stored, or made around given weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor, nn

from twostep.errors import ModelError
from twostep.families.loading import load_diffusers
from twostep.models.foreign import named
from twostep.runtime.distributed import gathered

# In the headers of safetensors files.
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating type that most of a folder's weights are stored in; reads headers alone.

    Raises:
        ModelError: if none is.
    """
    counts: Counter[torch.dtype] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                part = file.get_slice(key)
                if part.get_dtype() in _TYPES:
                    counts[_TYPES[part.get_dtype()]] += math.prod(part.get_shape())
    if not counts:
        raise ModelError(f"{folder} holds no weights in {', '.join(_TYPES)}")
    return counts.most_common(1)[0][0]


def stored_transformer(
    folder: Path, part: str | None, class_name: str, dtype: torch.dtype | None = None
) -> Any:
    """A transformer; `part` None for a folder of its own, `dtype` None as it is stored."""
    kind: Any = getattr(diffusers, class_name)
    with named(folder / (part or "")):
        stored = dtype or stored_dtype(folder / (part or ""))
        return load_diffusers(kind, folder, part, stored, exact=True)


def transformer_with(like: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """A stock transformer of the same configuration that holds `weights`, which are not copied."""
    # Sharding and our own forward put classes before diffusers' own.
    stock: Any = next(c for c in type(like).__mro__ if getattr(diffusers, c.__name__, None) is c)
    with torch.device("meta"):
        shell = stock.from_config(like.config, trust_remote_code=False)
    shell.load_state_dict(weights, assign=True)
    return shell


def whole_transformer(transformer: nn.Module, *, keep: bool = True) -> Any:
    """A transformer, sharded or not, as an ordinary one on the CPU. For all processes.

    Args:
        keep: whether this process wants it; without, it only helps the others and gets None.
    """
    weights = {}
    for key, value in transformer.state_dict().items():
        whole = gathered(value)
        if keep:
            weights[key] = whole.cpu()
    return transformer_with(transformer, weights) if keep else None
