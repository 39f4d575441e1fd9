"""Roles as adapters on one frozen backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import CPU, TEXT_WIDTH, as_velocity, random_transformer
from twostep.data.cache.build import open_cache
from twostep.distill.checkpoint import list_checkpoints
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.roles import Role
from twostep.distill.trainer import Trainer
from twostep.errors import ExportError, RecipeError
from twostep.exports.registry import ExportOptions, export
from twostep.families.family import PromptBatch
from twostep.families.zimage import ZImage
from twostep.inference.pipeline import TwoStepPipeline
from twostep.inference.sampler import Sampler
from twostep.method.rollout import two_step
from twostep.method.schedule import Schedule
from twostep.models.adapters import SharedBackbone
from twostep.models.compiling import compile_blocks
from twostep.models.folder import ModelFolder
from twostep.models.int8 import Int8Linear
from twostep.models.student import write_lora_index
from twostep.models.velocity import bind
from twostep.recipe.models import Student
from twostep.recipe.schema import Recipe

NAMES = ["first", "second", "fake1", "fake2"]
TARGETS = Student().target_modules


def backbone(seed: int = 0, int8: bool = False) -> SharedBackbone:
    model = as_velocity(random_transformer())
    return SharedBackbone(
        model,
        NAMES,
        rank=4,
        target_modules=TARGETS,
        seed=seed,
        original=random_transformer,
        int8=int8,
    )


def with_random_adapters(seed: int = 0, int8: bool = False) -> SharedBackbone:
    """LoRA begins as zero; here every adapter does something of its own."""
    shared = backbone(int8=int8)
    generator = torch.Generator().manual_seed(seed)
    for name in NAMES:
        for parameter in shared.parameters(name):
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return shared


def inputs(batch: int = 2) -> tuple[Tensor, Tensor, PromptBatch]:
    generator = torch.Generator().manual_seed(1)
    embeds = [torch.randn(5 + i, TEXT_WIDTH, generator=generator) for i in range(batch)]
    latents = torch.randn(batch, 8, 8, 8, generator=generator)
    return latents, torch.full((batch,), 0.8), PromptBatch.collate(embeds)


def test_every_role_begins_as_the_teacher() -> None:
    expected = as_velocity(random_transformer())(*inputs()).velocity
    shared = backbone()
    for name in ("", *NAMES):
        assert torch.equal(Role.adapter(shared, name)(*inputs()).velocity, expected)


def test_roles_differ_and_switching_leaves_no_trace() -> None:
    shared = with_random_adapters()
    roles = {name: Role.adapter(shared, name) for name in ("", *NAMES)}
    seen = {name: role(*inputs()).velocity for name, role in roles.items()}
    for a in seen:
        for b in seen:
            assert (a == b) == torch.equal(seen[a], seen[b])
    for name in reversed(list(roles)):
        assert torch.equal(roles[name](*inputs()).velocity, seen[name])
    assert torch.equal(seen[""], as_velocity(random_transformer())(*inputs()).velocity)
    assert shared.active == ""


def test_only_blocks_are_adapted_and_every_adapter_is_seeded() -> None:
    shared = backbone()
    keys = list(shared.module("first"))
    assert len(keys) == 2 * (3 * 8 + 8 + 7)  # context blocks have no modulation
    assert not any("embedder" in k or "final" in k for k in keys)
    again, other = backbone(), backbone(seed=9)
    first, same, different = (s.parameters("first") for s in (shared, again, other))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, different, strict=True))
    downs = [s for s in shared.parameters("second") if s.any()]
    assert not torch.equal(first[0], downs[0])
    assert not any(p.requires_grad for n, p in shared.model.named_parameters() if "lora_" not in n)


def gradients(
    checkpointing: bool, in_between: bool, int8: bool = False, compiled: bool = False
) -> dict[str, list[Tensor]]:
    """Of a loss on the final image, end to end; other roles run before the backward pass."""
    shared = with_random_adapters(int8=int8)
    if compiled:
        compile_blocks(ZImage().blocks(shared.model))
    if checkpointing:
        shared.recompute_layers()
    noise, sigma, prompts = inputs()
    roles = {name: Role.adapter(shared, name) for name in NAMES}
    first, second = (bind(roles[n], prompts) for n in ("first", "second"))
    rollout = two_step(first, second, noise, Schedule(3.0, 0.75))
    if in_between:
        with torch.no_grad():
            roles["fake1"](noise, sigma, prompts)
        Role.adapter(shared)(noise, sigma, prompts)
        roles["second"](noise, sigma, prompts)
    rollout.clean2.square().mean().backward()
    return {
        name: [torch.zeros(()) if p.grad is None else p.grad for p in shared.parameters(name)]
        for name in NAMES
    }


def test_end_to_end_gradients_survive_checkpointing_and_other_roles() -> None:
    plain = gradients(checkpointing=False, in_between=False)
    assert all(g.abs().sum() > 0 for g in plain["first"] + plain["second"])
    assert all(not g.any() for g in plain["fake1"] + plain["fake2"])
    for checkpointing, in_between in ((True, False), (False, True), (True, True)):
        found = gradients(checkpointing, in_between)
        for name in ("first", "second"):
            for a, b in zip(plain[name], found[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        assert all(not g.any() for g in found["fake1"] + found["fake2"])


def test_merged_transformer_is_the_role_and_a_stock_one() -> None:
    shared = with_random_adapters()
    before = copy.deepcopy(shared.model.state_dict())
    for name in ("first", ""):
        merged = Role.adapter(shared, name).transformer()
        assert set(merged.state_dict()) == set(random_transformer().state_dict())
        expected = Role.adapter(shared, name)(*inputs()).velocity
        found = as_velocity(merged)(*inputs()).velocity
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    after = shared.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="no linear layer matches 'nothing'"):
        SharedBackbone(
            as_velocity(random_transformer()), ["first"], rank=4, target_modules="nothing", seed=0
        )


LORA = {"weights": "lora", "rank": 4, "backbone_dtype": "float32"}


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(recipe, open_cache(recipe))


def test_training_moves_adapters_only_and_saves_a_student(
    make_recipe: Callable[..., Recipe], tiny_folder: Path
) -> None:
    trainer = trainer_of(make_recipe(student=LORA, training={"learning_rate": 1e-3}))
    frozen = {
        k: v.clone()
        for k, v in trainer.roles.teacher.model.state_dict().items()
        if "lora_" not in k
    }
    start = {n: [p.clone() for p in m.parameters()] for n, m in trainer.state.modules.items()}
    folder = trainer.train()
    for name, module in trainer.state.modules.items():
        pairs = zip(start[name], module.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
    after = trainer.roles.teacher.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())
    saved = load_file(list_checkpoints(trainer.folder.checkpoints)[-1] / "state.safetensors")
    whole = sum(v.numel() for v in frozen.values())
    assert sum(v.numel() for k, v in saved.items() if "first" in k) < whole / 3
    student = Sampler.load(str(folder))
    assert student.is_student
    # The adapters as they were trained, and nothing else.
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "checksums.json", "first.safetensors", "images", "second.safetensors", "twostep.json",
    ]  # fmt: skip
    with trainer.state.ema.applied():
        for step in ("first", "second"):
            stored = load_file(folder / f"{step}.safetensors")
            live = trainer.roles.by_name()[step].lora()
            assert {f"transformer.{k}" for k in live} == set(stored)
            assert all(torch.equal(stored[f"transformer.{k}"], v) for k, v in live.items())


def test_the_pair_the_merged_folder_and_the_trainers_rollout_are_one(
    make_recipe: Callable[..., Recipe], tiny_folder: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(make_recipe(student=LORA, training={"learning_rate": 1e-2}))
    folder = trainer.train()
    batch = trainer.learner.batches.read(0, "student")
    with torch.no_grad(), trainer.state.ema.applied():
        first, second = (
            bind(r, batch.prompts) for r in (trainer.roles.first, trainer.roles.second)
        )
        rollout = two_step(first, second, batch.noise, trainer.cache.spec.schedule)
    samples = trainer.cache.read(trainer.learner.batches.order.batch(0, 4, purpose="student"))
    export(str(folder), "diffusers", tmp_path / "whole")
    export(str(folder), "lora", tmp_path / "again")
    for student in (folder, tmp_path / "whole", tmp_path / "again"):
        found = Sampler.load(str(student)).sample(samples.prompts, samples.noise)
        torch.testing.assert_close(found.latents, rollout.clean2, atol=1e-3, rtol=1e-3)
    pipe = TwoStepPipeline.from_pretrained(folder)
    found = pipe(
        samples.prompts, height=32, width=32, latents=samples.noise, output_type="latent"
    ).images
    torch.testing.assert_close(found, rollout.clean2, atol=1e-3, rtol=1e-3)
    teacher = Sampler.load(str(tiny_folder)).sample(samples.prompts, samples.noise, 2).latents
    assert (teacher - rollout.clean2).abs().max() > 0.05
    for step in ("first", "second"):
        pair = [load_file(f / f"{step}.safetensors") for f in (folder, tmp_path / "again")]
        assert all(torch.equal(v, pair[1][k]) for k, v in pair[0].items())
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f'load_lora_weights("{folder.parent.name}/student", weight_name' in card
    assert f'from_pretrained("{tiny_folder.name}")' in card
    assert "height=32, width=32" in card
    with pytest.raises(ExportError, match="belongs to"):
        options = ExportOptions(teacher="zoo:emoji-teacher")
        export(str(folder), "lora", tmp_path / "other", options)


def test_resumed_lora_run_equals_the_uninterrupted_one(
    make_recipe: Callable[..., Recipe],
) -> None:
    def final(name: str, *turns: int) -> list[Tensor]:
        for count in turns:
            recipe = make_recipe(
                name, student=LORA, training={"turns": count, "learning_rate_decay": 0.0}
            )
            trainer = trainer_of(recipe)
            trainer.train()
        return [p.clone() for p in trainer.roles.student_parameters()]

    whole, parts = final("whole", 6), final("parts", 4, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_bfloat16_backbone_with_checkpointing_trains(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(
        student=LORA | {"backbone_dtype": "bfloat16"},
        training={"autocast": True, "checkpoint_activations": True, "turns": 3},
    )
    trainer = trainer_of(recipe)
    trainer.train()
    assert trainer.progress.skipped == {}
    assert trainer.roles.teacher.model.x_pad_token.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trainer.roles.student_parameters())


def test_eight_bit_backbone_gives_nearly_the_same_gradients_and_merges_into_the_original() -> None:
    plain = gradients(checkpointing=False, in_between=False)
    packed = gradients(checkpointing=True, in_between=True, int8=True)
    for name in ("first", "second"):
        a, b = (torch.cat([g.flatten() for g in found[name]]) for found in (plain, packed))
        assert torch.cosine_similarity(a, b, dim=0) > 0.99
        assert not torch.equal(a, b)
    shared = with_random_adapters(int8=True)
    weights = [m.packed for m in shared.model.modules() if isinstance(m, Int8Linear)]
    assert len(weights) == 3 * 7 + 14  # attention and feed-forward of layers and refiners
    merged = Role.adapter(shared).transformer()
    original = random_transformer().state_dict()
    assert all(torch.equal(v, original[k]) for k, v in merged.state_dict().items())


def test_eight_bit_gradient_is_that_of_the_unpacked_weight_and_nothing_unpacked_is_kept() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(torch.nn.Linear(24, 6))
    x = torch.randn(5, 24, requires_grad=True)
    kept: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.dtype), t)[1], lambda t: t
    ):
        out = layer(x)
    assert sorted(map(str, kept)) == ["torch.float32", "torch.int8"]  # the scale, the weight
    (found,) = torch.autograd.grad(out.square().sum(), x)
    expected_out = torch.nn.functional.linear(x, layer.weight, layer.bias)
    (expected,) = torch.autograd.grad(expected_out.square().sum(), x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected)


def test_eight_bit_run_trains_and_its_student_has_no_trace_of_it(
    make_recipe: Callable[..., Recipe],
) -> None:
    recipe = make_recipe(student=LORA | {"backbone_dtype": "int8"}, training={"autocast": True})
    trainer = trainer_of(recipe)
    folder = trainer.train()
    assert trainer.progress.skipped == {}
    student = Sampler.load(str(folder))
    assert not any(isinstance(m, Int8Linear) for m in student.velocities[0].modules())


def test_adapters_start_from_the_lora_files_of_an_earlier_stage(
    make_recipe: Callable[..., Recipe], tiny_folder: Path, tmp_path: Path
) -> None:
    """Of a lower rank: the roles are the same functions, and what is new can still learn."""
    backbone, files = with_random_adapters(), tmp_path / "pair"
    files.mkdir()
    for step in ("first", "second"):
        state = backbone.module(step).state_dict()
        named = {"transformer." + k.replace("/", "."): v for k, v in state.items()}
        save_file(named, files / f"{step}.safetensors")
    write_lora_index(files, teacher=(str(tiny_folder), None), schedule=Schedule(3.0, 0.75))
    recipe = make_recipe(student=LORA | {"rank": 6, "init": str(files)})
    roles = build_roles(recipe, ModelFolder.open(tiny_folder), device=CPU)
    for step in ("first", "second"):
        expected = Role.adapter(backbone, step)(*inputs()).velocity
        found = getattr(roles, step)(*inputs()).velocity
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    ups = [p for p in roles.first.parameters() if p.shape[0] == 6]
    assert all(p[4:].any() for p in ups)
    assert not any(p.any() for p in roles.fakes[0].parameters() if p.shape[1] == 6)
    with pytest.raises(RecipeError, match=r"has rank 4, student\.rank is 2"):
        build_roles(
            make_recipe(student=LORA | {"rank": 2, "init": str(files)}),
            ModelFolder.open(tiny_folder),
            device=CPU,
        )
    with pytest.raises(RecipeError, match="is no folder of two LoRA files"):
        build_roles(
            make_recipe(student=LORA | {"init": "zoo:emoji-student"}),
            ModelFolder.open(tiny_folder),
            device=CPU,
        )


def test_compiled_blocks_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = gradients(checkpointing=False, in_between=False)
    compiled = gradients(checkpointing=True, in_between=True, compiled=True)
    for name in ("first", "second"):
        for a, b in zip(plain[name], compiled[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
