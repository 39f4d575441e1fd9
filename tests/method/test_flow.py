from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from twostep.method import flow


def test_shift_and_its_inverse() -> None:
    sigma = torch.linspace(0, 1, 11)
    there = flow.shift_sigma(sigma, 3.0)
    assert isinstance(there, torch.Tensor)
    torch.testing.assert_close(flow.unshift_sigma(there, 3.0), sigma)


def test_velocity_leads_back_to_clean_and_noise() -> None:
    clean, noise = torch.randn(2, 3, 8, 4, 4)
    sigma = torch.tensor([0.2, 0.6, 1.0])
    noisy = flow.add_noise(clean, noise, sigma)
    velocity = flow.velocity_target(clean, noise)
    torch.testing.assert_close(flow.clean_from_velocity(noisy, velocity, sigma), clean)
    torch.testing.assert_close(flow.velocity_from_clean(noisy, clean, sigma), velocity)
    torch.testing.assert_close(flow.euler_step(noisy, velocity, sigma, 1.0), noise)
    torch.testing.assert_close(flow.add_noise(clean, noise, 0.0), clean)


def test_euler_step_is_diffusers_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    latents, velocity = torch.randn(2, 2, 4, 4, 4)
    theirs = scheduler.step(velocity, scheduler.timesteps[0], latents, return_dict=False)[0]
    torch.testing.assert_close(flow.euler_step(latents, velocity, 1.0, 0.75), theirs)


def test_guidance_zero_is_none_and_one_doubles_the_difference() -> None:
    conditional, unconditional = torch.randn(2, 4)
    assert torch.equal(flow.guide(conditional, unconditional, 0.0), conditional)
    torch.testing.assert_close(
        flow.guide(conditional, unconditional, 1.0), 2 * conditional - unconditional
    )
