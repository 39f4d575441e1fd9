"""What diffusers' own pipelines take and offer, for one whose steps and guidance are fixed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import nn

# (pipeline, step, timestep, tensors) -> those that it changed, or None.
StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]


def warn_of_fixed(values: Mapping[str, Any], *, stacklevel: int) -> None:
    """Warns of each argument that is not None: a two-step student does not take it.

    Not refused, since clients send their own defaults (SGLang 30 steps, vLLM-Omni 1 at its start).

    Args:
        stacklevel: of the caller's caller, as `warnings.warn` counts.
    """
    for name, value in values.items():
        if value is not None:
            shown = repr(value) if isinstance(value, int | float | str) else "what was given"
            message = f"{name} is fixed in a two-step student: {shown} is ignored"
            warnings.warn(message, stacklevel=stacklevel + 1)


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


class VaeMemory:
    """The four methods by which clients ask a pipeline to decode in less memory."""

    vae: Any

    def enable_vae_tiling(self) -> None:
        """Decodes large pictures in tiles."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes whole pictures again."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decodes one picture of a batch after another."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes whole batches again."""
        self.vae.disable_slicing()
