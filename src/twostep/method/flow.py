"""The flow-matching convention: the only file that knows the sign, the time and the time shift.

    sigma in [0, 1]: 1 is pure noise, 0 is the image
    x_sigma  = (1 - sigma) * clean + sigma * noise
    velocity = noise - clean                         (diffusers' flow-match Euler convention)

Shapes: latents, noise, clean and velocity are (B, C, H, W) or any shape that starts with B;
sigma is a float or a tensor (B,).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # a schedule is read without torch
    from torch import Tensor

Sigma: TypeAlias = "float | Tensor"


def _like(sigma: Sigma, latents: Tensor) -> Sigma:
    """(B,) to (B, 1, ..., 1), so that it broadcasts against `latents`."""
    if not isinstance(sigma, int | float) and sigma.ndim == 1:
        return sigma.view(-1, *[1] * (latents.ndim - 1))
    return sigma


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Time shift, `s * sigma / (1 + (s - 1) * sigma)` (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def unshift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """Inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


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
