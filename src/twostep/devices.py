"""Which device a recipe runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def allow_graphs() -> None:
    """Lets `torch.compile` keep as many graphs of one piece of code as a run has uses for it.

    Roles share their code: with and without gradient, with and without taps, in the batch sizes of
    training and validation. Each is a graph of its own, of fixed shapes.
    """
    import torch._dynamo as dynamo  # slow, and few need it

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, which a compiler can fuse; bf16 stays bf16."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too, despite its name
    with sdpa_kernel(SDPBackend.MATH):
        yield
