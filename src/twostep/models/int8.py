"""Frozen weights in 8 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Linear layers that stay as they are, by whole name: small ones, through which everything goes.
# benchmarks/memory.py measures what each kind costs (docs/inference.md).
KEPT = re.compile(
    r".*(t_embedder|cap_embedder|all_x_embedder|all_final_layer|adaLN_modulation|lora_[AB]).*"
)


def is_packed(name: str, module: nn.Module) -> bool:
    """Whether `int8` packs this module of a transformer: a linear layer of its blocks."""
    return isinstance(module, nn.Linear) and not KEPT.fullmatch(name)


class _Product(torch.autograd.Function):
    """`x @ weight.T` with a packed weight, which the backward pass unpacks again.

    Plain autograd would keep each unpacked weight until then.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.dtype = x.dtype
        return nn.functional.linear(x, _unpacked(packed, scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient, (packed, scale) = gradients[0], ctx.saved_tensors
        weight = _unpacked(packed, scale).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), None, None


def _unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    return packed.to(scale.dtype) * scale


class Int8Linear(nn.Module):
    """A linear layer whose frozen weight is kept in 8 bits, with a scale for each output.

    Arithmetic is in the type of the input; gradients go to the input alone. In our own few lines,
    since torchao 0.18 writes warnings into every run that imports diffusers 0.42, which cannot use
    it (docs/log.md).

    Args:
        linear: is not changed.
    """

    packed: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        largest = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12)
        # Rounded first, so that what the scale loses in bf16 is made up for.
        scale = (largest / 127).to(weight.dtype)
        steps = (weight.float() / scale.float()).round().clamp(-127, 127)
        self.register_buffer("packed", steps.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """(out, in), in the type that it was packed from."""
        return _unpacked(self.packed, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        product: Tensor = _Product.apply(x, self.packed, self.scale)
        return product if self.bias is None else product + self.bias


def pack_int8(transformer: nn.Module, chosen: Callable[[str, nn.Module], bool] = is_packed) -> None:
    """The linear layers that are `chosen`, by name, to `Int8Linear`; in place."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and chosen(name, module):
            transformer.set_submodule(name, Int8Linear(module))
