"""Ways to hold a model's weights in less memory than they take as they are."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Memory = Literal["plain", "int8", "offload"]
MODES: tuple[Memory, ...] = get_args(Memory)
# Linear layers that stay as they are, by whole name: small ones, through which everything goes.
# benchmarks/memory.py measures what each kind costs (docs/inference.md).
KEPT = re.compile(
    r".*(t_embedder|cap_embedder|all_x_embedder|all_final_layer|adaLN_modulation|lora_[AB]).*"
)


def hold(fields: Sequence[Any], memory: Memory, device: torch.device) -> None:
    """Brings velocity fields to `device` in the way that `memory` names.

    Args:
        fields: a model's steps; they may share a transformer, as LoRA steps do.
    """
    transformers = {id(t): t for t in (transformer_of(field) for field in fields)}.values()
    for transformer in transformers:
        if memory == "offload":
            offload(transformer, device)
            continue
        if memory == "int8":
            pack_int8(transformer)
        transformer.to(device)


def transformer_of(field: Any) -> nn.Module:
    """The diffusers model behind a velocity field."""
    transformer: nn.Module = getattr(field, "model", field).transformer
    return transformer


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


def offload(transformer: nn.Module, device: torch.device) -> None:
    """Weights wait in CPU memory and come to `device` layer by layer, the next ones ahead of time.

    On a CPU they wait on disk instead, in a temporary folder.
    """
    from diffusers.hooks import apply_group_offloading

    options: dict[str, Any] = {}
    if device.type == "cuda":
        options = {"use_stream": True, "non_blocking": True, "low_cpu_mem_usage": True}
    else:
        folder = tempfile.TemporaryDirectory(prefix="twostep-weights-")
        options = {"offload_to_disk_path": folder.name}
        # The folder lives as long as the weights that wait in it.
        transformer._offloaded_to = folder  # type: ignore[assignment]
    own = [(p, p.detach().clone()) for p in transformer.parameters(recurse=False)]
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        **options,
    )
    # Tokens that belong to no layer: diffusers would bring them with a forward that is not called.
    for parameter, value in own:
        parameter.data = value.to(device)


def wake(transformer: nn.Module) -> None:
    """Runs what accelerate and diffusers hang on a model's forward to bring its weights in.

    The velocity field calls the model's parts and not its forward, so that a pipeline's
    `enable_model_cpu_offload`, `enable_sequential_cpu_offload` and `enable_group_offload` would
    pass it by.
    """
    hook = getattr(transformer, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(transformer)
    registry = getattr(transformer, "_diffusers_hook", None)
    if registry is not None:
        for found in registry.hooks.values():
            found.pre_forward(transformer)
