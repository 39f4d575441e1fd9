"""What diffusers' own pipelines take and offer, for one whose steps and guidance are fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import nn

# (pipeline, step, timestep, tensors) -> those that it changed, or None.
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class StepEnd:
    """`callback_on_step_end` with its `callback_on_step_end_tensor_inputs`.

    Raises:
        ValueError: for an input that is not one of `known`.
    """

    callback: StepCallback | None
    inputs: Sequence[str]
    known: Sequence[str]

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in self.known]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(self.known)}, "
                f"got {', '.join(unknown)}"
            )

    def __call__(self, pipe: Any, step: int, sigma: float, tensors: dict[str, Any]) -> None:
        """Puts what the callback returns into `tensors`; the time is diffusers', 1000 at noise."""
        if self.callback is not None:
            time = torch.tensor(1000.0 * sigma, device=tensors["latents"].device)
            asked = {name: tensors[name] for name in self.inputs}
            tensors |= self.callback(pipe, step, time, asked) or {}


@contextmanager
def lora_scale(transformer: nn.Module, attention: Mapping[str, Any] | None) -> Iterator[None]:
    """The scale of a user's LoRAs that `joint_attention_kwargs` names, for one forward."""
    scale = (attention or {}).get("scale", 1.0)
    scale_lora_layers(transformer, scale)
    try:
        yield
    finally:
        unscale_lora_layers(transformer, scale)
