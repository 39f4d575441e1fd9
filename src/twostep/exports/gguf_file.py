"""A student as two GGUF files, for ComfyUI's GGUF loader and diffusers' `from_single_file`.

Keys are ComfyUI's; the blocks' matrices are quantised, the rest is kept. gguf-py writes the file
and quantises to Q8_0 and Q5_0; it reads Q4_K but does not make it, so that is done here.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from twostep.errors import ExportError
from twostep.exports.comfyui import to_comfyui
from twostep.exports.packed import is_packed_name
from twostep.models.folder import ModelFolder
from twostep.models.student import PARTS, STEPS
from twostep.runtime.files import write_atomically

Quantisation = Literal["q8_0", "q4_k"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
# By what ComfyUI-GGUF knows the layout; Z-Image is a Lumina 2 to ComfyUI.
_ARCHITECTURE = "lumina2"
_SUPERBLOCK, _BLOCK, _LEVELS, _SCALES = 256, 32, 15, 63


def check_gguf() -> None:
    """Raises ExportError if gguf-py is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("to: gguf needs the package gguf: pip install gguf")


def export_gguf(student: ModelFolder, out: Path, *, quantisation: Quantisation) -> list[str]:
    """Writes `first.gguf` and `second.gguf` to `out`.

    Returns:
        What the user should know: the layers that the quantisation does not fit, if any.

    Raises:
        ExportError: without gguf-py.
    """
    check_gguf()
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, part in zip(STEPS, PARTS, strict=True):
        weights = to_comfyui(student.stored_transformer(part).state_dict())
        path = out / f"{step}.gguf"
        kinds: Counter[str] = Counter()
        write_atomically(path, partial(_write, weights, quantisation, kinds))
        found = ", ".join(f"{count} matrices in {kind}" for kind, count in sorted(kinds.items()))
        lines.append(f"{path.name}: {found}")
        del weights
    return lines


def _write(
    weights: dict[str, Tensor], quantisation: Quantisation, kinds: Counter[str], path: Path
) -> None:
    """Counts in `kinds` how many matrices came out in which type."""
    import gguf

    writer = gguf.GGUFWriter(path, _ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, weight in weights.items():
        kind = _kind(name, weight, quantisation)
        writer.add_tensor(name, quantised(weight, kind), raw_dtype=kind)
        if kind != gguf.GGMLQuantizationType.F32:
            kinds[kind.name] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(name: str, weight: Tensor, quantisation: Quantisation) -> Any:
    """As llama.cpp does where rows are no multiple of a block: the next finer type that fits."""
    import gguf

    types = gguf.GGMLQuantizationType
    in_blocks = weight.ndim == 2 and name.startswith(("layers.", "noise_", "context_"))
    if not in_blocks:  # what everything goes through, and what readers ask for the model's type
        return types.F32
    if not is_packed_name(name) or weight.shape[1] % _BLOCK:
        return types.BF16
    if quantisation == "q8_0":
        return types.Q8_0
    return types.Q5_0 if weight.shape[1] % _SUPERBLOCK else types.Q4_K


def quantised(weight: Tensor, kind: Any) -> np.ndarray:
    """A tensor's bytes, rows of blocks, in a `GGMLQuantizationType`."""
    import gguf

    values = weight.detach().float().numpy()
    if kind == gguf.GGMLQuantizationType.Q4_K:
        return q4_k(values)
    data: np.ndarray = gguf.quants.quantize(values, kind)
    return data


def q4_k(values: np.ndarray) -> np.ndarray:
    """Q4_K: superblocks of 256, in each 8 blocks of 32 with a 6-bit scale and minimum.

    Args:
        values: (rows, columns), columns a multiple of 256.

    Returns:
        (rows, columns / 256 * 144) bytes, laid out as ggml's `block_q4_K`.
    """
    rows = len(values)
    blocks = values.reshape(-1, _SUPERBLOCK // _BLOCK, _BLOCK).astype(np.float32)
    low = np.minimum(blocks.min(-1), 0)
    steps, lows = (blocks.max(-1).clip(min=0) - low) / _LEVELS, -low
    # Of a superblock: one scale for the blocks' scales and one for their minima, in fp16.
    scales, minima = (
        (found.max(-1, keepdims=True) / _SCALES).astype(np.float16) for found in (steps, lows)
    )
    of_scales, of_minima = _six_bits(steps, scales), _six_bits(lows, minima)
    step = (scales.astype(np.float32) * of_scales)[..., None]
    offset = (minima.astype(np.float32) * of_minima)[..., None]
    levels = np.rint(np.divide(blocks + offset, step, out=np.zeros_like(blocks), where=step > 0))
    levels = levels.clip(0, _LEVELS).astype(np.uint8)
    nibbles = (levels[:, 0::2] | levels[:, 1::2] << 4).reshape(len(blocks), -1)
    packed = np.concatenate(
        [
            scales.view(np.uint8),
            minima.view(np.uint8),
            of_scales[:, :4] | (of_scales[:, 4:] >> 4) << 6,
            of_minima[:, :4] | (of_minima[:, 4:] >> 4) << 6,
            (of_scales[:, 4:] & 15) | (of_minima[:, 4:] & 15) << 4,
            nibbles,
        ],
        axis=1,
    )
    return packed.reshape(rows, -1)


def _six_bits(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = scale.astype(np.float32)
    found = np.divide(values, wide, out=np.zeros_like(values), where=wide > 0)
    return np.rint(found).clip(0, _SCALES).astype(np.uint8)


def read_gguf(path: Path) -> dict[str, Tensor]:
    """A file's tensors, fp32: what its readers compute with."""
    import gguf

    return {
        t.name: torch.from_numpy(
            gguf.quants.dequantize(t.data, t.tensor_type)
            .reshape(tuple(int(n) for n in reversed(t.shape)))
            .copy()
        )
        for t in gguf.GGUFReader(path).tensors
    }
