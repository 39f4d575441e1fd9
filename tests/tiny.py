"""A tiny transformer of random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ZImageTransformer2DModel

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
