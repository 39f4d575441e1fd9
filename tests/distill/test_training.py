"""Points 2, 3, 5 and 6 of "What must hold" on real transformers, and the loop's promises."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import random_transformer
from twostep.data.cache.build import open_cache
from twostep.distill import tensor_files
from twostep.distill.best import BestStudent
from twostep.distill.checkpoint import CheckpointError, list_checkpoints
from twostep.distill.ema import Ema
from twostep.distill.monitor import Monitor, read_metrics
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.draws import Draws
from twostep.distill.trainer import Interrupted, Trainer
from twostep.distill.update import TrainingStopped
from twostep.errors import RecipeError
from twostep.evaluation.scorers import ScorerError
from twostep.inference.pipeline import TwoStepPipeline
from twostep.inference.sampler import Sampler
from twostep.method.rollout import Rollout
from twostep.models.folder import ModelFolder
from twostep.recipe.schema import Recipe
from twostep.runtime.memory_meter import weight_bytes

Make = Callable[..., Recipe]
CPU = torch.device("cpu")


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_cache(recipe))


def gradients(trainer: Trainer, warming: bool = False) -> tuple[list, list]:
    batch = trainer.learner.batches.read(0, "student")
    draws = Draws(0, 0, "student", device=CPU)
    turn = (
        trainer.learner.objectives.student.warmup(batch, draws)
        if warming
        else trainer.learner.objectives.student(batch, draws)
    )
    trainer.state.optimizers["student"].zero_grad()
    turn.loss.backward()
    return tuple(
        [p.grad.clone() for p in role.parameters() if p.grad is not None]
        for role in (trainer.roles.first, trainer.roles.second)
    )  # type: ignore[return-value]


FINAL_ONLY = {"step1": {"weight": 0.0}, "final": {"adversarial": 0.1}, "warmup_turns": 0}


@pytest.mark.parametrize("transition", ["euler", "renoise"])
def test_final_loss_reaches_first_only_end_to_end(make_recipe: Make, transition: str) -> None:
    cut = make_recipe(
        "cut", losses=FINAL_ONLY, student={"gradient": "cut", "transition": transition}
    )
    through = make_recipe("through", losses=FINAL_ONLY, student={"transition": transition})
    first, second = gradients(trainer_of(cut))
    assert first == []
    assert all(g.abs().sum() > 0 for g in second[:5])
    first, _ = gradients(trainer_of(through))
    assert sum(g.abs().sum() for g in first) > 0


def test_end_to_end_gradient_equals_finite_differences(make_recipe: Make) -> None:
    """On the deterministic warm-up loss, in double precision, along a random direction."""
    trainer = trainer_of(make_recipe(losses={"step1": {"weight": 0.0}}))
    for role in (trainer.roles.first, trainer.roles.second):
        role.model.double()
    batch = trainer.learner.batches.read(0, "student")
    first = trainer.roles.first.parameters()

    def loss() -> torch.Tensor:
        rollout = trainer.learner.objectives.student.rollout(
            batch.noise.double(), batch.prompts, Draws(0, 0, "student", device=CPU)
        )
        return rollout.clean2.square().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in first]
    slope = sum(
        (p.grad * d).sum() for p, d in zip(first, direction, strict=True) if p.grad is not None
    )
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(first, direction, strict=True):
                p.add_(d, alpha=sign * 2e-4)
            values.append(loss())
    # The field answers in fp32 at its edge, which bounds how well differences can agree.
    assert float(slope) == pytest.approx(float(values[0] - values[1]) / 4e-4, rel=0.02)


def test_shared_steps_are_one_and_decoupled_steps_are_two(make_recipe: Make) -> None:
    shared = build_roles(
        make_recipe("s", student={"steps": "shared"}),
        ModelFolder.open(make_recipe("s", student={"steps": "shared"}).teacher.model),
        device=CPU,
    )
    assert shared.first is shared.second
    ids = {id(p) for p in shared.student_parameters()}
    assert len(ids) == len(shared.first.parameters())

    roles = build_roles(
        make_recipe("d"), ModelFolder.open(make_recipe("d").teacher.model), device=CPU
    )
    mine = {p.data_ptr() for p in roles.first.parameters()}
    assert mine.isdisjoint(p.data_ptr() for p in roles.second.parameters())
    before = [p.clone() for p in roles.second.parameters()]
    with torch.no_grad():
        for p in roles.first.parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, roles.second.parameters(), strict=True))


ONLY_CONSISTENCY = {
    "consistency": 1.0,
    "final": {"weight": 0.0},
    "step1": {"weight": 0.0},
    "warmup_turns": 0,
}


def test_consistency_compares_neighbours_along_the_teachers_steps(make_recipe: Make) -> None:
    """With one teacher step the target is the teacher's own answer; with more, worked out here."""
    values = {}
    for steps in (1, 2):
        recipe = make_recipe(
            f"lcd{steps}",
            teacher={"steps": steps},
            losses=ONLY_CONSISTENCY,
            student={"steps": "shared"},
            data={"cache": f"{make_recipe().data.cache}-{steps}"},
        )
        trainer = trainer_of(recipe)
        batch = trainer.learner.batches.read(0, "student")
        values[steps] = trainer.learner.objectives.student(
            batch, Draws(0, 0, "student", device=CPU)
        ).loss
        assert not trainer.learner.objectives.critic(batch, Draws(0, 0, "critic", device=CPU)).terms
    assert values[1].item() == 0

    draws, teacher = Draws(0, 0, "student", device=CPU), trainer.roles.teacher
    sigmas = [(1.0, 0.75), (0.75, 0.0)]
    chosen = torch.tensor([sigmas[i] for i in draws.integers(len(batch.noise), 2)])
    sigma, below = (c.view(-1, 1, 1, 1) for c in chosen.unbind(1))
    x = (1 - sigma) * batch.latents + sigma * draws.normal_like(batch.noise)
    with torch.no_grad():
        v = teacher(x, sigma.flatten(), batch.prompts).velocity
        y = x + (below - sigma) * v
        target = y - below * teacher(y, below.flatten(), batch.prompts).velocity
    expected = (x - sigma * v - target).abs().mean()
    torch.testing.assert_close(values[2].detach(), expected)
    values[2].backward()
    assert all(p.grad is not None for p in trainer.roles.first.parameters()[:5])


