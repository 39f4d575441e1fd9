"""The whole method on eight Gaussians in the plane: about a minute on one CPU core.

    python examples/toy_2d.py --out runs/toy_2d

Read it from top to bottom. The sampler, the schedule and every loss are the package's own; only
the networks are toys. An image here is a point, a latent of shape (B, 2, 1, 1). Two parts are left
out: guidance augmentation, as there is no prompt to guide with, and regression on the teacher's
pairs, which in two dimensions would solve the toy alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from twostep.method.flow import add_noise, clean_from_velocity, velocity_target
from twostep.method.losses import (
    critic_adversarial,
    distribution_matching,
    flow_matching,
    generator_adversarial,
)
from twostep.method.rollout import VelocityField, euler, two_step
from twostep.method.schedule import Schedule

SHIFT = 3.0  # Z-Image Turbo's
SCHEDULE = Schedule.of(SHIFT)  # .75, which is on the teacher's own grid
BATCH = 512
STEP1_WEIGHT = 0.5
ADVERSARIAL_WEIGHT = 0.3
EMA_DECAY = 0.99
CRITIC_TURNS = 3  # to each student turn
COUNT = 65536  # samples per set


# 1. The teacher. For a mixture of Gaussians the velocity has a closed form, so the toy needs no
#    training data, and one field serves as teacher (8 Euler steps) and as score (any sigma).


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussians: weights (K,) that sum to 1, means (K, 2), one std."""

    weights: Tensor
    means: Tensor
    std: float

    def velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - clean | x_sigma], exactly. latents (B, 2, 1, 1), sigma (B,)."""
        keep, level = (1 - sigma).view(-1, 1), sigma.view(-1, 1)
        # Given mode k, x_sigma is N(keep * mean_k, variance) and all is jointly Gaussian.
        variance = keep.square() * self.std**2 + level.square()  # (B, 1)
        offset = latents.flatten(1)[:, None] - keep[..., None] * self.means  # (B, K, 2)
        log_density = -offset.square().sum(-1) / (2 * variance)
        posterior = (self.weights.log() + log_density).softmax(dim=1)  # (B, K)
        slope = (level - keep * self.std**2) / variance
        per_mode = slope[..., None] * offset - self.means
        return (posterior[..., None] * per_mode).sum(1).view_as(latents)


def ring() -> Mixture:
    """Eight narrow modes of unequal weight: a dropped or merged mode shows at once."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    weights = torch.tensor([1.0, 3.0, 2.0, 4.0, 1.0, 2.0, 3.0, 2.0])
    means = 3.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Mixture(weights / weights.sum(), means, std=0.2)


# 2. The networks: one velocity field per role, and a critic.


class Net(nn.Module):
    """A small MLP on (point, sigma): a `VelocityField` with 2 outputs, a critic with 1."""

    def __init__(self, outputs: int = 2, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in (2 + 5, width, width):
            layers += [nn.Linear(size, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """Latents (B, 2, 1, 1) and sigma (B,) to (B, outputs, 1, 1)."""
        waves = [torch.cos(math.pi * k * sigma) for k in range(1, 5)]
        inputs = torch.cat([latents.flatten(1), torch.stack([sigma, *waves], dim=1)], dim=1)
        return self.body(inputs)[..., None, None]


class Student(nn.Module):
    """Two independent parameter sets, one per step, both starting as the teacher's weights."""

    def __init__(self, weights: Net) -> None:
        super().__init__()
        self.first, self.second = copy.deepcopy(weights), copy.deepcopy(weights)


def updater(module: nn.Module, rate: float, turns: int) -> Callable[[Tensor], None]:
    """Adam with little momentum, for moving targets; the rate falls to 5 % so that they settle."""
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.5, 0.99))
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, turns)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()  # also drops what another role's loss left in these weights
        loss.backward()
        optimizer.step()
        decay.step()

    return update


# 3. Before distillation: weights that know the teacher's field.


def teacher_weights(score: VelocityField, images: Tensor, turns: int = 1500) -> Net:
    """A network that imitates the exact field; in real life the teacher already is one."""
    field = Net()
    update = updater(field, 2e-3, turns)
    for _ in range(turns):
        clean = draw(images)
        sigma = SCHEDULE.draw(len(clean))
        latents = add_noise(clean, torch.randn_like(clean), sigma)
        update(flow_matching(field(latents, sigma), score(latents, sigma)))
    return field


def draw(images: Tensor) -> Tensor:
    return images[torch.randint(len(images), (BATCH,))]


# 4. Distillation: student turn, critic turn.


def matching(clean: Tensor, score: VelocityField, fake: VelocityField) -> Tensor:
    """Distribution matching: toward where the score denoises to, away from where the fake does."""
    sigma = SCHEDULE.draw(len(clean), bounds=(0.02, 0.98))
    with torch.no_grad():
        latents = add_noise(clean, torch.randn_like(clean), sigma)
        score_clean = clean_from_velocity(latents, score(latents, sigma), sigma)
        fake_clean = clean_from_velocity(latents, fake(latents, sigma), sigma)
    return distribution_matching(clean, score_clean, fake_clean)


def follow(clean: Tensor, fake: VelocityField) -> Tensor:
    """The fake score's loss: ordinary flow matching, on the student's samples."""
    sigma, noise = SCHEDULE.draw(len(clean)), torch.randn_like(clean)
    return flow_matching(fake(add_noise(clean, noise, sigma), sigma), velocity_target(clean, noise))


