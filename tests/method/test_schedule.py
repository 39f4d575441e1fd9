from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from twostep.method.flow import unshift_sigma
from twostep.method.schedule import Schedule, sigma_schedule

Z_IMAGE_TURBO_8 = [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0]


def test_schedules_of_z_image_turbo() -> None:
    assert sigma_schedule(8, 3.0) == pytest.approx(Z_IMAGE_TURBO_8)
    assert sigma_schedule(4, 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert sigma_schedule(2, 3.0) == pytest.approx([1, 0.75, 0])


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 30])
def test_schedule_is_what_diffusers_uses(steps: int) -> None:
    ours = sigma_schedule(steps, 3.0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=Schedule.of(3.0).before_shift(ours))
    assert scheduler.sigmas.tolist() == pytest.approx(ours, abs=1e-6)


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sigma_schedule(0, 3.0)


def test_sampled_sigmas_follow_the_shifted_uniform_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = Schedule.of(3.0).draw(20_000, generator)
    # P(sigma <= s) is the inverse shift of s.
    for s in (0.3, 0.5, 0.75, 0.9):
        expected = unshift_sigma(s, 3.0)
        assert (sigma <= s).float().mean().item() == pytest.approx(float(expected), abs=0.015)
    bounded = Schedule.of(3.0).draw(1000, generator, (0.1, 0.4))
    assert bounded.min() >= 0.1
    assert bounded.max() <= 0.4


def test_a_schedule_takes_its_second_level_from_two_steps_of_the_teacher() -> None:
    assert Schedule.of(3.0).step2_sigma == sigma_schedule(2, 3.0)[1]
    assert Schedule.of(3.0, 0.5).step2_sigma == 0.5
    assert Schedule.of(3.0).place_of_step2(8) == 4
    assert Schedule.of(3.0).place_of_step2(3) is None


@pytest.mark.parametrize("sigma", [0.0, 1.0, -0.1, float("nan")])
def test_a_second_level_outside_the_path_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="step2_sigma must be between 0 and 1"):
        Schedule(3.0, sigma)


def test_an_unknown_transition_is_refused() -> None:
    with pytest.raises(ValueError, match="transition must be euler or renoise, got 'jump'"):
        Schedule(3.0, 0.75, "jump")  # type: ignore[arg-type]
