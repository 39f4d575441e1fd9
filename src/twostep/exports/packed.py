"""Weights in 8 bits as ComfyUI stores them: scaled fp8 (e4m3) and int8, in its quantised layout.

ComfyUI's QUANTIZATION.md has the layout: `LAYER.weight` in 8 bits, `LAYER.weight_scale`, and the
layers' formats as JSON in the file's header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

Packing = Literal["fp8", "int8"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)
# The blocks' matrices, by ComfyUI's names: what `--memory int8` packs, too.
_PACKED = re.compile(
    r"(layers|noise_refiner|context_refiner)\.\d+\."
    r"(attention\.(qkv|out)|feed_forward\.w[123])\.weight"
)
_FORMATS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}


def is_packed_name(name: str) -> bool:
    """Whether a matrix, by ComfyUI's name, is one of the blocks'."""
    return _PACKED.fullmatch(name) is not None


@torch.no_grad()
def pack(weights: Mapping[str, Tensor], packing: Packing) -> tuple[dict[str, Tensor], str]:
    """The blocks' matrices in 8 bits, the rest as it is.

    fp8 has one scale for a matrix, int8 one for each of its outputs. Products are taken in the
    activations' own type (`full_precision_matrix_mult`), which are not rounded to 8 bits then.

    Args:
        weights: in ComfyUI's layout.

    Returns:
        What to store, and `_quantization_metadata` for the file's header.
    """
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, object]] = {}
    for name, weight in weights.items():
        if not is_packed_name(name):
            found[name] = weight
            continue
        values, scale = _fp8(weight.float()) if packing == "fp8" else _int8(weight.float())
        layer = name.removesuffix(".weight")
        found[name], found[f"{layer}.weight_scale"] = values, scale
        layers[layer] = {"format": _FORMATS[packing], "full_precision_matrix_mult": True}
    return found, json.dumps({"format_version": "1.0", "layers": layers})


def unpack(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a reader of `pack`'s file computes with."""
    ends = (".weight_scale",)
    found = {}
    for name, value in weights.items():
        if name.endswith(ends):
            continue
        scale = weights.get(f"{name}_scale")
        found[name] = value if scale is None else (value.float() * scale).to(dtype)
    return found


def _fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn), scale


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale
