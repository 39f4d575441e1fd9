from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file
from typer.testing import CliRunner

from tiny import random_transformer
from twostep.cli import app
from twostep.errors import InputError, ModelError
from twostep.exports.combine import assemble, average
from twostep.exports.comfyui import allows_fp16, to_comfyui
from twostep.exports.comfyui_workflow import laid_out, lora_workflow, workflow
from twostep.exports.low_rank import low_rank_difference, rank_for
from twostep.exports.registry import ExportOptions, export
from twostep.families.family import PromptBatch
from twostep.inference.pipeline import STANDALONE, TwoStepPipeline
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.student import save_student
from twostep.zoo import ZOO, zoo_folder

NOISE = seeded_noise([3], (8, 8, 8))


def nudged(seed: int, rank: int = 2) -> ZImageTransformer2DModel:
    """The tiny teacher with a low-rank change of every linear layer."""
    model = random_transformer()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                a = torch.randn(rank, module.in_features, generator=generator)
                b = torch.randn(module.out_features, rank, generator=generator)
                module.weight += 0.02 * b @ a
    return model


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "student"
    save_student(
        tiny_folder,
        nudged(1),
        nudged(2),
        schedule=Schedule(3.0, 0.75),
        folder=folder,
        dtype=torch.float32,
    )
    return folder


def images(folder: Path) -> torch.Tensor:
    pipe = TwoStepPipeline.from_pretrained(folder)
    return pipe("a dog", height=32, width=32, latents=NOISE, output_type="latent").images


# ComfyUI.


def test_comfyui_layout_is_read_back_by_diffusers(student: Path, tmp_path: Path) -> None:
    lines = export(str(student), "comfyui", tmp_path / "out")
    assert "ComfyUI will not recognise this model as Z-Image: dim is 64, expected 3840" in lines[0]
    assert lines[1:] == ["models/diffusion_models: first.safetensors, second.safetensors"]
    for name, part in (("first", "transformer"), ("second", "transformer_2")):
        converted = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert "layers.0.attention.qkv.weight" in converted
        assert not any("to_q" in k or "norm_q" in k or "all_" in k for k in converted)
        original = ZImageTransformer2DModel.from_pretrained(student, subfolder=part).state_dict()
        back = convert_z_image_transformer_checkpoint_to_diffusers(converted)
        assert set(back) == set(original)
        assert all(torch.equal(back[k], original[k]) for k in original)


def test_comfyui_layout_at_real_size() -> None:
    """Z-Image Turbo's own numbers: 521 keys become 453, a fused projection is (11520, 3840)."""
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30,
            cap_feat_dim=2560, in_channels=16, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512],
        )  # fmt: skip
    state = model.state_dict()
    converted = to_comfyui(state)
    assert (len(state), len(converted)) == (521, 453)
    assert converted["layers.29.attention.qkv.weight"].shape == (11520, 3840)
    # What ComfyUI's detection asks for (model_detection.py).
    assert converted["cap_embedder.1.weight"].shape[0] == 3840
    assert {"noise_refiner.0.attention.k_norm.weight", "cap_pad_token"} <= set(converted)
    assert sum(v.numel() for v in converted.values()) == 6_154_908_736


def test_comfyui_workflow_runs_the_two_steps() -> None:
    nodes = workflow("a.safetensors", "b.safetensors", shift=3.0)
    samplers = [n["inputs"] for n in nodes.values() if n["class_type"] == "KSamplerAdvanced"]
    assert [(s["start_at_step"], s["end_at_step"], s["add_noise"]) for s in samplers] == [
        (0, 1, "enable"),
        (1, 2, "disable"),
    ]
    assert samplers[0]["return_with_leftover_noise"] == "enable"
    assert all(s["cfg"] == 1.0 and s["steps"] == 2 for s in samplers)
    # Every link points to a node; the samplers' models come from different loaders.
    links = [v for n in nodes.values() for v in n["inputs"].values() if isinstance(v, list)]
    assert all(target in nodes for target, _ in links)
    loaders = [nodes[nodes[s["model"][0]]["inputs"]["model"][0]]["inputs"] for s in samplers]
    assert [loader["unet_name"] for loader in loaders] == ["a.safetensors", "b.safetensors"]
    # ComfyUI's `simple` scheduler: every 500th of 1000 shifted levels.
    levels = [3 * (i / 1000) / (1 + 2 * (i / 1000)) for i in range(1, 1001)]
    assert [levels[-1 - int(i * 1000 / 2)] for i in range(2)] == [1.0, pytest.approx(0.75)]


