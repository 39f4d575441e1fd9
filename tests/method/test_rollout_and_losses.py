"""Points 1 to 4 of "What must hold" (docs/method.md), and the losses against closed forms."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import nn

from twostep.method import losses
from twostep.method.critic import CriticHeads
from twostep.method.rollout import euler, first_step, guided, second_step, seeded_noise, two_step
from twostep.method.schedule import Schedule, sigma_schedule

SCHEDULE = Schedule(3.0, 0.75)
SHAPE = (5, 2, 4, 4)


class Field(nn.Module):
    """A small velocity field, smooth in everything; double precision for finite differences."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("ij,bjhw->bihw", self.weight, latents)
        return torch.tanh(mixed) * (1 + sigma[:, None, None, None])


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_two_steps_with_one_field_are_two_euler_steps() -> None:
    field = Field(0)
    rollout = two_step(field, field, noise(), SCHEDULE)
    middle = {}
    result = euler(field, noise(), sigma_schedule(2, 3.0), lambda i, x: middle.update({i: x}))
    torch.testing.assert_close(rollout.clean2, result)
    torch.testing.assert_close(rollout.latents2, middle[0])


def test_clean1_is_where_step_1_points() -> None:
    first, second = Field(0), Field(1)
    rollout = two_step(first, second, noise(), SCHEDULE)
    ones = torch.ones(SHAPE[0], dtype=torch.float64)
    torch.testing.assert_close(rollout.clean1, noise() - first(noise(), ones))
    torch.testing.assert_close(rollout.latents2, 0.25 * rollout.clean1 + 0.75 * noise())


def test_renoise_puts_fresh_noise_on_clean1() -> None:
    fresh = torch.randn(SHAPE, dtype=torch.float64)
    schedule = Schedule(3.0, 0.75, "renoise")
    rollout = two_step(Field(0), Field(1), noise(), schedule, lambda _: fresh)
    torch.testing.assert_close(rollout.latents2, 0.25 * rollout.clean1 + 0.75 * fresh)
    # Left to itself, an image's fresh noise follows from its own noise, whatever its batch.
    alone = two_step(Field(0), Field(1), noise()[1:], schedule)
    together = two_step(Field(0), Field(1), noise(), schedule)
    torch.testing.assert_close(alone.latents2, together.latents2[1:])


@pytest.mark.parametrize("transition", ["euler", "renoise"])
def test_two_halves_are_the_whole(transition: Literal["euler", "renoise"]) -> None:
    first, second, schedule = Field(0), Field(1), Schedule(3.0, 0.6, transition)
    between = first_step(first, noise(), schedule)
    whole = two_step(first, second, noise(), schedule)
    assert torch.equal(between.clean1, whole.clean1)
    assert torch.equal(between.latents2, whole.latents2)
    assert torch.equal(second_step(second, between.latents2, schedule), whole.clean2)


@pytest.mark.parametrize("transition", ["euler", "renoise"])
def test_cut_gradient_is_zero_and_end_to_end_gradient_is_right(transition: str) -> None:
    fresh = torch.ones(SHAPE, dtype=torch.float64)
    schedule = Schedule(3.0, 0.75, transition)  # type: ignore[arg-type]

    def final_loss(first: Field, end_to_end: bool) -> torch.Tensor:
        rollout = two_step(first, Field(1), noise(), schedule, lambda _: fresh, end_to_end)
        return rollout.clean2.square().mean()

    cut = Field(0)
    rollout = two_step(cut, Field(1), noise(), schedule, lambda _: fresh, False)
    (rollout.clean2.square().mean() + 0 * rollout.clean1.sum()).backward()
    assert torch.equal(cut.weight.grad, torch.zeros_like(cut.weight))

    first = Field(0)
    final_loss(first, True).backward()
    assert first.weight.grad is not None
    for i in range(2):
        for j in range(2):
            values = []
            for sign in (1, -1):
                moved = Field(0)
                with torch.no_grad():
                    moved.weight[i, j] += sign * 1e-5
                values.append(final_loss(moved, True).item())
            difference = (values[0] - values[1]) / 2e-5
            assert abs(difference) > 1e-4
            assert first.weight.grad[i, j].item() == pytest.approx(difference, rel=1e-6)


def test_guided_field() -> None:
    a, b = Field(0), Field(1)
    x, sigma = noise(), torch.ones(SHAPE[0], dtype=torch.float64)
    torch.testing.assert_close(guided(a, b, 2.0)(x, sigma), 3 * a(x, sigma) - 2 * b(x, sigma))
    assert guided(a, None, 0.0) is a
    with pytest.raises(ValueError, match="unconditional"):
        guided(a, None, 1.0)


def test_noise_of_a_seed_does_not_depend_on_its_batch() -> None:
    batch = seeded_noise([1, 2, 3], (2, 4, 4))
    assert torch.equal(batch[1:2], seeded_noise([2], (2, 4, 4)))
    assert not torch.equal(batch[0], batch[1])


def test_distribution_matching_gradient_is_the_normalised_difference() -> None:
    torch.manual_seed(0)
    clean = torch.randn(3, 2, 4, 4, requires_grad=True)
    score, fake = torch.randn(2, 3, 2, 4, 4)
    losses.distribution_matching(clean, score, fake).backward()
    scale = (clean.detach() - score).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(clean.grad, (fake - score) / scale / clean.numel())


def test_distribution_matching_vanishes_where_score_and_fake_agree() -> None:
    clean = torch.randn(3, 2, 4, 4, requires_grad=True)
    same = torch.randn(3, 2, 4, 4)
    losses.distribution_matching(clean, same, same).backward()
    assert torch.equal(clean.grad, torch.zeros_like(clean))


def test_distribution_matching_weighs_samples_alike() -> None:
    """A sample whose predictions are ten times as far away pulls no harder."""
    clean = torch.zeros(2, 1, 4, 4, requires_grad=True)
    score = torch.ones(2, 1, 4, 4) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1)
    losses.distribution_matching(clean, score, -score).backward()
    torch.testing.assert_close(clean.grad[0], clean.grad[1])


def test_augmentation_and_matching_together_are_matching_under_a_guided_score() -> None:
    """Weight alpha - 1: so that the paper's values can be typed in as they stand."""
    torch.manual_seed(0)
    clean = torch.randn(3, 2, 4, 4, requires_grad=True)
    score, without, fake = torch.randn(3, 3, 2, 4, 4)
    alpha = 4.5
    matching = losses.distribution_matching(clean, score, fake)
    (matching + (alpha - 1) * losses.guidance_augmentation(clean, score, without)).backward()
    guided = without + alpha * (score - without)
    scale = (clean.detach() - score).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(clean.grad, (fake - guided) / scale / clean.numel())


def test_the_critics_heads_compute_in_fp32_under_autocast() -> None:
    """Small differences between samples, which the penalty divides by its noise, must survive."""
    torch.manual_seed(0)
    heads = CriticHeads(16, 2, 8)
    hidden = [torch.randn(1, 16, 16).expand(64, -1, -1) for _ in range(2)]
    near = [h + 1e-3 * torch.randn(64, 16, 16) for h in hidden]
    expected = heads(near, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found, start = heads(near, 4, 4), heads(hidden, 4, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert ((found - start) != 0).float().mean() > 0.99


def test_adversarial_losses_at_known_logits() -> None:
    zero, large = torch.zeros(4, 3), torch.full((4, 3), 30.0)
    assert losses.critic_adversarial(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert losses.critic_adversarial(large, -large).item() == pytest.approx(0, abs=1e-6)
    assert losses.generator_adversarial(zero).item() == pytest.approx(math.log(2))
    assert losses.generator_adversarial(-large).item() == pytest.approx(30, abs=1e-3)


def test_critic_of_equal_distributions_has_logit_zero() -> None:
    """The optimum of the critic's loss for equal inputs: zero, from any start."""
    logit = torch.tensor([[2.0]], requires_grad=True)
    optimizer = torch.optim.SGD([logit], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        losses.critic_adversarial(logit, logit).backward()
        optimizer.step()
    assert logit.item() == pytest.approx(0, abs=1e-4)


def test_approximate_r1_is_the_squared_gradient_of_a_linear_critic() -> None:
    torch.manual_seed(0)
    weight, clean = torch.randn(64), torch.randn(20_000, 64)
    std = 0.01
    moved = clean + std * torch.randn_like(clean)
    penalty = losses.approximate_r1((clean @ weight)[:, None], (moved @ weight)[:, None], std)
    assert penalty.item() == pytest.approx(weight.square().sum().item(), rel=0.05)


def test_flow_matching_and_regression_values() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert losses.flow_matching(a, b).item() == pytest.approx(2.5)
    assert losses.regression(a, b).item() == pytest.approx(1.5)
