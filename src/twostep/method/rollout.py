"""Samplers: the student's two steps, and the teacher's many. Shared by trainer and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from twostep.method.flow import add_noise, clean_from_velocity, euler_step, guide
from twostep.method.schedule import Schedule

# (latents, sigma (B,)) -> velocity, the conditioning already bound.
VelocityField = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Between:
    """What step 1 leaves to step 2; (B, C, H, W), fp32.

    Attributes:
        clean1: the image step 1 points to (the preview).
        latents2: what step 2 is given.
    """

    clean1: Tensor
    latents2: Tensor


@dataclass(frozen=True)
class Rollout(Between):
    """What two steps produce.

    Attributes:
        clean2: the result, (B, C, H, W), fp32.
    """

    clean2: Tensor


def first_step(
    first: VelocityField,
    noise: Tensor,
    schedule: Schedule,
    fresh: Callable[[Tensor], Tensor] | None = None,
) -> Between:
    """The student's step 1 and what leads on to step 2 (docs/method.md, eq. 1 to 3).

    Args:
        noise: (B, C, H, W) at sigma 1.
        fresh: gives the `renoise` transition its noise, like what it is given; a function of each
            image's own noise if None.
    """
    sigma1 = noise.new_ones(len(noise))
    sigma2 = sigma1 * schedule.step2_sigma
    velocity1 = first(noise, sigma1)
    clean1 = clean_from_velocity(noise, velocity1, sigma1)
    if schedule.transition == "euler":
        return Between(clean1, euler_step(noise, velocity1, sigma1, sigma2))
    return Between(clean1, add_noise(clean1, (fresh or transition_noise)(noise), sigma2))


def second_step(second: VelocityField, latents2: Tensor, schedule: Schedule) -> Tensor:
    """The student's result from `latents2` (docs/method.md, eq. 4)."""
    sigma2 = latents2.new_ones(len(latents2)) * schedule.step2_sigma
    return clean_from_velocity(latents2, second(latents2, sigma2), sigma2)


def two_step(
    first: VelocityField,
    second: VelocityField,
    noise: Tensor,
    schedule: Schedule,
    fresh: Callable[[Tensor], Tensor] | None = None,
    end_to_end: bool = True,
) -> Rollout:
    """Rolls the student out: `first_step`, then `second_step`.

    Args:
        end_to_end: let the gradient of `clean2` reach `first`; otherwise it stops at `latents2`.
    """
    between = first_step(first, noise, schedule, fresh)
    latents2 = between.latents2 if end_to_end else between.latents2.detach()
    return Rollout(between.clean1, latents2, second_step(second, latents2, schedule))


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


def transition_noise(noise: Tensor) -> Tensor:
    """Fresh noise for the `renoise` transition, a function of each image's own initial noise.

    So that an image depends on its seed alone, whatever batch it is in.
    """
    fresh = []
    for image in noise:
        bits = image.detach().cpu().float().contiguous().view(torch.int32)
        seed = int(bits.to(torch.int64).sum().abs().item())
        generator = torch.Generator().manual_seed(seed)
        fresh.append(torch.randn(image.shape, generator=generator))
    return torch.stack(fresh).to(noise.device)
