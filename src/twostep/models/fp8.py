"""Frozen weights as 8-bit floating-point numbers, by diffusers' layerwise casting."""

from __future__ import annotations

import torch
from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook
from torch import nn

from twostep.models.int8 import is_packed


def pack_fp8(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Holds the layers that `int8` packs in e4m3, without a scale; in place.

    Each comes to `dtype` when it runs and goes back after; what it is multiplied with stays in
    `dtype`, so that any device will do.
    """
    for name, module in list(transformer.named_modules()):
        if is_packed(name, module):
            apply_layerwise_casting_hook(
                module, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype, non_blocking=False
            )
