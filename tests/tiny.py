"""A tiny transformer of random weights, and a LoRA on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import save_file

from twostep.families.zimage import ZImage

TEXT_WIDTH = 32
CPU = torch.device("cpu")
as_velocity = ZImage().as_velocity


def random_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    """3 layers, width 64; every weight random, so that no path is silently zero."""
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        dim=64,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_WIDTH,
        in_channels=8,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 32, 32],
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def network_of(velocity: Any) -> Any:
    """The network behind a velocity: itself, or what an adapter is on."""
    return getattr(velocity, "model", velocity)


LORA_LAYERS = (
    "layers.0.attention.to_q",
    "layers.1.attention.to_out.0",
    "layers.2.adaLN_modulation.0",
    "noise_refiner.0.feed_forward.w1",
    "context_refiner.0.attention.to_v",
    "cap_embedder.1",
)


def lora_matrices(seed: int = 0, *, rank: int = 2, std: float = 0.2) -> dict[str, tuple]:
    """A and B for some layers of the tiny transformer, by module name."""
    model, generator = random_transformer(), torch.Generator().manual_seed(seed)
    found = {}
    for name in LORA_LAYERS:
        layer: Any = model.get_submodule(name)
        a = std * torch.randn(rank, layer.in_features, generator=generator)
        found[name] = a, std * torch.randn(layer.out_features, rank, generator=generator)
    return found


def write_lora(path: Path, matrices: dict[str, tuple] | None = None) -> Path:
    """A LoRA file in diffusers' layout."""
    tensors = {
        f"transformer.{name}.lora_{side}.weight": matrix
        for name, pair in (matrices or lora_matrices()).items()
        for side, matrix in zip("AB", pair, strict=True)
    }
    save_file(tensors, path)
    return path
