"""LoRA files as a part of a model's weights, and a fine-tune of the teacher distilled with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig
from safetensors.torch import save_file
from typer.testing import CliRunner

from tiny import CPU, TEXT_WIDTH, as_velocity, lora_matrices, random_transformer, write_lora
from twostep.cli import app
from twostep.cli.arguments import open_loras
from twostep.data.cache.build import open_cache
from twostep.data.cache.spec import CacheSpec
from twostep.distill.objectives.build import build_roles
from twostep.distill.trainer import Trainer
from twostep.errors import InputError, ModelError, RecipeError
from twostep.exports.registry import ExportOptions, export
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise, two_step
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile, add_loras
from twostep.models.velocity import bind
from twostep.recipe.schema import Recipe
from twostep.runtime.distributed import own_part

Make = Callable[..., Recipe]
LAYOUTS = ("diffusers", "peft", "kohya", "comfyui")


def write(folder: Path, layout: str, alpha: float) -> Path:
    """`lora_matrices` with alpha, as the trainers of the world write it."""
    path, matrices = folder / f"{layout}.safetensors", lora_matrices()
    rank = len(next(iter(matrices.values()))[0])
    tensors, metadata = {}, None
    for name, (a, b) in matrices.items():
        if layout == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        else:
            key = {"comfyui": "diffusion_model.", "peft": "base_model.model."}.get(
                layout, "transformer."
            )
            tensors |= {f"{key}{name}.lora_A.weight": a, f"{key}{name}.lora_B.weight": b}
        if layout == "comfyui":
            tensors[f"{key}{name}.alpha"] = torch.tensor(alpha)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(matrices))
    if layout == "diffusers":
        values = {"r": rank, "lora_alpha": alpha, "target_modules": sorted(matrices)}
        metadata = {
            "lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in values.items()})
        }
    if layout == "peft":
        path = folder / "adapter_model.safetensors"
        config.save_pretrained(folder)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adds_scale_times_alpha_over_rank_times_b_a(
    layout: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, layout, alpha=1.0)
    folder = ModelFolder.open(tiny_folder).with_loras([LoraFile.open(path, 0.8)])
    plain, model = random_transformer(), folder.load("transformer", torch.float32)
    changed = 0
    matrices = lora_matrices()
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        change = weight - plain.get_parameter(name)
        if module in matrices:
            a, b = matrices[module]
            torch.testing.assert_close(change, 0.8 * (1.0 / 2) * b @ a, atol=1e-5, rtol=1e-4)
            changed += 1
        else:
            assert not change.any(), name
    assert changed == len(matrices)


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_it_is_what_stock_diffusers_makes_of_the_file(
    layout: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = write(tmp_path, layout, alpha=3.0)
    pipe = ZImagePipeline.from_pretrained(tiny_folder)
    pipe.load_lora_weights(str(path), adapter_name="style")
    pipe.set_adapters(["style"], [0.6])
    pipe.fuse_lora(adapter_names=["style"])
    pipe.unload_lora_weights()
    folder = ModelFolder.open(tiny_folder).with_loras([LoraFile.open(path, 0.6)])
    ours = folder.stored_transformer("transformer").state_dict()
    for name, value in pipe.transformer.state_dict().items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_several_files_add_up_and_bf16_is_rounded_once(tiny_folder: Path, tmp_path: Path) -> None:
    one = write_lora(tmp_path / "a.safetensors", lora_matrices(1))
    two = write_lora(tmp_path / "b.safetensors", lora_matrices(2))
    folder = ModelFolder.open(tiny_folder).with_loras(
        [LoraFile.open(one, 0.5), LoraFile.open(two, -1.0)]
    )
    name = "layers.0.attention.to_q"
    (a1, b1), (a2, b2) = lora_matrices(1)[name], lora_matrices(2)[name]
    expected = random_transformer().get_submodule(name).weight + 0.5 * b1 @ a1 - b2 @ a2
    found = folder.load("transformer", torch.float32).get_submodule(name).weight
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    half = ModelFolder.open(tiny_folder).with_loras([LoraFile.open(one)])
    rounded = random_transformer().get_submodule(name).weight.bfloat16().float() + b1 @ a1
    found = half.load("transformer", torch.bfloat16).get_submodule(name).weight
    assert torch.equal(found, rounded.bfloat16())


def spoilt(kind: str) -> dict[str, tuple]:
    matrices = lora_matrices()
    if kind == "shape":
        matrices["layers.0.attention.to_q"] = torch.zeros(2, 96), torch.zeros(96, 2)
    if kind == "name":
        matrices["layers.7.attention.to_q"] = lora_matrices()["layers.0.attention.to_q"]
    return matrices


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"layers.0.attention.to_q is 64 x 64, the file's matrices are 96x2 and 2x96"),
        ("name", r"it has no linear layer layers.7.attention.to_q"),
        ("half", r"cap_embedder.1 has one of its two matrices alone"),
        ("other", r"no matrix of a LoRA|no linear layer|should be empty"),
        ("dora", r"DoRA is not supported"),
        ("empty", r"the file is empty"),
        ("torn", r"is no LoRA for the transformer"),
        ("missing", r"no file at .*x.safetensors"),
        ("sha256", r"x.safetensors is another file, its sha256 is [0-9a-f]{64}"),
    ],
)
def test_a_file_that_does_not_fit_is_named_before_anything_is_loaded(
    kind: str, message: str, make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, entry = tmp_path / "x.safetensors", {}
    write_lora(path, spoilt(kind))
    if kind == "half":
        name = "transformer.cap_embedder.1.lora_A.weight"
        save_file({name: lora_matrices()["cap_embedder.1"][0]}, path)
    elif kind == "other":
        save_file({"lora_te_text_model_encoder_q_proj.lora_down.weight": torch.zeros(2, 4)}, path)
    elif kind == "dora":
        save_file({"transformer.layers.0.attention.to_q.dora_scale": torch.zeros(64)}, path)
    elif kind == "empty":
        save_file({}, path)
    elif kind == "torn":
        path.write_bytes(b"torn")
    elif kind == "missing":
        path.unlink()
    elif kind == "sha256":
        entry = {"sha256": "0" * 64}
    good = write_lora(tmp_path / "good.safetensors")
    recipe = make_recipe(teacher={"loras": [str(good), {"path": str(path), **entry}]})

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ZImageTransformer2DModel, "from_pretrained", never)
    with pytest.raises(ModelError, match=rf"teacher\.loras\[1\]: (.|\n)*({message})"):
        open_cache(recipe)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.safetensors:strong",
            "expected a number from -10000 to 10000 as the scale after a.safetensors:",
        ),
        ("a.safetensors:nan", "expected a number"),
        ("a.ckpt:0.5", "expected FILE.safetensors or FILE.safetensors:SCALE"),
    ],
)
def test_text_that_names_no_lora(text: str, message: str, make_recipe: Make) -> None:
    with pytest.raises(RecipeError, match=rf"^teacher\.loras\[0\]: {message}.*, got '{text}'"):
        make_recipe(teacher={"loras": [text]})
    with pytest.raises(InputError, match=f"--lora: {message}.*, got '{text}'"):
        open_loras([text])


def test_a_recipe_names_files_in_short_or_in_full(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nteacher:\n  model: zoo:emoji-teacher\n  loras: [a.safetensors:-0.5]\n"
    )
    (lora,) = Recipe.load(path).teacher.loras
    assert (lora.path, lora.scale, lora.sha256) == (Path("a.safetensors"), -0.5, None)
    recipe = Recipe.load(path, ["teacher.loras=[/b/c.safetensors, d.safetensors:1e-1]"])
    assert [(str(e.path), e.scale) for e in recipe.teacher.loras] == [
        ("/b/c.safetensors", 1.0), ("d.safetensors", 0.1)
    ]  # fmt: skip
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_fingerprint_follows_file_and_scale_and_not_where_it_lies(
    make_recipe: Make, tmp_path: Path
) -> None:
    def fingerprint(*loras: str) -> str:
        return CacheSpec.of(make_recipe(teacher={"loras": list(loras)})).fingerprint

    one = write_lora(tmp_path / "one.safetensors")
    same = write_lora(tmp_path / "same.safetensors")
    other = write_lora(tmp_path / "other.safetensors", lora_matrices(1))
    found = [fingerprint(), *(fingerprint(x) for x in (f"{one}", f"{one}:0.5", f"{other}"))]
    assert len(set(found)) == 4
    assert fingerprint(str(same)) == found[1]


def test_part_of_a_sharded_weight() -> None:
    """As FSDP2 splits rows: torch.chunk's parts, some of them empty."""
    from torch.distributed.tensor import Replicate, Shard

    class Mesh:
        def __init__(self, *place: int) -> None:
            self.place = place

        def get_local_rank(self, dimension: int) -> int:
            return self.place[dimension]

        def size(self, dimension: int) -> int:
            return (2, 4)[dimension]

    class Like:
        placements = (Replicate(), Shard(0))

    value, found = torch.arange(10.0).view(5, 2), []
    for rank in range(4):
        like: Any = Like()
        like.device_mesh = Mesh(1, rank)
        found.append(own_part(value, like))
    assert [len(part) for part in found] == [2, 2, 1, 0]
    assert torch.equal(torch.cat(found), value)


