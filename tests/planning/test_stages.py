"""The planned peak of each stage against what the stage really allocates; disk to the byte."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from twostep.data.cache import build
from twostep.data.cache.encoded import EncodedPrompts
from twostep.data.cache.spec import CacheSpec, recipe_schedule
from twostep.distill.objectives.build import build_roles
from twostep.distill.trainer import Trainer
from twostep.distill.validation import Validator
from twostep.models.folder import ModelFolder
from twostep.planning.checking import count_decoding, count_validation
from twostep.planning.disk import cache_bytes, student_bytes
from twostep.planning.stages import Stage
from twostep.planning.teaching import encoding_stage, sampling_stage
from twostep.planning.training import measure
from twostep.planning.weightless import CPU, load_weightless, make_fake
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import Placement
from twostep.runtime.distributed import World
from twostep.runtime.memory_meter import live_bytes, weight_bytes
from twostep.runtime.shape_tensors import ShapesOnly, ShapeTensor

Make = Callable[..., Recipe]


def test_shapes_are_those_of_the_operations() -> None:
    with ShapesOnly():
        x, w = torch.randn(3, 4), torch.nn.Parameter(torch.empty(5, 4))
        with live_bytes() as live, torch.autocast("cpu", torch.bfloat16):
            y = torch.nn.functional.linear(x, w)
            y.float().sum().backward()
        again = torch.full((2,), 1.0) + torch.full((2,), 1)
        whole = torch.full((2,), 1) + torch.full((2,), 1)
    assert isinstance(y, ShapeTensor)
    assert y.dtype is torch.bfloat16
    assert w.grad is not None
    assert w.grad.shape == (5, 4)
    assert live.operations == 2 * 2 * 3 * 4 * 5  # and the weight's gradient
    assert (again.dtype, whole.dtype) == (torch.float32, torch.int64)


def test_views_and_what_is_done_in_place_take_no_memory() -> None:
    with ShapesOnly():
        x = torch.zeros(8, 8)
        with live_bytes() as live:
            x[2:].view(-1).add_(1)
            assert live.peak == 0
            y = x * 2
            assert live.now == 4 * 64
            del y
            assert live.now == 0


@pytest.fixture
def recipe(make_recipe: Make) -> Recipe:
    return make_recipe(
        training={"batch_size": 4, "validation_samples": 8, "turns": 3},
        data={"prompt_count": 32, "samples_per_prompt": 1, "samples_per_file": 32},
    )


def test_teach_is_planned_as_it_runs(recipe: Recipe) -> None:
    spec, placement = CacheSpec.of(recipe), Placement(CPU)
    spec.folder.mkdir(parents=True)
    encoded = EncodedPrompts.encode(spec, spec.shards, placement)
    embeds = [e for shard in spec.shards for e in encoded.read(shard)]
    tokens = max(len(e) for e in embeds)
    folder = ModelFolder.open(recipe.teacher.model)
    with ShapesOnly():
        words = encoding_stage(recipe, folder, tokens)
        pictures = sampling_stage(recipe, folder, recipe_schedule(recipe, folder), tokens)
    encoder = folder.encoder(placement)
    held = weight_bytes(encoder.text_encoder)
    with live_bytes() as live:
        encoder.encode(spec.prompts)
    assert words.device == pytest.approx(held + live.peak, rel=0.1)
    velocity, *_ = folder.velocities(placement)
    held = weight_bytes(velocity)
    with live_bytes() as live:
        build.build(spec, velocity, spec.shards, encoded=encoded, device=CPU)
    assert pictures.device == pytest.approx(held + live.peak, rel=0.1)
    written = [load_file(path) for path in spec.folder.glob("shard-*.safetensors")]
    size = sum(tensor.nbytes for tensors in written for tensor in tensors.values())
    mean = sum(len(e) for e in embeds) / len(embeds)
    assert cache_bytes(recipe, folder, mean) == size


def test_validation_pictures_and_the_student_are_planned_as_they_come(recipe: Recipe) -> None:
    trainer = Trainer(recipe, build.open_cache(recipe))
    validator = Validator(recipe, trainer.roles, trainer.cache, device=CPU, world=World(CPU))
    tokens = max(len(e) for e in validator.embeds)
    folder = ModelFolder.open(recipe.teacher.model)
    with torch.device("meta"):
        roles = build_roles(recipe, folder, device=CPU, load=load_weightless)
    schedule = recipe_schedule(recipe, folder)
    with ShapesOnly():
        for role in roles.by_name().values():
            make_fake(role.model)
        planned = count_validation(recipe, folder, roles, schedule=schedule, prompt_tokens=tokens)
        weights, decoding = count_decoding(folder, (32, 32), 3, Placement(CPU))
    with live_bytes() as live:
        seen = validator.measure()
    assert planned.peak == pytest.approx(live.peak, rel=0.1)
    decoder = folder.decoder(Placement(CPU))
    assert weights == weight_bytes(decoder.vae)
    with live_bytes() as live:
        decoder.decode(seen.rollout.clean2[:3])
    assert decoding.peak == pytest.approx(live.peak, rel=0.1)
    student = trainer.train()
    files = list(student.rglob("*.safetensors"))
    size = sum(t.nbytes for path in files for t in load_file(path).values())
    headers = sum(p.stat().st_size for p in files) - size
    assert abs(student_bytes(folder) - size) <= headers


def test_the_largest_stage_is_the_peak(recipe: Recipe) -> None:
    found = measure(recipe, 1, 20)
    assert found.peak == max(stage.device for stage in found.stages) + found.reserved
    assert found.peak_stage in found.stages
    assert [stage.name for stage in found.stages] == [
        "warm-up turn", "student turn", "critic turn", "validation", "sample sheet", "checkpoint",
        "end of run",
    ]  # fmt: skip
    saving: Stage = found.stages[-2]
    assert saving.host == found.checkpoint
    # A forward with gradient and its double backwards, twice: the warm-up's two steps.
    assert 5.5 < found.forwards["warm-up"] < 6.5
