"""What samples and what is trained, seen from outside: one call, whatever stands behind it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from twostep.families.family import Prediction, PromptBatch
from twostep.method.rollout import VelocityField, guided


class Velocity(Protocol):
    """A family's network, an adapter on one, or a role of a training run."""

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        """Velocity at `latents` (B, C, H, W) and `sigma` (B,), and the layers that are tapped."""
        ...


def bind(velocity: Velocity, prompts: PromptBatch) -> VelocityField:
    """`velocity` with its prompts fixed."""
    return lambda latents, sigma: velocity(latents, sigma, prompts).velocity


def guided_field(
    velocity: Velocity, prompts: PromptBatch, empty: PromptBatch | None, guidance_scale: float
) -> VelocityField:
    """`velocity` under classifier-free guidance; scale 0 never looks at `empty`.

    Args:
        empty: the empty prompt, once or as often as there are prompts; None with scale 0.
    """
    conditional = bind(velocity, prompts)
    if not guidance_scale or empty is None:
        return guided(conditional, None, guidance_scale)
    if len(empty) != len(prompts):
        empty = empty.expand(len(prompts))
    return guided(conditional, bind(velocity, empty), guidance_scale)
