"""Several processes give what one gives: losses, weights, checkpoints, students."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

from runs import assert_same_run
from tiny import TEXT_WIDTH, lora_matrices, write_lora
from twostep.data.cache.build import open_cache
from twostep.distill.batches import rows_of
from twostep.distill.checkpoint import list_checkpoints
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Role
from twostep.distill.sharding import Sharder, shard_size
from twostep.distill.trainer import Trainer
from twostep.errors import RecipeError
from twostep.families.family import PromptBatch
from twostep.method.schedule import Schedule
from twostep.models.compiling import compile_blocks
from twostep.models.folder import ModelFolder
from twostep.recipe.schema import Recipe
from twostep.recipe.training import Training
from twostep.runtime.distributed import World, gathered

Make = Callable[..., Recipe]
CPU = torch.device("cpu")
FROZEN_FIRST_FORWARD = Path(__file__).with_name("frozen_first_forward.py")
KILLED_IN_SAVE = Path(__file__).with_name("killed_in_save.py")


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def distill(recipe: Recipe, processes: int, tmp_path: Path) -> None:
    path = tmp_path / f"{recipe.name}.yaml"
    path.write_text(recipe.to_yaml())
    result = torchrun(processes, "-m", "twostep", "distill", str(path))
    assert result.returncode == 0, result.stderr


SIZES = {"other_sizes": [[32, 64]], "caption_window": 2}
JOINT = {
    "critic": {"network": "score", "one_look": True},
    "training": {"joint_turns": True},
}
LORA: dict[str, Any] = {"weights": "lora", "rank": 4, "backbone_dtype": "float32"}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "student", "distributed", "own", "both"),
    [
        (2, {"steps": "decoupled"}, {}, {}, {"data": SIZES}),
        (2, {"steps": "decoupled"}, {"sharding": "shard"}, {"micro_batch": 1}, {}),
        (2, {"steps": "shared"}, {"sharding": "shard", "cpu_offload": True}, {}, {}),
        (4, {"steps": "decoupled"}, {"sharding": "shard", "shard_size": 2}, {}, {}),
        (2, LORA, {}, {"micro_batch": 1, "async_saves": True}, {}),
        (2, LORA, {}, {}, {"training": {"optimizer": "adafactor"}}),
        (2, {"steps": "decoupled"}, {"sharding": "shard"}, {"micro_batch": 1}, JOINT),
    ],
    ids=["replicate-sizes", "shard-accumulate", "shard-shared-offload", "hsdp",
         "lora-accumulate-async", "lora-adafactor", "shard-joint"],
)  # fmt: skip
def test_several_processes_equal_one(
    make_recipe: Make,
    tmp_path: Path,
    tiny_folder: Path,
    processes: int,
    student: dict[str, Any],
    distributed: dict[str, Any],
    own: dict[str, Any],
    both: dict[str, Any],
) -> None:
    """`own` are settings of the several alone, `both` sections that both runs have."""
    lora = write_lora(tmp_path / "style.safetensors", lora_matrices(std=0.05))
    common = {"student": student, "score": {"fit_turns": 2}, "teacher": {"loras": [str(lora)]}}
    common |= both
    alone = make_recipe("alone", **common)
    Trainer(alone, open_cache(alone)).train()
    own = {**both.get("training", {}), **own}
    together = make_recipe("together", **(common | {"training": own}), distributed=distributed)
    distill(together, processes, tmp_path)
    assert_same_run(alone, together, tiny_folder)
    for part in ("transformer", "transformer_2"):
        name = f"student/{part}/diffusion_pytorch_model.safetensors"
        ours, theirs = (load_file(r.run_folder / name) for r in (alone, together))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0.02, atol=2e-3)


def test_accumulated_gradients_equal_the_whole_batch(make_recipe: Make, tiny_folder: Path) -> None:
    whole = make_recipe("whole")
    Trainer(whole, open_cache(whole)).train()
    parts = make_recipe("parts", training={"micro_batch": 2})
    Trainer(parts, open_cache(parts)).train()
    assert_same_run(whole, parts, tiny_folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_saved_by_two_resumed_by_one_and_by_four(
    make_recipe: Make, tmp_path: Path, tiny_folder: Path
) -> None:
    steady = {"learning_rate_decay": 0.0}
    shard = {"sharding": "shard"}
    alone = make_recipe("alone", training=steady)
    Trainer(alone, open_cache(alone)).train()
    begun = make_recipe("one", training={**steady, "turns": 4}, distributed=shard)
    distill(begun, 2, tmp_path)
    shutil.copytree(begun.run_folder, begun.output / "four")
    shards = list(list_checkpoints(begun.run_folder / "checkpoints")[-1].glob("*.safetensors"))
    assert len(shards) == 2

    one = make_recipe("one", training=steady)
    trainer = Trainer(one, open_cache(one))
    assert trainer.progress.turn == 4
    trainer.train()
    assert_same_run(alone, one, tiny_folder)

    # The recipe in the copied folder names the run it was copied from.
    path = begun.output / "four" / "recipe.yaml"
    path.write_text(path.read_text().replace("name: one", "name: four"))
    four = make_recipe("four", training=steady, distributed=shard)
    distill(four, 4, tmp_path)
    assert_same_run(alone, four, tiny_folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_killed_while_saving_costs_only_the_turns_since_the_last_save(
    make_recipe: Make, tmp_path: Path, tiny_folder: Path
) -> None:
    alone = make_recipe("alone")
    Trainer(alone, open_cache(alone)).train()
    recipe = make_recipe("killed", distributed={"sharding": "shard"})
    path = tmp_path / "killed.yaml"
    path.write_text(recipe.to_yaml())
    result = torchrun(2, str(KILLED_IN_SAVE), str(path))
    assert result.returncode != 0
    assert "SIGKILL" in result.stderr
    folder = recipe.run_folder / "checkpoints"
    assert [p.name for p in list_checkpoints(folder)] == ["turn-0000002"]
    assert (folder / ".turn-0000004.tmp").exists()
    distill(recipe, 2, tmp_path)
    assert_same_run(alone, recipe, tiny_folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_first_forward_does_not_change_the_dtype_in_which_gradients_are_reduced(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found silently wrong elsewhere: NeMo AutoModel PR 3298."""
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(distributed={"sharding": "shard"}).to_yaml())
    tests = str(Path(__file__).parents[1])
    known = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, *filter(None, [known])]))
    result = torchrun(2, str(FROZEN_FIRST_FORWARD), str(path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[-2] == "['torch.float32'] True True 0.0"


@pytest.mark.parametrize(
    ("size", "local", "asked", "expected"),
    [
        (8, "8", None, 8),
        (32, "8", None, 8),
        (32, "8", 16, 16),
        (2, None, None, 2),
        (12, "8", None, 12),
    ],
)
def test_weights_are_gathered_within_a_machine_unless_another_size_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, size: int, local: str | None, asked: int | None, expected: int
) -> None:
    if local is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    world = World(CPU)
    world.size = size
    assert shard_size(world, asked) == expected


# One process.


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[World]:
    dist.init_process_group("gloo", f"file://{tmp_path}/gloo", rank=0, world_size=1)
    yield World(CPU)
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_blocks_compile(
    make_recipe: Make, tiny_folder: Path, gloo: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the hooks that put a block's weights together; every block runs the same graphs."""
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(len(inputs))
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    sharder = Sharder(make_recipe(), gloo)
    latents, sigma = torch.randn(2, 8, 4, 4), torch.tensor([0.4, 0.8])
    prompts = PromptBatch.collate([torch.randn(5, TEXT_WIDTH), torch.randn(3, TEXT_WIDTH)])
    found = []
    for compiled in (False, True):
        teacher = ModelFolder.open(tiny_folder)
        model = sharder.load(teacher, "transformer", torch.float32)
        model.recompute_layers()
        if compiled:
            compile_blocks(teacher.family.blocks(model))
        role = Role.full(model, trainable=True)
        role(latents, sigma, prompts).velocity.square().mean().backward()
        found.append([gathered(p.grad) for p in role.parameters() if p.grad is not None])
    # Main and noise layers, with and without a gradient to their input; context layers.
    assert 0 < len(graphs) <= 6
    assert len(found[0]) == len(found[1]) > 30
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_draws_of_a_row_do_not_depend_on_the_division_of_the_batch() -> None:
    def draw(rows: slice | None, count: int) -> list[torch.Tensor]:
        draws = Draws(3, 5, "critic", device=CPU, rows=rows)
        like = torch.zeros(count, 2, 3)
        return [
            draws.normal_like(like),
            draws.sigma(count, Schedule.of(3.0), (0.1, 0.9)),
            torch.tensor(draws.integers(count, 100)),
            draws.normal_like(like),
        ]

    together = draw(None, 8)
    for size in (2, 4):
        parts = [draw(slice(i, i + size), size) for i in range(0, 8, size)]
        for index, batch in enumerate(together):
            assert torch.equal(torch.cat([part[index] for part in parts]), batch)


def test_no_row_is_drawn_but_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    normal_ = torch.Tensor.normal_

    def count(tensor: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        drawn.append(tensor.numel())
        return normal_(tensor, *rest, **named)

    monkeypatch.setattr(torch.Tensor, "normal_", count)
    draws = Draws(0, 0, "student", device=CPU, rows=slice(4, 6))
    rows = draws.normal_like(torch.zeros(2, 8, 4, 4))
    assert sum(drawn) == rows.numel()
    # Rows differ, and another turn's are others.
    assert not torch.equal(rows[0], rows[1])
    later = Draws(0, 1, "student", device=CPU, rows=slice(4, 6)).normal_like(rows)
    assert not torch.equal(later, rows)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (2, 3), (1, 2)])
def test_every_row_belongs_to_one_process(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int
) -> None:
    def world(number: int) -> World:
        found = World(CPU)
        found.rank, found.size = number, size
        return found

    settings = Training(batch_size=12, micro_batch=2)
    rows = [r for n in range(size) for part in rows_of(settings, world(n)) for r in range(12)[part]]
    assert rows == list(range(12))
    shares = [i for n in range(size) for i in world(n).share(7)]
    assert shares[:7] == list(range(7))
    assert len(shares) == size * len(world(rank).share(7))


def test_batches_that_cannot_be_divided_are_named(make_recipe: Make) -> None:
    world = World(CPU)
    world.size = 3
    with pytest.raises(RecipeError, match="batch_size: 4 cannot be divided among 3 processes"):
        rows_of(make_recipe().training, world)
    with pytest.raises(RecipeError, match="micro_batch: 3 does not divide the 4 samples"):
        rows_of(make_recipe(training={"micro_batch": 3}).training, World(CPU))
