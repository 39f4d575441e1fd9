"""Which device a recipe runs on, and what is compiled for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostep.errors import RecipeError


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


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles a Z-Image transformer block by block: one piece of code for every layer.

    A block's forward alone, not its call: FSDP2 puts weights together in hooks, which no graph
    may hold.
    """
    allow_graphs()
    parts = ("layers", "noise_refiner", "context_refiner")
    for block in chain.from_iterable(transformer.get_submodule(p).children() for p in parts):
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as matrix products and a softmax, which a compiler can fuse; bf16 stays bf16."""
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # on CPU too, despite its name
    with sdpa_kernel(SDPBackend.MATH):
        yield