def test_comfyui_workflow_of_two_loras_loads_one_transformer() -> None:
    nodes = lora_workflow("base.safetensors", "a.safetensors", "b.safetensors", shift=3.0)
    kinds = [node["class_type"] for node in nodes.values()]
    assert kinds.count("UNETLoader") == 1
    samplers = [n["inputs"] for n in nodes.values() if n["class_type"] == "KSamplerAdvanced"]
    loras = [nodes[nodes[s["model"][0]]["inputs"]["model"][0]]["inputs"] for s in samplers]
    assert [lora["lora_name"] for lora in loras] == ["a.safetensors", "b.safetensors"]
    assert {nodes[lora["model"][0]]["class_type"] for lora in loras} == {"UNETLoader"}


@pytest.mark.parametrize(
    "nodes", [workflow("a", "b", shift=3.0), lora_workflow("c", "a", "b", shift=3.0)]
)
def test_comfyui_page_has_every_node_and_link_of_the_api(nodes: dict) -> None:
    page = laid_out(nodes)
    found = {str(node["id"]): node for node in page["nodes"]}
    assert found.keys() == nodes.keys()
    outputs: dict[int, tuple[int, str]] = {}
    for node in page["nodes"]:
        for slot in node["outputs"]:
            outputs |= dict.fromkeys(slot["links"], (node["id"], slot["type"]))
    for number, source, slot, target, place, of_type in page["links"]:
        assert outputs[number] == (source, of_type)
        inside = found[str(target)]["inputs"][place]
        assert inside == {"name": inside["name"], "type": of_type, "link": number}
        assert nodes[str(target)]["inputs"][inside["name"]] == [str(source), slot]
    assert len(page["links"]) == sum(
        isinstance(v, list) for n in nodes.values() for v in n["inputs"].values()
    )
    # Nothing lies on anything else, and every link goes to the right.
    places = [(*node["pos"], *node["size"]) for node in page["nodes"]]
    for i, (x, y, width, height) in enumerate(places):
        for x2, y2, width2, height2 in places[:i]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    for _, source, _, target, *_ in page["links"]:
        assert found[str(source)]["pos"][0] < found[str(target)]["pos"][0]
    (first,) = [n for n in page["nodes"] if n["id"] == 9]
    assert first["widgets_values"] == [
        "enable", 0, "fixed", 2, 1.0, "euler", "simple", 0, 1, "enable"
    ]  # fmt: skip


def test_comfyui_warns_of_norms_that_rule_out_fp16() -> None:
    weights = {"layers.1.ffn_norm1.weight": torch.linspace(-1, 1, 64)}
    assert not allows_fp16(weights, layers=3)
    assert allows_fp16({k: 0.5 * v for k, v in weights.items()}, layers=3)


def test_comfyui_refuses_what_its_samplers_do_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    for schedule in (Schedule(3.0, 0.6), Schedule(3.0, 0.75, "renoise")):
        folder = tmp_path / "student"
        save_student(tiny_folder, nudged(1), nudged(2), schedule=schedule, folder=folder)
        with pytest.raises(
            ModelError, match=r"stock samplers run Euler steps at sigma 1 and 0\.75"
        ):
            export(str(folder), "comfyui", tmp_path / "out")
        assert not (tmp_path / "out").exists()


# LoRA.