def inputs() -> tuple[torch.Tensor, torch.Tensor, PromptBatch]:
    generator = torch.Generator().manual_seed(1)
    embeds = [torch.randn(5 + i, TEXT_WIDTH, generator=generator) for i in range(2)]
    latents = torch.randn(2, 8, 8, 8, generator=generator)
    return latents, torch.full((2,), 0.8), PromptBatch.collate(embeds)


LORA = {"weights": "lora", "rank": 4, "backbone_dtype": "float32"}


@pytest.mark.parametrize("student", [{}, LORA], ids=["full", "lora"])
def test_every_role_that_starts_from_the_teacher_has_its_loras(
    student: dict[str, Any], make_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    path = write_lora(tmp_path / "style.safetensors")
    recipe = make_recipe(
        teacher={"loras": [f"{path}:0.7"]}, score={"fit_turns": 1}, student=student
    )
    teacher = CacheSpec.of(recipe).teacher
    fused = random_transformer()
    add_loras(fused, [LoraFile.open(path, 0.7)], teacher.family, tiny_folder)
    expected = as_velocity(fused)(*inputs()).velocity
    assert (expected - as_velocity(random_transformer())(*inputs()).velocity).abs().max() > 0.05
    roles = build_roles(recipe, teacher, device=CPU).by_name()
    assert set(roles) == {"teacher", "score", "first", "second", "fake1", "fake2"}
    for name, role in roles.items():
        torch.testing.assert_close(
            role(*inputs()).velocity, expected, atol=1e-5, rtol=1e-5, msg=name
        )


@pytest.mark.parametrize("student", [{}, LORA], ids=["full", "lora"])
def test_a_fine_tune_is_distilled_and_opened_everywhere(
    student: dict[str, Any], make_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    """Cache, rollout, student folder, stock diffusers and a LoRA pair agree."""
    path = write_lora(tmp_path / "style.safetensors", lora_matrices(std=0.1))
    recipe = make_recipe(
        teacher={"loras": [f"{path}:2"]}, student=student, training={"turns": 4, "save_every": 4}
    )
    cache = open_cache(recipe)
    samples = cache.read([0, 5])
    tuned = Sampler.load(cache.spec.teacher)
    torch.testing.assert_close(
        tuned.sample(samples.prompts, samples.noise, steps=4).latents, samples.latents,
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    trainer = Trainer(recipe, cache)
    folder = trainer.train()
    sha256 = LoraFile.open(path).sha256
    written = Recipe.load(recipe.run_folder / "recipe.yaml")
    assert [lora.sha256 for lora in written.teacher.loras] == [sha256]

    noise, prompts = seeded_noise([3, 4], (8, 8, 8)), ["a dog", "two cats"]
    batch = PromptBatch.collate(tuned.encoder.encode(prompts))
    with torch.no_grad(), trainer.state.ema.applied():
        first, second = (bind(role, batch) for role in (trainer.roles.first, trainer.roles.second))
        rollout = two_step(first, second, noise, trainer.cache.spec.schedule).clean2
    ours = Sampler.load(str(folder)).sample(prompts, noise).latents
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock.set_progress_bar_config(disable=True)
    # It writes its chat template into the list of prompts that it is given.
    theirs = stock(list(prompts), height=32, width=32, latents=noise, output_type="latent").images
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=0)
    plain = Sampler.load(ModelFolder.open(tiny_folder)).sample(prompts, noise, steps=2).latents
    # The folder holds bf16; a lost LoRA would be seen.
    assert (ours - rollout).norm() < 0.1 * (plain - ours).norm()

    # Two LoRA files on the plain teacher hold style and student.
    lines = export(
        str(folder), "lora", tmp_path / "pair", ExportOptions(teacher=str(tiny_folder), rank=64)
    )
    assert "keeps 100.0%" in lines[0]
    pair = Sampler.load(str(tmp_path / "pair")).sample(prompts, noise).latents
    assert (pair - ours).norm() < 0.1 * (plain - ours).norm()

    # The same file again goes on with the run; another one under its name does not.
    Trainer(recipe, cache)
    write_lora(path, lora_matrices(5))
    changed = make_recipe(
        teacher={"loras": [f"{path}:2"]}, student=student, training={"turns": 4, "save_every": 4},
        data={"cache": str(tmp_path / "other")},
    )  # fmt: skip
    with pytest.raises(RecipeError, match=r"another recipe.*teacher\.loras was .*sha256"):
        Trainer(changed, open_cache(changed))


def test_generate_takes_lora_files(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "style.safetensors")
    call = ["generate", "--model", str(tiny_folder), "a dog", "--size", "32", "--steps", "2"]
    call += ["--out", str(tmp_path / "out"), "--json"]

    def run(*more: str) -> tuple[bool, bytes]:
        result = CliRunner().invoke(app, [*call, *more])
        assert result.exit_code == 0, result.output
        picture = json.loads(result.output.strip().splitlines()[-1])
        return picture["made"], Path(picture["path"]).read_bytes()

    plain, tuned = run(), run("--lora", f"{path}:0.9")
    assert plain[0]
    assert tuned[0]
    assert plain[1] != tuned[1]
    assert run("--lora", f"{path}:0.9") == (False, tuned[1])
    assert run("--lora", str(path))[0]
    result = CliRunner().invoke(app, [*call, "--lora", "nowhere.safetensors"])
    assert isinstance(result.exception, ModelError | SystemExit)
    assert "--lora: no file at nowhere.safetensors" in str(result.exception) + result.output
