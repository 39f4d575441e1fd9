"""A user's LoRA on a student: both steps, one of them, a scale for each; on two LoRA files, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import lora_matrices, random_transformer, write_lora
from twostep.exports.registry import ExportOptions, export
from twostep.inference.pipeline import TwoStepPipeline
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile, save_lora
from twostep.models.student import save_student, write_lora_index

NOISE = seeded_noise([3], (8, 8, 8))
SCHEDULE = Schedule(3.0, 0.75)


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras") / "student"
    steps = random_transformer(1), random_transformer(2)
    save_student(tiny_folder, *steps, schedule=SCHEDULE, folder=folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras") / "pair"
    for seed, name in ((5, "first"), (6, "second")):
        weights = {
            f"{module}.lora_{side}.weight": matrix
            for module, sides in lora_matrices(seed, rank=3).items()
            for side, matrix in zip("AB", sides, strict=True)
        }
        save_lora(weights, 3, folder, f"{name}.safetensors")
    write_lora_index(folder, teacher=(str(tiny_folder), None), schedule=SCHEDULE)
    return folder


@pytest.fixture
def style(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "style.safetensors")


def expected(student: Path, style: Path, scales: tuple[float, float]) -> Tensor:
    """The student's latents with the LoRA merged into each step's weights."""
    samplers = [
        Sampler.load(ModelFolder.open(student).with_loras([LoraFile.open(style, scale)]))
        for scale in scales
    ]
    both = [sampler.velocities[step] for step, sampler in enumerate(samplers)]
    samplers[0].velocities = tuple(both)
    return samplers[0].sample(["a dog"], NOISE).latents


def latents(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    noise = NOISE.clone()
    return pipe("a dog", height=32, width=32, latents=noise, output_type="latent").images


def opened(kind: str, student: Path) -> Any:
    if kind == "package":
        return TwoStepPipeline.from_pretrained(student)
    return DiffusionPipeline.from_pretrained(student, trust_remote_code=True)


@pytest.mark.parametrize("kind", ["package", "folder"])
def test_it_reaches_both_steps_with_a_scale_for_each(kind: str, student: Path, style: Path) -> None:
    pipe = opened(kind, student)
    pipe.load_lora_weights(str(style), adapter_name="style")
    close: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(latents(pipe), expected(student, style, (1, 1)), **close)
    pipe.set_adapters("style", {"transformer": 0.7, "transformer_2": -0.4})
    weighed = expected(student, style, (0.7, -0.4))
    assert (weighed - expected(student, style, (0.7, 0.7))).abs().max() > 0.05
    torch.testing.assert_close(latents(pipe), weighed, **close)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), weighed, **close)


@pytest.mark.parametrize("kind", ["package", "folder"])
@pytest.mark.parametrize(("second", "scales"), [(True, (0, 1)), (False, (1, 0))])
def test_it_reaches_one_step_alone(
    kind: str, second: bool, scales: tuple[float, float], student: Path, style: Path
) -> None:
    pipe = opened(kind, student)
    pipe.load_lora_weights(str(style), load_into_transformer_2=second)
    wanted = expected(student, style, scales)
    torch.testing.assert_close(latents(pipe), wanted, atol=1e-3, rtol=1e-3)
    # Another one, on both steps, gets a name of its own.
    pipe.load_lora_weights(str(style))
    names = [set(p.peft_config) for p in (pipe.transformer, pipe.transformer_2)]
    assert names[0] | names[1] == {"default_0", "default_1"}
    assert names[0] & names[1] == {"default_1"}


@pytest.mark.parametrize("kind", ["package", "folder"])
def test_a_lora_of_another_model_is_refused(kind: str, student: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"transformer.blocks.0.to_q.lora_A.weight": torch.ones(2, 64)}, path)
    pipe = opened(kind, student)
    with pytest.raises(ValueError, match=r"no LoRA for this transformer: transformer\.blocks"):
        pipe.load_lora_weights(str(path))


def test_peft_files_have_the_alpha_beside_them(student: Path, style: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    folder = tmp_path / "peft"
    config = LoraConfig(r=2, lora_alpha=1.0, target_modules=sorted(lora_matrices()))
    config.save_pretrained(folder)
    weights = {
        key.replace("transformer.", "base_model.model.", 1): value
        for key, value in load_file(style).items()
    }
    save_file(weights, folder / "adapter_model.safetensors")
    pipe = TwoStepPipeline.from_pretrained(student)
    pipe.load_lora_weights(str(folder), weight_name="adapter_model.safetensors")
    wanted = expected(student, style, (0.5, 0.5))
    torch.testing.assert_close(latents(pipe), wanted, atol=1e-3, rtol=1e-3)


def test_two_lora_files_and_a_style(pair: Path, style: Path, tmp_path: Path) -> None:
    """Adapters, merged weights, a pipeline and the exported files agree."""
    tuned = ModelFolder.open(pair).with_loras([LoraFile.open(style, 0.8)])
    wanted = Sampler.load(tuned).sample(["a dog"], NOISE).latents
    plain = Sampler.load(str(pair)).sample(["a dog"], NOISE).latents
    assert (wanted - plain).abs().max() > 0.05
    pipe = TwoStepPipeline.from_pretrained(pair)
    pipe.load_lora_weights(str(style), adapter_name="style")
    pipe.set_adapters("style", 0.8)
    close: dict[str, Any] = {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(latents(pipe), wanted, **close)
    for target in ("lora", "diffusers"):
        options = ExportOptions(loras=[LoraFile.open(style, 0.8)])
        lines = export(str(pair), target, tmp_path / target, options)
        assert not any("rounds" in line for line in lines)  # the tiny teacher is in fp32
        again = Sampler.load(str(tmp_path / target)).sample(["a dog"], NOISE).latents
        torch.testing.assert_close(again, wanted, **close)
    half = ExportOptions(dtype=torch.bfloat16)
    (line,) = export(str(pair), "diffusers", tmp_path / "half", half)
    assert "added to weights in bfloat16, which rounds what they change" in line
    joined = load_file(tmp_path / "lora" / "first.safetensors")
    assert {v.shape[0] for k, v in joined.items() if "lora_A" in k} == {5}