def test_low_rank_difference_is_exact_at_full_rank_and_best_below() -> None:
    teacher, student = random_transformer(), nudged(1, rank=4)
    whole = low_rank_difference(teacher, student, 4)
    assert whole.energy == pytest.approx(1, abs=1e-6)
    assert whole.rest == 0
    name = "layers.1.attention.to_q"
    difference = (student.get_submodule(name).weight - teacher.get_submodule(name).weight).detach()
    a, b = whole.changes[name].down, whole.changes[name].up
    torch.testing.assert_close(b @ a, difference, atol=1e-5, rtol=1e-4)
    half = low_rank_difference(teacher, student, 2)
    a, b = half.changes[name].down, half.changes[name].up
    singular = torch.linalg.svdvals(difference)
    error = (b @ a - difference).square().sum()
    torch.testing.assert_close(error, singular[2:].square().sum(), atol=1e-6, rtol=1e-3)
    assert 0.3 < half.energy < 0.95
    with torch.no_grad():
        student.x_pad_token.add_(1.0)
    assert low_rank_difference(teacher, student, 4).rest > 0
    with pytest.raises(ValueError, match="rank must be at least 1"):
        low_rank_difference(teacher, student, 0)


def test_rank_for_an_energy_is_the_lowest_that_keeps_it() -> None:
    teacher, student = random_transformer(), nudged(1, rank=4)
    assert rank_for(teacher, student, 1.0) == 4
    kept = [low_rank_difference(teacher, student, rank).energy for rank in (1, 2, 3)]
    for rank, energy in enumerate(kept, 1):
        assert rank_for(teacher, student, energy - 1e-4) == rank
        assert rank_for(teacher, student, energy + 1e-4) == rank + 1
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
            rank_for(teacher, student, wrong)


