"""The flow-matching convention: the only file that knows the noise schedule, the sign and the time.

    sigma in [0, 1]: 1 is pure noise, 0 is the image
    x_sigma  = (1 - sigma) * clean + sigma * noise
    velocity = noise - clean                         (diffusers' flow-match Euler convention)

Shapes: latents, noise, clean and velocity are (B, C, H, W) or any shape that starts with B;
sigma is a float or a tensor (B,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Sigma = float | Tensor


def _like(sigma: Sigma, latents: Tensor) -> Sigma:
    """(B,) to (B, 1, ..., 1), so that it broadcasts against `latents`."""
    if isinstance(sigma, Tensor) and sigma.ndim == 1:
        return sigma.view(-1, *[1] * (latents.ndim - 1))
    return sigma


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Time shift, `s * sigma / (1 + (s - 1) * sigma)` (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """The `steps + 1` sigmas of an Euler sampler, from 1 down to 0.

    Shift 3 gives 1, .75, 0 for two steps and 1, .9545, .9, .8333, .75, .6429, .5, .3, 0 for eight.

    Raises:
        ValueError: if `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [float(shift_sigma(1 - i / steps, shift)) for i in range(steps)] + [0.0]


def model_time(sigma: Tensor) -> Tensor:
    """The time that Z-Image's transformer is given: 0 at pure noise, 1 at the image."""
    return 1 - sigma


def add_noise(clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """x_sigma, the point on the straight path between `clean` and `noise`."""
    sigma = _like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What flow matching regresses on: d x_sigma / d sigma."""
    return noise - clean


def clean_from_velocity(latents: Tensor, velocity: Tensor, sigma: Sigma) -> Tensor:
    """The image that `velocity` at `sigma` points to."""
    return latents - _like(sigma, latents) * velocity


def velocity_from_clean(latents: Tensor, clean: Tensor, sigma: Sigma) -> Tensor:
    """Inverse of `clean_from_velocity`; sigma must not be 0."""
    return (latents - clean) / _like(sigma, latents)


def euler_step(latents: Tensor, velocity: Tensor, sigma: Sigma, next_sigma: Sigma) -> Tensor:
    """One Euler step from `sigma` to `next_sigma`."""
    return latents + (_like(next_sigma, latents) - _like(sigma, latents)) * velocity


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance in diffusers' Z-Image sense: 0 is none, `c + g * (c - u)`."""
    return conditional + guidance_scale * (conditional - unconditional)


def sample_sigma(
    count: int,
    shift: float,
    generator: torch.Generator | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """`count` noise levels in [low, high]: uniform before the time shift. Shape (count,), fp32."""
    start, end = float(unshift_sigma(low, shift)), float(unshift_sigma(high, shift))
    uniform = torch.rand(count, generator=generator)
    shifted = shift_sigma(start + (end - start) * uniform, shift)
    assert isinstance(shifted, Tensor)
    return shifted.clamp(low, high)


def pre_shift_sigmas(sigmas: Sequence[float], shift: float) -> list[float]:
    """What diffusers' scheduler must be given so that, after its own shift, it uses `sigmas`."""
    return [float(unshift_sigma(s, shift)) for s in sigmas if s > 0]
