"""Where a model computes, in which type, and how its weights are held there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from twostep.errors import InputError, RecipeError

if TYPE_CHECKING:  # names are checked before torch is imported
    import torch

# Of the transformers' weights: as they are, in 8 bits, or brought in a layer at a time.
Memory = Literal["plain", "int8", "fp8", "offload"]
MODES: tuple[Memory, ...] = get_args(Memory)
_NAME = re.compile(r"auto|cpu|(cuda|mps)(:\d{1,3})?")


def _float32() -> torch.dtype:
    import torch

    return torch.float32


@dataclass(frozen=True)
class Placement:
    """Device, type of weights and activations, and how the transformers' weights are held."""

    device: torch.device
    dtype: torch.dtype = field(default_factory=_float32)
    memory: Memory = "plain"

    @staticmethod
    def on(device: torch.device | str, memory: Memory = "plain") -> Placement:
        """In bf16 on an accelerator, in fp32 on a CPU, which computes bf16 no faster."""
        import torch

        device = torch.device(device)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Placement(device, dtype, memory)


def check_device_name(name: str, *, option: str = "training.device") -> str:
    """The name itself, if it could be a device's; whether there is one, only torch can say.

    Raises:
        RecipeError, InputError: as `pick_device`.
    """
    if not _NAME.fullmatch(name):
        wrong = InputError if option.startswith("--") else RecipeError
        raise wrong(f"{option}: expected auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}")
    return name


def pick_device(name: str, *, option: str = "training.device") -> torch.device:
    """`auto` is CUDA if there is any, else the CPU.

    Args:
        option: where the user named it; a message begins with it.

    Raises:
        RecipeError, InputError: for a device that torch does not know or have; the latter if
            `option` is the command line's.
    """
    check_device_name(name, option=option)
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= counts[device.type]:
        wrong = InputError if option.startswith("--") else RecipeError
        raise wrong(f"{option}: {name} was asked for, but torch sees no such device")
    return device


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, which a compiler can fuse; bf16 stays bf16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too, despite its name
    with sdpa_kernel(SDPBackend.MATH):
        yield
