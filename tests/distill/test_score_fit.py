"""The score fitted to the teacher's images before the student's first turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from twostep.data.cache.build import open_cache
from twostep.distill.checkpoint import list_checkpoints
from twostep.distill.monitor import read_metrics
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.turns import ScoreTurn
from twostep.distill.trainer import Trainer
from twostep.errors import RecipeError
from twostep.families.family import Prediction, PromptBatch
from twostep.method.flow import add_noise, velocity_target
from twostep.recipe.schema import Recipe

Make = Callable[..., Recipe]
LORA = {"weights": "lora", "rank": 4, "backbone_dtype": "float32"}


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_cache(recipe))


@pytest.mark.parametrize("student", [{}, LORA], ids=["full", "lora"])
def test_only_the_score_learns_and_then_no_more(make_recipe: Make, student: dict[str, Any]) -> None:
    recipe = make_recipe(
        student=student,
        score={"fit_turns": 30, "learning_rate": 2e-3},
        training={"batch_size": 8, "turns": 4},
    )
    trainer = trainer_of(recipe)
    modules = dict(trainer.state.modules)
    start = {n: [p.clone() for p in m.parameters()] for n, m in modules.items()}

    def loss() -> float:
        """On what is drawn the same each time."""
        draws = [Draws(9, number, "score", device=trainer.device) for number in range(4)]
        batch = trainer.learner.batches.read(0, "score")
        return sum(trainer.learner.objectives.score(batch, d).loss.item() for d in draws)

    before = loss()
    for _ in range(30):
        trainer.learner.fit_score()
    assert loss() < 0.97 * before
    for name, module in modules.items():
        moved = any(
            not torch.equal(a, b) for a, b in zip(start[name], module.parameters(), strict=True)
        )
        # At the end the fakes are given what was learnt.
        assert moved == (name in ("score", "fake1", "fake2")), name
    for fake in ("fake1", "fake2"):
        pairs = zip(modules[fake].parameters(), modules["score"].parameters(), strict=True)
        assert all(torch.equal(own, fitted) for own, fitted in pairs)
    fitted = [p.clone() for p in trainer.roles.score.parameters()]
    trainer.train()
    assert trainer.progress.turn == 4
    assert all(
        torch.equal(a, b) for a, b in zip(fitted, trainer.roles.score.parameters(), strict=True)
    )
    assert "score" not in trainer.state.optimizers
    assert not trainer.learner.updates["score"].optimizers["score"].state
    # It is written once, beside the checkpoints, and not into each of them.
    (stored,) = trainer.folder.frozen.rglob("*.safetensors")
    assert len(load_file(stored)) == len(fitted)
    for checkpoint in list_checkpoints(trainer.folder.checkpoints):
        assert not [k for k in load_file(checkpoint / "state.safetensors") if "score" in k]


def test_the_loss_is_flow_matching_on_the_teachers_images(make_recipe: Make) -> None:
    trainer = trainer_of(make_recipe(score={"fit_turns": 2}))
    batch = trainer.learner.batches.read(0, "student")
    found = trainer.learner.objectives.score(
        batch, Draws(0, 0, "score", device=trainer.device)
    ).loss
    draws = Draws(0, 0, "score", device=trainer.device)
    tau = draws.sigma(
        len(batch.latents), trainer.cache.spec.schedule, trainer.recipe.losses.tau_range
    )
    noise = draws.normal_like(batch.latents)
    velocity = trainer.roles.teacher(add_noise(batch.latents, noise, tau), tau, batch.prompts)
    # The fit begins at the teacher's weights.
    expected = (velocity.velocity - velocity_target(batch.latents, noise)).square().mean()
    torch.testing.assert_close(found, expected)


def test_dropped_captions_are_the_empty_one(make_recipe: Make) -> None:
    trainer = trainer_of(make_recipe(score={"fit_turns": 2, "caption_dropout": 0.5}))
    batch = trainer.learner.batches.read(0, "student")
    seen: list[PromptBatch] = []
    velocity = trainer.roles.score.velocity

    def watch(
        latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        seen.append(prompts)
        return velocity(latents, sigma, prompts, taps)

    trainer.roles.score.velocity = watch
    turn = ScoreTurn(trainer.recipe, trainer.roles, trainer.cache.spec.schedule)
    drawn = 0
    for number in range(8):
        turn(batch, Draws(0, number, "score", device=trainer.device))
        prompts = seen[-1]
        for row in range(len(prompts)):
            own, empty = batch.prompts.embeds[row], batch.empty.embeds[row]
            dropped = torch.equal(prompts.embeds[row], empty)
            assert dropped or torch.equal(prompts.embeds[row], own)
            lengths = (batch.empty if dropped else batch.prompts).lengths
            assert prompts.lengths[row] == lengths[row]
            drawn += dropped
    assert 6 <= drawn <= 26  # of 32


@pytest.mark.parametrize("stop_in", ["fit", "turns"])
def test_resumed_in_the_fit_or_after_equals_the_uninterrupted_run(
    make_recipe: Make, stop_in: str
) -> None:
    def recipe(name: str) -> Recipe:
        return make_recipe(name, score={"fit_turns": 5}, training={"turns": 3, "save_every": 1})

    whole = trainer_of(recipe("whole"))
    whole.train()
    begun = trainer_of(recipe("parts"))
    begun.folder.describe(begun.recipe, "cpu")
    for _ in range(3 if stop_in == "fit" else 5):
        begun.learner.fit_score()
    if stop_in == "turns":
        begun.learner.turn()
    begun.state.save(begun.folder.checkpoints, 2, begun.world)
    resumed = trainer_of(recipe("parts"))
    expected = (3, 0) if stop_in == "fit" else (5, 1)
    assert (resumed.progress.score_turn, resumed.progress.turn) == expected
    resumed.train()
    for name, module in whole.state.modules.items():
        pairs = zip(module.parameters(), resumed.state.modules[name].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_records_before_the_students_first_turn_count_up_to_it(make_recipe: Make) -> None:
    recipe = make_recipe(score={"fit_turns": 3}, training={"turns": 3, "save_every": 1})
    trainer_of(recipe).train()
    seen = [r["turn"] for r in read_metrics(recipe.run_folder)]
    assert seen == [-2, -1, 0, 1, 2, 3]
    names = [p.name for p in list_checkpoints(recipe.run_folder / "checkpoints")]
    assert names == ["turn-0000002", "turn-0000003"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"score": {"fit_turns": 5, "guidance_scale": 2.0}}, "guidance_scale"),
        (
            {"score": {"fit_turns": 5, "model": "zoo:emoji-base"}, "student": LORA},
            "leave score.model empty",
        ),
        ({"score": {"fit_turns": -1}}, "score.fit_turns"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_recipe: Make, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(**sections)


def test_guidance_with_a_fitted_score_wants_captions_dropped(make_recipe: Make) -> None:
    score = {"fit_turns": 2, "guidance_scale": 0.5, "caption_dropout": 0.1}
    trainer = trainer_of(make_recipe(score=score, training={"turns": 3}))
    trainer.train()
    assert trainer.progress.skipped == {}
