from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from twostep.method import flow

Z_IMAGE_TURBO_8 = [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0]


def test_schedules_of_z_image_turbo() -> None:
    assert flow.sigma_schedule(8, 3.0) == pytest.approx(Z_IMAGE_TURBO_8)
    assert flow.sigma_schedule(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flow.sigma_schedule(2, 3.0) == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30])
def test_schedule_is_what_diffusers_uses(steps: int) -> None:
    ours = flow.sigma_schedule(steps, 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=flow.pre_shift_sigmas(ours, 3.0))
    assert scheduler.sigmas.tolist() == pytest.approx(ours, abs=1e-6)


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        flow.sigma_schedule(0, 3.0)


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


def test_sampled_sigmas_follow_the_shifted_uniform_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = flow.sample_sigma(20_000, 3.0, generator)
    # P(sigma <= s) is the inverse shift of s.
    for s in (0.3, 0.5, 0.75, 0.9):
        expected = flow.unshift_sigma(s, 3.0)
        assert (sigma <= s).float().mean().item() == pytest.approx(float(expected), abs=0.015)
    bounded = flow.sample_sigma(1000, 3.0, generator, low=0.1, high=0.4)
    assert bounded.min() >= 0.1
    assert bounded.max() <= 0.4