def test_lora_export_compares_pictures_with_the_students(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = {"teacher": str(tiny_folder), "check": ["a dog", "a cat"], "size": (32, 32)}
    good = export(
        str(student), "lora", tmp_path / "good", ExportOptions(energy=0.999999, **arguments)
    )
    poor = export(str(student), "lora", tmp_path / "poor", ExportOptions(rank=1, **arguments))
    ratios = [float(re.search(r"ratio (-?[\d.]+) dB", lines[-1])[1]) for lines in (good, poor)]
    assert ratios[0] > ratios[1] + 10
    assert "rank 2 keeps 100.0%" in good[0]
    assert good[-1] in (tmp_path / "good" / "README.md").read_text(encoding="utf-8")


def test_lora_card_finds_the_package_models_by_name(tmp_path: Path) -> None:
    options = ExportOptions(teacher="zoo:emoji-teacher", rank=1)
    export("zoo:emoji-student", "lora", tmp_path / "out", options)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'from_pretrained(zoo_folder("zoo:emoji-teacher"))' in card
    assert str(zoo_folder("emoji-teacher")) not in card


def test_lora_files_are_assembled_into_a_student_again(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    export(str(student), "lora", tmp_path / "lora", ExportOptions(teacher=str(tiny_folder), rank=4))
    first, second = (str(tmp_path / "lora" / f"{n}.safetensors") for n in ("first", "second"))
    assemble(str(tiny_folder), first, second, out=tmp_path / "again")
    torch.testing.assert_close(images(tmp_path / "again"), images(student), atol=5e-3, rtol=5e-3)


# torch.export.


def test_torch_programs_take_the_steps_of_the_student(student: Path, tmp_path: Path) -> None:
    sampler = Sampler.load(str(student))
    export(
        str(student),
        "torch",
        tmp_path / "out",
        ExportOptions(size=(32, 32), batch_size=2, caption_tokens=32),
    )
    about = json.loads((tmp_path / "out" / "program.json").read_text(encoding="utf-8"))
    assert about["inputs"]["latents"]["shape"] == [2, 8, 8, 8]
    prompts = ["a dog", "two cats"]
    batch = PromptBatch.collate(sampler.encoder.encode(prompts))
    noise = seeded_noise([1, 2], (8, 8, 8))
    latents, velocity = noise, None
    for name, field in (("first", sampler.velocities[0]), ("second", sampler.velocities[1])):
        program = torch.export.load(tmp_path / "out" / f"{name}.pt2").module()
        sigma = torch.full((2,), about["sigma"][name])
        if velocity is not None:
            latents = noise + (about["sigma"]["second"] - 1) * velocity
        velocity = program(latents, sigma, batch.embeds, batch.lengths)
        torch.testing.assert_close(velocity, field(latents, sigma, batch).velocity)
    clean = latents - about["sigma"]["second"] * velocity
    torch.testing.assert_close(clean, sampler.sample(prompts, noise).latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (31, 32)}, "size: height must be a positive multiple of 8"),
        ({"caption_tokens": 33}, "caption_tokens: must be a positive multiple of 32, got 33"),
    ],
)
def test_torch_programs_refuse_shapes(
    student: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    with pytest.raises((InputError, ModelError), match=message):
        options = ExportOptions(**({"size": (32, 32)} | changes))
        export(str(student), "torch", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


# Diffusers.


def test_diffusers_export_carries_a_card_with_recipe_and_figures(
    student: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(student, run / "student")
    (run / "recipe.yaml").write_text("name: fox\n")
    models = {"teacher_8": {"accuracy": {"overall": 0.9}}, "student_2": {}}
    figures = {"models": models, "gap_closed": {"student_2": 0.93}, "images": 512, "prompts": 256}
    (run / "report.json").write_text(json.dumps(figures))
    runner = CliRunner()
    arguments = ["export", "--model", str(run / "student"), "--to", "diffusers"]
    result = runner.invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "closes 93% of the gap" in card
    assert "name: fox" in card
    assert torch.equal(images(tmp_path / "out"), images(student))
    again = runner.invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert again.exit_code != 0
    assert "is not empty" in str(again.exception)


def test_two_folders_make_a_student(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    first, second = str(student / "transformer"), str(student / "transformer_2")
    assemble(str(tiny_folder), first, second, out=tmp_path / "made")
    assert torch.equal(images(tmp_path / "made"), images(student))


@pytest.mark.parametrize(
    ("target", "teacher", "message"),
    [
        ("onnx", None, "'onnx' is unknown; allowed: diffusers, server, lora, comfyui, gguf, torch"),
        ("lora", None, "LoRA files belong to a model"),
    ],
)
def test_mistakes(
    student: Path, tmp_path: Path, target: str, teacher: str | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        export(str(student), target, tmp_path / "out", ExportOptions(teacher=teacher))


def test_a_teacher_is_no_student(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no two-step student"):
        export(str(tiny_folder), "diffusers", tmp_path / "out")


def test_students_of_the_zoo_carry_the_pipeline_of_today() -> None:
    copies = sorted(ZOO.glob("*/pipeline.py"))
    assert copies
    assert all(copy.read_bytes() == STANDALONE.read_bytes() for copy in copies)


# The mean of several.


def test_average_is_the_mean_of_each_steps_weights(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other, third = tmp_path / "other", tmp_path / "third"
    save_student(
        tiny_folder,
        nudged(3),
        nudged(4),
        schedule=Schedule(3.0, 0.75),
        folder=other,
        dtype=torch.float32,
    )
    save_student(
        tiny_folder,
        nudged(5),
        nudged(6),
        schedule=Schedule(3.0, 0.75),
        folder=third,
        dtype=torch.float32,
    )
    out = tmp_path / "mean"
    names = [str(folder) for folder in (student, other, third)]
    result = CliRunner().invoke(app, ["average", *names, "--out", str(out)])
    assert result.exit_code == 0, result.output
    for part in ("transformer", "transformer_2"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        found = load_file(out / file)
        states = [load_file(Path(name) / file) for name in names]
        for key, value in found.items():
            expected = torch.stack([state[key] for state in states]).mean(0)
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(images(out), images(student))
    twice = tmp_path / "twice"
    average([str(student), str(student)], out=twice)
    assert torch.equal(images(twice), images(student))


def test_students_that_do_not_fit_together_are_named(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_student(
        tiny_folder,
        nudged(3),
        nudged(4),
        schedule=Schedule(3.0, 0.6),
        folder=other,
        dtype=torch.float32,
    )
    with pytest.raises(ModelError, match="two at least, got 1"):
        average([str(student)], out=tmp_path / "out")
    with pytest.raises(ModelError, match="student differ in their schedule"):
        average([str(student), str(other)], out=tmp_path / "out")
    with pytest.raises(ModelError, match="no two-step student"):
        average([str(student), str(tiny_folder)], out=tmp_path / "out")
    with pytest.raises(ModelError, match="is not empty"):
        average([str(student), str(student)], out=student)
    assert not (tmp_path / "out").exists()