def test_a_student_can_start_from_another(make_recipe: Make) -> None:
    folder = trainer_of(make_recipe("begun")).train()
    roles = build_roles(
        make_recipe("next", student={"init": str(folder)}),
        ModelFolder.open(make_recipe("next", student={"init": str(folder)}).teacher.model),
        device=CPU,
    )
    for name, role in (("transformer", roles.first), ("transformer_2", roles.second)):
        weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        own = role.transformer().state_dict()
        assert all(torch.equal(own[key], value.float()) for key, value in weights.items())
    with pytest.raises(RecipeError, match=r"two steps of .* differ"):
        build_roles(
            make_recipe(student={"init": str(folder), "steps": "shared"}),
            ModelFolder.open(
                make_recipe(student={"init": str(folder), "steps": "shared"}).teacher.model
            ),
            device=CPU,
        )
    with pytest.raises(RecipeError, match="is no student of this teacher"):
        build_roles(
            make_recipe(student={"init": "zoo:emoji-student"}),
            ModelFolder.open(make_recipe(student={"init": "zoo:emoji-student"}).teacher.model),
            device=CPU,
        )
    with pytest.raises(RecipeError, match="is no two-step student"):
        build_roles(
            make_recipe(student={"init": "zoo:emoji-teacher"}),
            ModelFolder.open(make_recipe(student={"init": "zoo:emoji-teacher"}).teacher.model),
            device=CPU,
        )


