"""A folder of random weights in the shape of Z-Image Turbo; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from twostep.planning.weightless import CONFIGURATIONS
from twostep.zoo import ZOO

_SHAPE = CONFIGURATIONS / "z-image-turbo"
_SHARD_BYTES = 2 << 30
# Random numbers are taken from one pool, at a place of its own for each tensor.
_POOL = 1 << 26
_SMALL: dict[str, dict[str, Any]] = {
    "transformer": {
        "dim": 64, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 32, "axes_dims": [8, 12, 12], "axes_lens": [256, 32, 32],
    },
    "text_encoder": {
        "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 1024,
    },
    "vae": {
        "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1,
        "mid_block_add_attention": False,
    },
}  # fmt: skip


def write_random_folder(
    folder: Path, *, small: bool = False, layers: int | None = None, text_layers: int | None = None
) -> int:
    """Writes a diffusers folder of bf16 weights, if it is not there; the transformer's layers.

    Args:
        small: a few layers of width 64 in place of the real ones.
        layers, text_layers: fewer than the configuration has.
    """
    configs = {}
    for part in ("transformer", "text_encoder", "vae"):
        configs[part] = json.loads((_SHAPE / part / "config.json").read_text())
        configs[part] |= _SMALL[part] if small else {}
    if layers is not None:
        configs["transformer"]["n_layers"] = layers
    if text_layers is not None:
        configs["text_encoder"]["num_hidden_layers"] = text_layers
    depth = int(configs["transformer"]["n_layers"])
    if (folder / "model_index.json").exists():
        return depth
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shutil.copytree(_SHAPE / "scheduler", temporary / "scheduler")
    shutil.copytree(ZOO / "emoji-parts" / "tokenizer", temporary / "tokenizer")
    with torch.device("meta"):
        text = AutoModel.from_config(AutoConfig.for_model(**configs["text_encoder"]))
        parts: dict[str, tuple[nn.Module, str]] = {
            "transformer": (
                ZImageTransformer2DModel.from_config(configs["transformer"]),
                "diffusion_pytorch_model",
            ),
            "text_encoder": (text, "model"),
            "vae": (AutoencoderKL.from_config(configs["vae"]), "diffusion_pytorch_model"),
        }
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(_POOL if not small else 1 << 18, generator=generator).bfloat16()
    for part, (model, stem) in parts.items():
        (temporary / part).mkdir()
        (temporary / part / "config.json").write_text(json.dumps(configs[part], indent=1))
        _write_weights(model, temporary / part, stem, pool)
    shutil.copyfile(_SHAPE / "model_index.json", temporary / "model_index.json")
    temporary.rename(folder)
    return depth


def _write_weights(model: nn.Module, folder: Path, stem: str, pool: Tensor) -> None:
    """Files of about 2 GB and their index, as both libraries read them."""
    shards: list[list[str]] = [[]]
    size = 0
    shapes = dict(model.named_parameters())
    for name, parameter in shapes.items():
        if size > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * parameter.numel()
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = f"{stem}.safetensors"
        save_file(dict(_random(shapes, names, pool)), folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = 2 * sum(p.numel() for p in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _random(
    shapes: dict[str, nn.Parameter], names: list[str], pool: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Norms are 1, biases 0, matrices keep a signal's size."""
    for place, name in enumerate(names):
        shape = shapes[name].shape
        if len(shape) < 2:
            fill = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(shape, fill, dtype=torch.bfloat16)
            continue
        fan_in = shape[1:].numel() if shape[0] > 1 else shape[0]
        start = (place * 7919 * 13) % (len(pool) // 2)
        count = shape.numel()
        numbers = pool[start:].repeat(-(-count // (len(pool) - start)))[:count]
        yield name, (numbers * fan_in**-0.5).view(shape)
