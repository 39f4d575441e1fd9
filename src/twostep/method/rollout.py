"""Samplers: the student's two steps, and the teacher's many. Shared by trainer and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from twostep.method.flow import add_noise, clean_from_velocity, euler_step, guide

# (latents, sigma (B,)) -> velocity, the conditioning already bound.
VelocityField = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TwoStep:
    """The student's schedule: step 1 at sigma 1, step 2 at `step2_sigma`, then 0."""

    step2_sigma: float
    transition: Literal["euler", "renoise"] = "euler"


@dataclass(frozen=True)
class Rollout:
    """What two steps produce; all (B, C, H, W), fp32.

    Attributes:
        clean1: the image step 1 points to (the preview).
        latents2: what step 2 is given.
        clean2: the result.
    """

    clean1: Tensor
    latents2: Tensor
    clean2: Tensor


def two_step(
    first: VelocityField,
    second: VelocityField,
    noise: Tensor,
    schedule: TwoStep,
    end_to_end: bool = True,
    transition_noise: Tensor | None = None,
) -> Rollout:
    """Rolls the student out (docs/method.md, eq. 1 to 4).

    Args:
        noise: (B, C, H, W) at sigma 1.
        end_to_end: let the gradient of `clean2` reach `first`; otherwise it stops at `latents2`.
        transition_noise: fresh noise like `noise`, for the `renoise` transition only.

    Raises:
        ValueError: if `transition_noise` is missing with `renoise`.
    """
    sigma1 = noise.new_ones(len(noise))
    sigma2 = sigma1 * schedule.step2_sigma
    velocity1 = first(noise, sigma1)
    clean1 = clean_from_velocity(noise, velocity1, sigma1)
    if schedule.transition == "euler":
        latents2 = euler_step(noise, velocity1, sigma1, sigma2)
    else:
        if transition_noise is None:
            raise ValueError("the renoise transition needs transition_noise")
        latents2 = add_noise(clean1, transition_noise, sigma2)
    if not end_to_end:
        latents2 = latents2.detach()
    clean2 = clean_from_velocity(latents2, second(latents2, sigma2), sigma2)
    return Rollout(clean1, latents2, clean2)


def euler(
    field: VelocityField,
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrates `field` along `sigmas` (descending, ending in 0), from `noise` at `sigmas[0]`.

    `on_step(i, latents)` sees the latents at `sigmas[i + 1]`.
    """
    latents = noise
    for index, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        level = latents.new_full((len(latents),), sigma)
        latents = euler_step(latents, field(latents, level), sigma, next_sigma)
        if on_step is not None:
            on_step(index, latents)
    return latents


def guided(
    conditional: VelocityField, unconditional: VelocityField | None, guidance_scale: float
) -> VelocityField:
    """Classifier-free guidance as a field; scale 0 never calls `unconditional`.

    Raises:
        ValueError: if guidance is asked for and `unconditional` is None.
    """
    if guidance_scale == 0:
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs an unconditional field")

    def field(latents: Tensor, sigma: Tensor) -> Tensor:
        return guide(conditional(latents, sigma), unconditional(latents, sigma), guidance_scale)

    return field


def seeded_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise, one seed per image: (len(seeds), C, H, W), fp32 on CPU.

    An image's noise depends on its seed alone, not on the batch or the device it is in.
    """
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