def test_distribution_matching_gradient_is_zero_when_the_fake_is_the_score(
    make_recipe: Make,
) -> None:
    quiet = {"adversarial": 0.0}
    losses = {"final": quiet, "step1": {**quiet, "weight": 1.0}, "warmup_turns": 0}
    trainer = trainer_of(
        make_recipe(losses=losses)
    )  # fakes start as the teacher, which is the score
    for side in gradients(trainer):
        assert side
        assert all(torch.equal(g, torch.zeros_like(g)) for g in side)


def test_each_loss_setting_changes_the_gradient(make_recipe: Make, tiny_folder: Path) -> None:
    quiet = {"distribution_matching": 0.0, "adversarial": 0.0}
    for name, losses in {
        "adversarial": {"final": {**quiet, "adversarial": 1.0}},
        "regression": {"final": {**quiet, "regression": 1.0}},
        "augmentation": {"final": {**quiet, "guidance_augmentation": 1.0}},
    }.items():
        losses |= {"step1": {"weight": 0.0}, "warmup_turns": 0}  # type: ignore[assignment]
        score = {"model": str(tiny_folder)} if name == "augmentation" else {}
        first, second = gradients(trainer_of(make_recipe(name, losses=losses, score=score)))
        assert sum(g.abs().sum() for g in first + second) > 0, name


def test_guided_score_moves_the_student_where_the_plain_score_does_not(
    make_recipe: Make, tiny_folder: Path
) -> None:
    quiet = {"adversarial": 0.0}
    losses = {"final": quiet, "step1": quiet, "warmup_turns": 0}
    score = {"model": str(tiny_folder), "guidance_scale": 2.0}
    first, _ = gradients(trainer_of(make_recipe(losses=losses, score=score)))
    assert sum(g.abs().sum() for g in first) > 0


def test_critic_turn_trains_fakes_and_heads_and_nothing_else(make_recipe: Make) -> None:
    trainer = trainer_of(make_recipe(critic={"r1": 0.1}))
    modules = trainer.state.modules
    before = {n: [p.clone() for p in m.parameters()] for n, m in modules.items()}
    trainer.learner.critic_step()
    for name, module in modules.items():
        moved = any(
            not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True)
        )
        assert moved == (name not in ("first", "second")), name


@pytest.mark.parametrize("paired", [True, False])
def test_the_critics_samples_come_from_the_reals_noise_and_the_fakes_do_not(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, paired: bool
) -> None:
    trainer = trainer_of(make_recipe(critic={"paired": paired}))
    batch = trainer.learner.batches.read(0, "student")
    rollout, seen = trainer.learner.objectives.student.rollout, []

    def spy(noise: torch.Tensor, *rest: Any) -> Any:
        seen.append(noise)
        return rollout(noise, *rest)

    monkeypatch.setattr(trainer.learner.objectives.student, "rollout", spy)
    followed: list[torch.Tensor] = []
    fits = trainer.learner.objectives.critic._fit
    fit = fits["final"]

    def spy_fit(velocity: Any, clean: torch.Tensor, *rest: Any) -> Any:
        followed.append(clean)
        return fit(velocity, clean, *rest)

    spies = dict.fromkeys(fits, spy_fit)
    monkeypatch.setattr(trainer.learner.objectives.critic, "_fit", spies)
    trainer.learner.objectives.critic(batch, Draws(0, 0, "critic", device=CPU))
    assert torch.equal(seen[-1], batch.noise) == paired
    # Fakes follow the student on noise that the cache does not have.
    fresh = rollout(seen[0], batch.prompts, Draws(0, 0, "critic", device=CPU))
    assert not torch.equal(seen[0], batch.noise)
    torch.testing.assert_close(followed, [fresh.clean1.detach(), fresh.clean2.detach()])
    # A student that makes the teacher's own pictures cannot be told from it.
    perfect = Rollout(batch.latents, batch.noise, batch.latents)
    monkeypatch.setattr(trainer.learner.objectives.student, "rollout", lambda *_: perfect)
    terms = trainer.learner.objectives.critic(batch, Draws(0, 0, "critic", device=CPU)).terms
    assert terms["critic/accuracy_final"] == 0.5


