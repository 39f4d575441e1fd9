"""Settings of single losses: whose noise levels, which target, and how they change over a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from twostep.data.cache.build import open_cache
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.terms import Seen, follow_trajectory
from twostep.distill.trainer import Trainer
from twostep.errors import RecipeError
from twostep.method.flow import add_noise
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_cache(recipe))


def draws(turn: int = 0) -> Draws:
    return Draws(0, turn, "student", device=torch.device("cpu"))


def test_following_the_trajectory_is_the_distance_to_the_teachers_latents(
    make_recipe: Make,
) -> None:
    """Zero for the image from which the cached noise leads exactly there."""
    losses: dict[str, Any] = {"warmup_turns": 0, "step1": {"trajectory": 1.0}}
    trainer = trainer_of(make_recipe(losses=losses))
    batch = trainer.learner.batches.read(0, "student")
    step = trainer.learner.objectives.student.judged["step1"]
    sigma = step.schedule.step2_sigma
    assert batch.trajectory is not None
    exact = (batch.trajectory - sigma * batch.noise) / (1 - sigma)
    assert follow_trajectory(step, Seen(exact, batch, draws())) < 1e-6
    off = follow_trajectory(step, Seen(exact + 1, batch, draws()))
    assert off == pytest.approx(1 - sigma, rel=1e-4)


def test_the_trajectory_is_followed_from_the_cached_noise(make_recipe: Make) -> None:
    losses: dict[str, Any] = {
        "warmup_turns": 0,
        "final": {"weight": 0.0},
        "step1": {"trajectory": 1.0, "adversarial": 0.0, "distribution_matching": 0.0},
    }
    trainer = trainer_of(make_recipe(losses=losses))
    batch, student = trainer.learner.batches.read(0, "student"), trainer.learner.objectives.student
    turn = student(batch, draws())
    rollout = student.rollout(batch.noise, batch.prompts, draws())
    assert batch.trajectory is not None
    expected = 0.5 * (rollout.latents2 - batch.trajectory).abs().mean()
    assert turn.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    turn.backward()
    assert any(p.grad is not None for p in trainer.roles.first.parameters())
    assert not any(p.grad is not None for p in trainer.roles.second.parameters())


def test_a_trajectory_off_the_teachers_grid_is_refused(make_recipe: Make) -> None:
    losses: dict[str, Any] = {"warmup_turns": 0, "step1": {"trajectory": 1.0}}
    with pytest.raises(RecipeError, match=r"losses\.step1\.trajectory needs step2_sigma"):
        open_cache(make_recipe(losses=losses, step2_sigma=0.71))


def test_a_steps_own_noise_levels_are_those_of_its_matching_and_its_fake(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: dict[str, Any] = {
        "warmup_turns": 0,
        "final": {"adversarial": 0.0},
        "step1": {"adversarial": 0.0, "tau_range": [0.75, 0.98]},
    }
    trainer = trainer_of(make_recipe(losses=losses))
    seen: list[tuple[float, float]] = []
    original = Draws.sigma

    def watched(self: Draws, count: int, schedule: Any, bounds: tuple[float, float]) -> Any:
        seen.append(bounds)
        return original(self, count, schedule, bounds)

    monkeypatch.setattr(Draws, "sigma", watched)
    objectives, batches = trainer.learner.objectives, trainer.learner.batches
    objectives.student(batches.read(0, "student"), draws())
    assert seen == [(0.75, 0.98), (0.02, 0.98)]
    seen.clear()
    objectives.critic(batches.read(0, "critic"), draws())
    assert seen == [(0.75, 0.98), (0.02, 0.98)]


def test_the_critics_weight_goes_from_one_factor_to_the_other(make_recipe: Make) -> None:
    losses: dict[str, Any] = {
        "warmup_turns": 0,
        "final": {"distribution_matching": 0.0},
        "step1": {"distribution_matching": 0.0},
    }
    recipe = make_recipe(
        losses=losses, critic={"weight_over_run": [0.0, 2.0]}, training={"turns": 4}
    )
    trainer = trainer_of(recipe)
    learner, student = trainer.learner, trainer.learner.objectives.student
    batch = learner.batches.read(0, "student")
    found = []
    for turn in (0, 1, 2, 4):
        learner.progress.turn = turn
        learner.set_rates()
        found.append(student(batch, draws()).loss.item())
    assert found[0] == 0
    assert found[1:] == pytest.approx([found[2] / 2, found[2], 2 * found[2]])


def test_a_critics_reals_from_a_folder_show_the_prompts_of_its_fakes(
    make_recipe: Make, tmp_path: Any
) -> None:
    """Each picture is of one colour, by which it is known again among the latents."""
    import json

    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    recipe = make_recipe(data={"reals": str(folder)}, losses={"warmup_turns": 0})
    own = make_recipe(losses={"warmup_turns": 0})
    prompts = open_cache(own).spec.prompts
    lines = []
    for place, prompt in enumerate(prompts):
        Image.new("RGB", (32, 32), (10 * place % 256, 90, 40)).save(folder / f"{place}.png")
        lines.append(json.dumps({"file_name": f"{place}.png", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    batches = trainer_of(recipe).learner.batches
    (external,) = batches.reals.values()
    names = sorted(f"{i}.png" for i in range(len(prompts)))
    of_prompt = {prompts[int(name[:-4])]: external.latents[i] for i, name in enumerate(names)}
    number = 3
    ids = batches.order.batch(number, batches.size, purpose="critic")
    asked = [prompts[i // batches.cache.spec.samples_per_prompt] for i in ids]
    batch = batches.read(number, "critic")
    assert torch.equal(batch.reals, torch.stack([of_prompt[p] for p in asked]))
    # In parts as in the whole.
    part = batches.read(number, "critic", slice(1, 2))
    assert torch.equal(part.reals, batch.reals[1:2])
    batches.pairs_by_prompt = False
    other = batches.read(number, "critic")
    assert not torch.equal(other.reals, batch.reals)
    assert torch.equal(batches.read(number, "critic", slice(1, 2)).reals, other.reals[1:2])


def test_add_noise_leads_where_the_student_does(make_recipe: Make) -> None:
    """The term relies on it: re-noising step 1's image with its own noise is the Euler step."""
    trainer = trainer_of(make_recipe(losses={"warmup_turns": 0}))
    batch, student = trainer.learner.batches.read(0, "student"), trainer.learner.objectives.student
    rollout = student.rollout(batch.noise, batch.prompts, draws())
    sigma = student.schedule.step2_sigma
    torch.testing.assert_close(
        add_noise(rollout.clean1, batch.noise, sigma), rollout.latents2, atol=1e-5, rtol=1e-4
    )
