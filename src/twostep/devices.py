"""Which device a recipe runs on."""

from __future__ import annotations

import torch

from twostep.config import RecipeError


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA if there is any.

    Raises:
        RecipeError: if CUDA is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("training.device: cuda was asked for, but torch sees no CUDA device")
    return torch.device(name)