def test_student_turn_leaves_fakes_and_heads_alone(make_recipe: Make) -> None:
    trainer = trainer_of(make_recipe(losses={"warmup_turns": 0}))
    modules = trainer.state.modules
    trainer.learner.critic_step()
    before = {n: [p.clone() for p in m.parameters()] for n, m in modules.items()}
    trainer.learner.student_step(warming=False)
    for name, module in modules.items():
        moved = any(
            not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True)
        )
        assert moved == (name in ("first", "second")), name


def test_fakes_and_critic_get_their_own_warm_up_once(make_recipe: Make) -> None:
    training = {"critic_turns": 2, "critic_warmup_turns": 5}
    trainer = trainer_of(make_recipe(losses={"warmup_turns": 1}, training=training))
    taken = []
    for _ in range(4):
        trainer.learner.turn()
        taken.append(trainer.progress.critic_turn)
    assert taken == [0, 7, 9, 11]


def test_rates_fall_over_the_warm_up_and_at_the_end(make_recipe: Make) -> None:
    training = {
        "turns": 10, "learning_rate": 1e-4, "warmup_learning_rate": 5e-4,
        "learning_rate_decay": 0.4,
    }  # fmt: skip
    trainer = trainer_of(make_recipe(losses={"warmup_turns": 4}, training=training))
    seen = []
    for turn in range(10):
        trainer.progress.turn = turn
        trainer.learner.set_rates()
        seen.append(trainer.state.optimizers["student"].param_groups[0]["lr"] / 1e-4)
    expected = [5, 4, 3, 2, 1, 1, 1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.5, 0.1 + 0.9 * 0.25]
    assert seen == pytest.approx(expected)
    assert trainer.state.optimizers["fake"].param_groups[0]["lr"] == pytest.approx(
        2e-4 * expected[-1]
    )


def test_rates_rise_at_the_beginning_each_in_its_own_turns(make_recipe: Make) -> None:
    training = {"rate_warmup_turns": 4, "critic_warmup_turns": 2, "learning_rate_decay": 0.0}
    trainer = trainer_of(make_recipe(losses={"warmup_turns": 0}, training=training))
    seen: dict[str, list[float]] = {"student": [], "fake": [], "critic": []}
    for name, purpose in (("fake", "critic"), ("critic", "critic"), ("student", "student")):
        optimizer = trainer.learner.updates[purpose].optimizers[name]

        def note(opt: Any, *_: Any, name: str = name) -> None:
            seen[name].append(opt.param_groups[0]["lr"])

        optimizer.register_step_pre_hook(note)
    for _ in range(3):
        trainer.learner.turn()
    assert seen["student"] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4])
    assert seen["fake"] == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4])
    assert seen["critic"] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_fake_follows_the_student(make_recipe: Make) -> None:
    """Flow matching on a frozen student's samples brings the fake's loss down."""
    trainer = trainer_of(make_recipe(fake={"learning_rate": 2e-3}, training={"batch_size": 8}))
    history = [float(trainer.learner.critic_step()["fake/final"]) for _ in range(60)]
    assert sum(history[-10:]) < 0.8 * sum(history[:10])


def test_warmup_regresses_on_the_teacher(make_recipe: Make) -> None:
    for target in ("final", "trajectory"):
        trainer = trainer_of(
            make_recipe(
                target,
                losses={"warmup_turns": 40, "warmup_step1_target": target},
                training={"turns": 40, "learning_rate": 2e-3, "batch_size": 8},
            )
        )
        history = [trainer.learner.turn()["final/warmup"] for _ in range(40)]
        assert sum(history[-5:]) < 0.9 * sum(history[:5])


def test_trajectory_off_the_teachers_grid_is_refused(make_recipe: Make) -> None:
    recipe = make_recipe(losses={"warmup_step1_target": "trajectory"}, step2_sigma=0.6)
    with pytest.raises(RecipeError, match="on the teacher's grid"):
        trainer_of(recipe)