def renoised_logits(critic: Net, clean: Tensor, sigma: Tensor) -> Tensor:
    """The critic never sees a clean sample: at every level, the two distributions overlap."""
    return critic(add_noise(clean, torch.randn_like(clean), sigma), sigma).flatten(1)


def distil(weights: Net, score: VelocityField, images: Tensor, turns: int) -> Student:
    """Trains a student against the teacher's `images`; returns its running average."""
    student, average = Student(weights), Student(weights)
    # clean1 and clean2 are distributed differently, so each step has a fake score of its own.
    fake1, fake2, critic = copy.deepcopy(weights), copy.deepcopy(weights), Net(outputs=1)
    update_student = updater(student, 5e-4, turns)
    update_fakes = updater(nn.ModuleList([fake1, fake2]), 1e-3, turns * CRITIC_TURNS)
    update_critic = updater(critic, 1e-3, turns * CRITIC_TURNS)

    for _ in range(turns):
        # Critic turns first: the student should never be judged by a critic that lags behind.
        for _ in range(CRITIC_TURNS):
            with torch.no_grad():
                out = two_step(student.first, student.second, torch.randn(BATCH, 2, 1, 1), SCHEDULE)
            update_fakes(follow(out.clean1, fake1) + follow(out.clean2, fake2))
            # Real means the TEACHER's sample, noised to the same level as the student's.
            sigma = SCHEDULE.draw(BATCH)
            real_logits = renoised_logits(critic, draw(images), sigma)
            fake_logits = renoised_logits(critic, out.clean2, sigma)
            update_critic(critic_adversarial(real_logits, fake_logits))

        # Student turn. End-to-end: the loss on clean2 reaches `first` through latents2. The loss on
        # clean1 keeps step 1 a sample in its own right, not a private code for step 2.
        out = two_step(student.first, student.second, torch.randn(BATCH, 2, 1, 1), SCHEDULE)
        logits = renoised_logits(critic, out.clean2, SCHEDULE.draw(BATCH))
        final_loss = matching(
            out.clean2, score, fake2
        ) + ADVERSARIAL_WEIGHT * generator_adversarial(logits)
        step1_loss = matching(out.clean1, score, fake1)
        update_student(final_loss + STEP1_WEIGHT * step1_loss)
        with torch.no_grad():
            for mean, new in zip(average.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 1 - EMA_DECAY)
    return average


# 5. The verdict.


def sliced_distance(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Sliced Wasserstein-1 between point sets of equal size, in the units of the plane."""
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])  # (2, directions)
    a_sorted, b_sorted = ((points.flatten(1) @ axes).sort(dim=0).values for points in (a, b))
    return (a_sorted - b_sorted).abs().mean().item()


def draw_panels(panels: dict[str, Tensor], path: Path) -> None:
    """Writes the point sets side by side."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4.2))
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        x, y = points[:4000].flatten(1).T.numpy()
        axis.scatter(x, y, s=2, alpha=0.3, linewidths=0)
        axis.set(title=title, xlim=(-4, 4), ylim=(-4, 4), aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def run(turns: int, seed: int, out: Path) -> dict[str, float]:
    """Distils for `turns` student turns; writes toy_2d.png and toy_2d.json into `out`.

    Returns:
        Distances to teacher samples. `floor` is that of other teacher samples, and `gap_closed` is
        1 for a student at the floor, 0 for one no better than `naive_2`.
    """
    torch.manual_seed(seed)
    teacher = ring().velocity
    images = euler(teacher, torch.randn(COUNT, 2, 1, 1), SCHEDULE.sigmas(8))
    weights = teacher_weights(teacher, images)
    student = distil(weights, teacher, images, turns)

    # Fresh noise for everyone: the reference, the floor and the students share none.
    reference = euler(teacher, torch.randn(COUNT, 2, 1, 1), SCHEDULE.sigmas(8))
    other = euler(teacher, torch.randn(COUNT, 2, 1, 1), SCHEDULE.sigmas(8))
    noise = torch.randn(COUNT, 2, 1, 1)
    naive = euler(teacher, noise, SCHEDULE.sigmas(2))
    with torch.no_grad():
        final = two_step(student.first, student.second, noise, SCHEDULE)
    figures = {
        "floor": sliced_distance(other, reference),
        "naive_2": sliced_distance(naive, reference),
        "student_2": sliced_distance(final.clean2, reference),
        "student_step1": sliced_distance(final.clean1, reference),
    }
    gap = figures["naive_2"] - figures["floor"]
    figures["gap_closed"] = 1 - (figures["student_2"] - figures["floor"]) / gap

    out.mkdir(parents=True, exist_ok=True)
    (out / "toy_2d.json").write_text(json.dumps(figures, indent=2) + "\n")
    panels = {
        "teacher, 8 steps": reference,
        "naive, 2 steps": naive,
        "student, 2 steps": final.clean2,
        "student, after step 1": final.clean1,
    }
    draw_panels(panels, out / "toy_2d.png")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/toy_2d"))
    parser.add_argument("--turns", type=int, default=1200, help="student turns")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # faster than many, for networks this small
    started = time.perf_counter()
    figures = run(arguments.turns, arguments.seed, arguments.out)
    print(" ".join(f"{name} {value:.4f}" for name, value in figures.items()))
    print(f"{arguments.out / 'toy_2d.png'} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
