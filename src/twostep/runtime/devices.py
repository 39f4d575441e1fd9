"""Where a model computes, in which type, and how its weights are held there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostep.errors import RecipeError

# Of the transformers' weights: as they are, in 8 bits, or brought in a layer at a time.
Memory = Literal["plain", "int8", "offload"]
MODES: tuple[Memory, ...] = get_args(Memory)


@dataclass(frozen=True)
class Placement:
    """Device, type of weights and activations, and how the transformers' weights are held."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    memory: Memory = "plain"

    @staticmethod
    def on(device: torch.device | str, memory: Memory = "plain") -> Placement:
        """In bf16 on an accelerator, in fp32 on a CPU, which computes bf16 no faster."""
        device = torch.device(device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Placement(device, dtype, memory)


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


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, which a compiler can fuse; bf16 stays bf16."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too, despite its name
    with sdpa_kernel(SDPBackend.MATH):
        yield
