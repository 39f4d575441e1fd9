"""What is compiled, and how many graphs torch may keep of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def allow_graphs() -> None:
    """Lets `torch.compile` keep as many graphs of one piece of code as a run has uses for it.

    Roles share their code: with and without gradient, with and without taps or adapters. Each is a
    graph of its own, at first of fixed shapes; where a second picture size, caption length or batch
    comes by, one more for all that follow.
    """
    import torch._dynamo as dynamo  # slow, and few need it

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)
    # Which layers are tapped is a number too, and one that a graph must not leave open: `index in
    # taps` is then false for all of them.
    dynamo.config.specialize_int = True


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles a transformer block by block: one piece of code for every layer.

    A block's forward alone, not its call: FSDP2 puts weights together in hooks, which no graph
    may hold.
    """
    allow_graphs()
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)