def test_run_leaves_a_student_metrics_pictures_and_its_recipe(make_recipe: Make) -> None:
    recipe = make_recipe()
    student = trainer_of(recipe).train()
    folder = recipe.run_folder
    assert Recipe.load(folder / "recipe.yaml") == recipe
    assert json.loads((folder / "run.json").read_text())["versions"]["torch"]
    records = read_metrics(folder)
    assert [r["turn"] for r in records] == [1, 2, 3, 4, 5, 6]
    last = records[-1]
    for key in (
        "loss",
        "final/distribution_matching",
        "final/adversarial",
        "critic/accuracy_final",
        "gradient_norm/first",
        "gradient_norm/second",
        "validation/diversity",
    ):
        assert key in last
    assert len(list((folder / "samples").glob("*.png"))) == 2
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == [
        "turn-0000004",
        "turn-0000006",
    ]
    assert sorted(p.name for p in student.iterdir()) == [
        "README.md",
        "checksums.json",
        "images",
        "model_index.json",
        "pipeline.py",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "transformer_2",
        "vae",
    ]


def test_pipeline_image_equals_the_trainers_rollout(make_recipe: Make) -> None:
    recipe = make_recipe(training={"autocast": False})
    trainer = trainer_of(recipe)
    student = trainer.train()
    samples = trainer.cache.read([0, 7])
    # The folder stores bf16; give the trainer's roles the same rounding.
    with trainer.state.ema.applied(), torch.no_grad():
        for p in trainer.roles.student_parameters():
            p.copy_(p.bfloat16().float())
        from twostep.families.family import PromptBatch

        prompts = PromptBatch.collate(samples.embeds)
        rollout = trainer.learner.objectives.student.rollout(
            samples.noise, prompts, Draws(0, 0, "student", device=CPU)
        )
    pipe = TwoStepPipeline.from_pretrained(student)
    result = pipe(
        prompt_embeds=samples.embeds,
        height=32,
        width=32,
        latents=samples.noise,
        output_type="latent",
        return_preview=True,
    )
    torch.testing.assert_close(result.images, rollout.clean2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.previews, rollout.clean1, atol=1e-5, rtol=1e-5)
    ours = Sampler.load(str(student)).sample(samples.prompts, samples.noise)
    torch.testing.assert_close(ours.latents, rollout.clean2, atol=1e-4, rtol=1e-4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(folder / "checkpoints")[-1] / "state.safetensors")


@pytest.mark.parametrize(
    ("variant", "settings", "data"),
    [
        ("decoupled", {}, {}),
        ("shared", {"optimizer": "adafactor"}, {}),
        ("decoupled", {"async_saves": True}, {"other_sizes": [[32, 64]]}),
    ],
    ids=["decoupled", "shared-adafactor", "async-sizes"],
)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    make_recipe: Make, variant: str, settings: dict[str, Any], data: dict[str, Any]
) -> None:
    def recipe(name: str, **changes: Any) -> Recipe:
        student = {"steps": variant, "transition": "renoise"}
        training = {"learning_rate_decay": 0.0, **settings, **changes}
        return make_recipe(name, student=student, training=training, data=data)

    whole, rest = recipe("whole"), recipe("parts")
    trainer_of(whole).train()
    trainer_of(recipe("parts", turns=4)).train()
    resumed = Trainer(rest, open_cache(rest))
    assert resumed.progress.turn == 4
    resumed.train()
    a, b = weights(whole.run_folder), weights(rest.run_folder)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [[r["loss"] for r in read_metrics(r.run_folder)] for r in (whole, rest)]
    assert losses[0] == losses[1]


def test_another_recipe_cannot_go_on_with_a_run(make_recipe: Make) -> None:
    trainer_of(make_recipe()).train()
    with pytest.raises(RecipeError, match=r"training.learning_rate was 0.0001, is 0.001"):
        trainer_of(make_recipe(training={"learning_rate": 1e-3}))
    trainer_of(make_recipe(training={"turns": 8}))  # longer is the same run


