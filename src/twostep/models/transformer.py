"""A diffusers transformer as such: read as it is stored, or made around given weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from twostep.families.loading import complete
from twostep.models.foreign import named
from twostep.runtime.distributed import gathered


def stored_transformer(folder: Path, part: str | None, class_name: str) -> Any:
    """A transformer in the dtype that it is stored in; `part` None for a folder of its own."""
    kind: Any = getattr(diffusers, class_name)
    with named(folder / (part or "")):
        found = kind.from_pretrained(
            folder,
            subfolder=part,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        return complete(found, folder / (part or ""), exact=True)


def stored_with_lora(folder: Path, part: str, class_name: str, file: Path) -> Any:
    """As `stored_transformer`, with a LoRA file of diffusers' layout merged into its weights."""
    model = stored_transformer(folder, part, class_name)
    with named(file):
        model.load_lora_adapter(str(file), prefix="transformer", adapter_name="step")
        model.fuse_lora()
        model.unload_lora()
    return model


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
