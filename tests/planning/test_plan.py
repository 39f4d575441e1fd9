"""`twostep plan` against what the trainer really allocates, and Z-Image's known size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tiny import as_velocity, random_transformer
from twostep.cli import app
from twostep.data.cache.build import open_cache
from twostep.distill.objectives.draws import Draws
from twostep.distill.trainer import Trainer
from twostep.errors import ModelError, RecipeError
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.adapters import SharedBackbone
from twostep.models.student import save_student
from twostep.planning.generation import generation_needs
from twostep.planning.training import measure, plan
from twostep.planning.weightless import open_weightless
from twostep.recipe.models import Student
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Memory, Placement
from twostep.runtime.memory_meter import gradients_dropped, live_bytes, weight_bytes

Make = Callable[..., Recipe]
CPU = torch.device("cpu")
LORA = {"weights": "lora", "rank": 4, "backbone_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("student", "fit_turns", "optimizer"),
    [
        ({}, 1, "adamw"),
        ({"steps": "shared"}, 0, "adafactor"),
        (LORA, 2, "adamw"),
        ({**LORA, "backbone_dtype": "int8"}, 0, "adamw"),
    ],
    ids=["full", "shared-adafactor", "lora", "lora-int8"],
)
def test_weight_bytes_are_those_of_a_real_run(
    make_recipe: Make, student: dict, fit_turns: int, optimizer: str
) -> None:
    recipe = make_recipe(
        student=student, score={"fit_turns": fit_turns}, training={"optimizer": optimizer}
    )
    trainer = Trainer(recipe, open_cache(recipe))
    trainer.train()
    found = {role.name: role for role in measure(recipe, 1, 20).roles}
    roles = trainer.roles
    trained = {"first": roles.first, "fake1": roles.fakes[0], "fake2": roles.fakes[1]}
    if not roles.shared:
        trained["second"] = roles.second
    if fit_turns:
        learnt = roles.score.parameters()
        assert found["score"].total == sum(p.nbytes for p in learnt)
        assert not any(p.grad is not None for p in learnt)
    for name, role in trained.items():
        parameters = role.parameters()
        size = sum(p.numel() * p.element_size() for p in parameters)
        assert found[name].parameters == sum(p.numel() for p in parameters)
        assert found[name].weights == size
        assert found[name].gradients == sum(p.grad.nbytes for p in parameters if p.grad is not None)
        own = trainer.state.optimizers["fake" if "fake" in name else "student"]
        states = [own.state[p] for p in parameters]
        kept = sum(value.nbytes for s in states for key, value in s.items() if key != "step")
        assert found[name].optimizer == kept > 0
    assert sum(found[n].average for n in trained) == sum(v.nbytes for v in trainer.state.ema.values)
    model = roles.teacher.model
    fitted = {id(p) for p in roles.score.parameters()}
    frozen = [p for p in model.parameters() if not p.requires_grad and id(p) not in fitted]
    frozen += [b for name, b in model.named_buffers() if name.endswith(("packed", "scale"))]
    assert found["teacher"].weights == sum(p.nbytes for p in frozen)
    assert found["critic"].parameters == sum(p.numel() for p in roles.critic.heads.parameters())
    last = sorted((recipe.run_folder / "checkpoints").iterdir())[-1] / "state.safetensors"
    saved = sum(tensor.nbytes for tensor in load_file(last).values())
    assert measure(recipe, 1, 20).checkpoint == saved


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_of_a_real_turn(make_recipe: Make, checkpointed: bool) -> None:
    recipe = make_recipe(training={"checkpoint_activations": checkpointed, "batch_size": 8})
    trainer = Trainer(recipe, open_cache(recipe))
    batch = trainer.learner.batches.read(0, "student")
    tokens = int(batch.prompts.lengths.max())
    found = measure(recipe, 1, tokens)
    for name, turn in (
        ("student", trainer.learner.objectives.student),
        ("critic", trainer.learner.objectives.critic),
    ):
        parameters = (
            *trainer.roles.student_parameters(),
            *trainer.roles.fake_parameters(),
            *trainer.roles.critic.heads.parameters(),
        )
        with gradients_dropped(parameters), live_bytes() as live:
            turn(batch, Draws(0, 0, "student", device=CPU)).loss.backward()
        assert all(p.grad is None for p in parameters)
        assert found.activations[name] == pytest.approx(live.peak, rel=0.1)


def test_the_critics_way_through_the_teacher_is_recomputed_too(make_recipe: Make) -> None:
    """Each judged step goes through the whole teacher, with gradient."""

    def student_turn(**changes: Any) -> int:
        training = {"checkpoint_activations": True, "batch_size": 8}
        return measure(make_recipe(training=training, **changes), 1, 32).activations["student"]

    without = {"final": {"adversarial": 0.0}, "step1": {"adversarial": 0.0}}
    assert student_turn() < 1.5 * student_turn(losses=without | {"warmup_turns": 2})


def test_only_what_is_new_counts() -> None:
    layer, x = torch.nn.Linear(64, 32, bias=False), torch.randn(8, 64)
    with live_bytes() as live:
        y = layer(x)
        assert live.now == live.peak == y.nbytes == 4 * 8 * 32
        z = torch.nn.functional.relu(y)[:4]
        assert live.now == 2 * y.nbytes
        del y, z
    assert live.operations == 2 * 8 * 64 * 32


def test_checkpointing_and_smaller_parts_save_memory(make_recipe: Make) -> None:
    whole = plan(make_recipe()).activations["student"]
    checkpointed = plan(make_recipe(training={"checkpoint_activations": True}))
    parts = plan(make_recipe(training={"micro_batch": 1}))
    assert checkpointed.activations["student"] < 0.8 * whole
    assert parts.activations["student"] < 0.5 * whole
    # In parts or whole, the same operations; recomputation costs more of them.
    assert parts.flops["student"] == pytest.approx(plan(make_recipe()).flops["student"])
    assert checkpointed.flops["student"] > plan(make_recipe()).flops["student"]


def test_a_compiled_recipe_is_planned_as_it_is_written(make_recipe: Make) -> None:
    plain, compiled = (
        plan(make_recipe(student=LORA, training={"compile": c, "batch_size": 1}))
        for c in (False, True)
    )
    assert plain == compiled


def test_sharding_divides_what_is_sharded(make_recipe: Make) -> None:
    whole = plan(make_recipe(), processes=2)
    shard = plan(make_recipe(distributed={"sharding": "shard"}), processes=2)
    for one, other in zip(whole.roles, shard.roles, strict=True):
        share = 1 if one.name == "critic" else 2
        assert other.total * share == one.total


REAL = {
    "name": "real",
    "teacher": {"model": "Tongyi-MAI/Z-Image-Turbo"},
    "data": {"height": 1024, "width": 1024},
    "student": {"weights": "lora"},
    "training": {"batch_size": 1, "checkpoint_activations": True},
}


@pytest.mark.slow
def test_z_image_at_its_real_size() -> None:
    found = plan(Recipe.parse(REAL), memory_gib=80, prompt_tokens=128, tflops=400)
    teacher = found.roles[0]
    assert teacher.name == "teacher"
    assert teacher.parameters == 6_154_908_736
    assert teacher.weights == 2 * teacher.parameters
    # A forward takes 56.5e12 operations. Two steps through the student, a forward and its double
    # backwards each, recomputed once; frozen weights need no gradient of their own.
    forwards = found.flops["warm-up"] / 56.5e12
    assert 5.9 < forwards < 8.1
    assert found.seconds_per_1000_turns is not None
    assert found.fits


def test_what_does_not_fit_is_told_what_would(make_recipe: Make) -> None:
    recipe = make_recipe(training={"batch_size": 8})
    needed = plan(recipe).peak / 2**30
    assert plan(recipe, memory_gib=needed + 0.001).advice == []
    tight = plan(recipe, memory_gib=needed - 0.001)
    assert not tight.fits
    assert tight.advice[0].startswith("training.checkpoint_activations=true would fit")
    assert "no setting" in plan(recipe, memory_gib=0.01).advice[-1]


def test_the_command_prints_tables_and_json(make_recipe: Make, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(make_recipe().to_yaml())
    result = CliRunner().invoke(app, ["plan", str(path), "--tflops", "1", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fits"] is True
    result = CliRunner().invoke(app, ["plan", str(path), "--memory", "0.3"])
    said = " ".join(result.stdout.split())
    assert "does not fit in 0.30 GiB" in said


def test_mistakes_are_named(make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match="batch_size: 4 cannot be divided among 3"):
        plan(make_recipe(), processes=3)
    with pytest.raises(ModelError, match="no model folder"):
        open_weightless("./nowhere")


# Generating.


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "student"
    parts = random_transformer(1), random_transformer(2)
    save_student(
        tiny_folder, *parts, schedule=Schedule(3.0, 0.75), folder=folder, dtype=torch.float32
    )
    return folder


@pytest.mark.parametrize("memory", ["plain", "int8"])
def test_generation_needs_are_those_of_a_real_run(
    student: Path, tiny_folder: Path, memory: Memory
) -> None:
    sampler = Sampler.load(str(student), placement=Placement(CPU, memory=memory))
    prompts = PromptBatch.collate([torch.randn(20, 32)] * 2)
    noise = seeded_noise([0, 1], (8, 8, 8))
    found = generation_needs(
        str(tiny_folder), "two_sets", memory, (32, 32),
        batch_size=2, prompt_tokens=20, dtype=torch.float32,
    )  # fmt: skip
    assert sampler.is_student
    assert found.transformers == weight_bytes(sampler.velocities[0], sampler.velocities[1])
    assert found.decoder == weight_bytes(sampler.decoder.vae)
    assert found.text_encoder == weight_bytes(sampler.encoder.text_encoder)
    with torch.no_grad(), live_bytes() as rolling:
        latents = sampler.roll(prompts, noise).latents
    assert found.steps == pytest.approx(rolling.peak, rel=0.1)
    with live_bytes() as decoding:
        sampler.decoder.decode(latents)
    assert found.decoding == pytest.approx(decoding.peak, rel=0.1)


def test_a_students_loras_are_counted_on_one_set(tiny_folder: Path) -> None:
    size = (32, 32)
    one = generation_needs(str(tiny_folder), "lora", "plain", size, rank=4, dtype=torch.float32)
    backbone = SharedBackbone(
        as_velocity(random_transformer()),
        ["first", "second"],
        rank=4,
        target_modules=Student().target_modules,
        seed=0,
    )
    assert one.transformers == weight_bytes(backbone.model)


def test_a_student_of_z_images_size_fits_16_gigabytes() -> None:
    model, size = "Tongyi-MAI/Z-Image-Turbo", (1024, 1024)
    whole = generation_needs(model, "two_sets", "plain", size)
    assert whole.transformers == 2 * 2 * 6_154_908_736
    assert whole.text_encoder == pytest.approx(8.04e9, rel=0.01)
    packed = generation_needs(model, "two_sets", "int8", size)
    pair = generation_needs(model, "lora", "int8", size)
    assert whole.peak > 16e9 > packed.peak + 2**30 > pair.peak + 2**30
    offloaded = generation_needs(model, "two_sets", "offload", size)
    # Two layers at a time: the text encoder is the largest then.
    assert offloaded.peak == offloaded.text_encoder