def test_damaged_checkpoint_is_named(make_recipe: Make) -> None:
    recipe = make_recipe()
    trainer_of(recipe).train()
    last = list_checkpoints(recipe.run_folder / "checkpoints")[-1]
    (last / "state.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="turn-0000006 cannot be resumed"):
        Trainer(recipe, open_cache(recipe))


def test_half_written_checkpoint_is_not_seen(make_recipe: Make) -> None:
    recipe = make_recipe()
    trainer_of(recipe).train()
    (recipe.run_folder / "checkpoints" / ".turn-0000099.tmp").mkdir()
    assert Trainer(recipe, open_cache(recipe)).progress.turn == 6


def test_a_checkpoint_written_meanwhile_is_of_the_turn_that_asked_for_it(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe())
    state, folder = trainer.state, trainer.folder.checkpoints
    trainer.learner.turn()
    asked = {key: value.clone() for key, value in state._tensors().items()}
    let_go, save_file = threading.Event(), tensor_files.save_file

    def slowly(*arguments: Any) -> None:
        assert let_go.wait(60)
        save_file(*arguments)

    monkeypatch.setattr(tensor_files, "save_file", slowly)
    state.save(folder, 2, trainer.world, background=True)
    trainer.learner.turn()
    state.settle(trainer.world)
    assert list_checkpoints(folder) == []
    let_go.set()
    state.settle(trainer.world, wait=True)
    saved = weights(trainer.folder.path)
    assert saved.keys() == asked.keys()
    assert all(torch.equal(saved[key], value) for key, value in asked.items())
    moved = state._tensors()
    assert not all(torch.equal(saved[key], value) for key, value in moved.items())


def test_a_write_that_failed_meanwhile_is_told(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe())

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    folder = trainer.folder.checkpoints
    trainer.state.save(folder, 2, trainer.world, background=True)
    with pytest.raises(OSError, match="no space left"):
        trainer.state.settle(trainer.world, wait=True)
    assert list_checkpoints(folder) == []


def test_non_finite_turns_are_skipped_counted_and_end_the_run(make_recipe: Make) -> None:
    recipe = make_recipe(training={"max_non_finite": 2})
    trainer = trainer_of(recipe)
    trainer.learner.student_step(warming=True)
    before = [p.clone() for p in trainer.roles.student_parameters()]
    healthy = trainer.cache.read

    def poisoned(ids):  # a bad sample, as a corrupted file system would give
        samples = healthy(ids)
        samples.latents[0, 0, 0, 0] = float("nan")
        return samples

    trainer.cache.read = poisoned  # type: ignore[method-assign]
    for _ in range(2):
        trainer.learner.student_step(warming=True)
    assert trainer.progress.skipped == {"student": 2}
    assert all(
        torch.equal(a, b) for a, b in zip(before, trainer.roles.student_parameters(), strict=True)
    )
    with pytest.raises(TrainingStopped, match="3 times in a row"):
        trainer.learner.student_step(warming=True)
    trainer.cache.read = healthy  # type: ignore[method-assign]
    trainer.learner.student_step(warming=True)
    assert trainer.progress.skipped_in_a_row == {}


def test_signal_saves_and_the_run_goes_on(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe(
        training={
            "turns": 100_000,
            "save_every": 100_000,
            "validate_every": 100_000,
            "sample_every": 100_000,
            "keep_checkpoints": 1,
        }
    )
    open_cache(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "twostep", "distill", str(path)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(recipe.run_folder)) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "SIGTERM" in errors
    assert "Traceback" not in errors
    reached = Trainer(recipe, open_cache(recipe)).progress.turn
    assert reached >= 3


def test_interrupt_inside_this_process(make_recipe: Make) -> None:
    trainer = trainer_of(make_recipe())
    original, calls = trainer.learner.turn, []

    def turn() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original()

    trainer.learner.turn = turn  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGINT at turn 2"):
        trainer.train()
    assert Trainer(trainer.recipe, trainer.cache).progress.turn == 2


def test_best_checkpoint_is_kept_not_the_last(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(make_recipe(training={"validate_every": 1}))
    distances = iter([5.0, 1.0, 3.0, 4.0, 6.0, 7.0])
    kept = {}

    def offer(self: BestStudent, distance: float, metrics: Mapping[str, float]) -> None:
        kept[trainer.progress.turn] = [v.clone() for v in trainer.state.ema.values]
        original(self, next(distances), metrics)

    original = BestStudent.offer
    monkeypatch.setattr(BestStudent, "offer", offer)
    trainer.train()
    assert trainer.progress.best_turn == 2
    assert all(torch.equal(a, b) for a, b in zip(kept[2], trainer.state.ema.values, strict=True))


def test_a_scorer_of_the_users_own_chooses_the_student(make_recipe: Make, tmp_path: Path) -> None:
    scorer = tmp_path / "scorer.py"
    # A number for each call: the second is the highest. It also checks what it is given.
    scorer.write_text(
        "import json, pathlib, sys\n"
        "calls = pathlib.Path(__file__).with_name('calls')\n"
        "number = len(calls.read_text()) if calls.exists() else 0\n"
        "calls.write_text('.' * (number + 1))\n"
        "for line in sys.stdin:\n"
        "    assert json.loads(line)['prompt']\n"
        "    print([1.0, 3.0, 2.0][number])\n"
    )
    command = f"taste={sys.executable} {scorer}"
    recipe = make_recipe(
        training={"validate_every": 2, "validation_scores": [command], "best_by": "score"}
    )
    trainer = trainer_of(recipe)
    trainer.train()
    assert trainer.progress.best_turn == 4
    assert trainer.progress.best_distance == -3.0
    records = read_metrics(trainer.folder.path)
    assert [r["validation/score/taste"] for r in records if "validation/diversity" in r] == [
        1,
        3,
        2,
    ]
    with pytest.raises(RecipeError, match=r"best_by: score needs training\.validation_scores"):
        make_recipe(training={"best_by": "score"})
    with pytest.raises(ScorerError, match="'taste' is unknown"):
        trainer_of(make_recipe("other", training={"validation_scores": ["taste"]}))


def test_external_reals_replace_the_teachers(make_recipe: Make, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (50, 40 + i), (60 * i, 10, 200)).save(folder / f"{i}.png")
    trainer = trainer_of(make_recipe(data={"reals": str(folder)}))
    (external,) = trainer.learner.batches.reals.values()
    assert external.latents.shape == (3, 8, 8, 8)
    batch = trainer.learner.batches.read(0, "student")
    assert not torch.equal(batch.reals, batch.latents)
    assert torch.equal(
        trainer_of(make_recipe("teacher")).learner.batches.read(0, "student").reals, batch.latents
    )
    assert batch.real_prompts is batch.prompts  # no captions: judged under the student's prompts
    with pytest.raises(RecipeError, match="no images"):
        trainer_of(make_recipe("none", data={"reals": str(tmp_path / "runs")}))

    captions = ["a dog", "two cats on a red background", "一只狗"]
    lines = [json.dumps({"file_name": f"{i}.png", "text": t}) for i, t in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    captioned = trainer_of(make_recipe("captioned", data={"reals": str(folder)}))
    batch = captioned.learner.batches.read(3, "student")
    (external,) = captioned.learner.batches.reals.values()
    latents, embeds = external.draw(3, 4, seed=0)
    assert not torch.equal(latents, external.draw(3, 4, seed=1)[0])
    assert torch.equal(batch.reals, latents)
    assert embeds is not None
    assert batch.real_prompts.lengths.tolist() == [len(e) for e in embeds]
    captioned.learner.critic_step()
    (folder / "metadata.jsonl").write_text(lines[0])
    with pytest.raises(RecipeError, match=r"metadata.jsonl has no caption for '1\.png'"):
        trainer_of(make_recipe("partly", data={"reals": str(folder)}))


def test_ema_is_a_mean_at_first_and_fp32_always() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = Ema([parameter], 0.9)
    for value in (1.0, 2.0, 3.0):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update()
    assert ema.values[0].dtype == torch.float32
    assert ema.values[0].item() == pytest.approx(1.5)  # mean of 0 (the start), 1, 2, 3
    with ema.applied():
        assert parameter.item() == 1.5
    assert parameter.item() == 3.0


def test_alarms_ring_once_and_again_after_recovery(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, resume_at=0)
    diversity = [1.0, 0.5, 0.4, 0.9, 0.3]
    rings = [monitor.record(i, {"validation/diversity": d}) for i, d in enumerate(diversity)]
    assert [len(r) for r in rings] == [0, 1, 0, 0, 1]
    assert "seeds look alike" in rings[1][0]
    for i in range(60):
        rung = monitor.record(10 + i, {"critic/accuracy_final": 1.0 if i > 5 else 0.5})
        if rung:
            break
    assert "the critic wins" in rung[0]


def test_a_checkpoint_of_an_earlier_format_is_refused_by_its_version(make_recipe: Make) -> None:
    recipe = make_recipe(training={"turns": 2, "save_every": 1})
    trainer_of(recipe).train()
    path = list_checkpoints(recipe.run_folder / "checkpoints")[-1] / "state.json"
    record = json.loads(path.read_text())
    assert record.pop("version") == 3
    path.write_text(json.dumps(record))
    (path.parent / "sums.json").unlink()  # earlier formats had none
    with pytest.raises(CheckpointError, match="format 1, as an earlier twostep wrote it"):
        trainer_of(recipe)


def test_evaluations_are_counted_and_kept(make_recipe: Make) -> None:
    """Four samples: a warm-up turn runs two networks with a gradient, three forwards' worth each."""
    recipe = make_recipe(score={"fit_turns": 1}, training={"turns": 3, "save_every": 1})
    trainer = trainer_of(recipe)
    trainer.learner.fit_score()
    trainer.learner.turn()
    assert trainer.progress.fit_evaluations == 3 * 4
    assert trainer.progress.evaluations == 2 * 3 * 4
    trainer.state.save(trainer.folder.checkpoints, 2, trainer.world)
    assert trainer_of(recipe).progress.evaluations == 2 * 3 * 4


def test_full_sets_run_compiled(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (
        trainer_of(make_recipe(str(c), training={"compile": c})).learner.critic_step()["fake/final"]
        for c in (False, True)
    )
    torch.testing.assert_close(compiled, plain)


def test_fakes_start_from_what_the_score_starts_from(
    make_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    """So that matching has no gradient before either has learnt, whatever the score is."""
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    random_transformer(seed=7).save_pretrained(other / "transformer")
    losses = {"final": {"adversarial": 0.0}, "step1": {"adversarial": 0.0}, "warmup_turns": 0}
    trainer = trainer_of(make_recipe(losses=losses, score={"model": str(other)}))
    for side in gradients(trainer):
        assert all(torch.equal(g, torch.zeros_like(g)) for g in side)


@pytest.mark.parametrize(
    ("backbone", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.bfloat16)]
)
def test_beside_adapters_a_score_is_no_larger_than_the_backbone(
    make_recipe: Make, tiny_folder: Path, backbone: str, dtype: torch.dtype
) -> None:
    recipe = make_recipe(
        student={"weights": "lora", "rank": 2, "backbone_dtype": backbone},
        score={"model": str(tiny_folder)},
    )
    roles = build_roles(recipe, ModelFolder.open(tiny_folder), device=CPU)
    assert {p.dtype for p in roles.score.model.parameters()} == {dtype}
    frozen = [p for p in roles.teacher.model.parameters() if not p.requires_grad]
    packed = [b for n, b in roles.teacher.model.named_buffers() if "packed" in n or "scale" in n]
    assert weight_bytes(roles.score.model) == sum(t.nbytes for t in (*frozen, *packed))
