from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline, ZImagePipeline
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file

from tiny import random_transformer
from twostep.errors import ModelError
from twostep.inference.pipeline import TwoStepPipeline
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.student import save_student


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("students") / "student"
    save_student(
        tiny_folder,
        random_transformer(1),
        random_transformer(2),
        schedule=Schedule(3.0, 0.75),
        folder=folder,
    )
    return folder


@pytest.fixture
def pipe(student: Path) -> TwoStepPipeline:
    return TwoStepPipeline.from_pretrained(student)


def call(pipe: TwoStepPipeline, prompt="a dog", **changes):
    arguments = {"height": 32, "width": 32, "output_type": "latent"} | changes
    return pipe(prompt, **arguments)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding: where weights lie in memory decides how some processors add up."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_schedule_is_the_folders(student: Path, pipe: TwoStepPipeline) -> None:
    assert ModelFolder.open(student).schedule() == Schedule.of(3.0)
    assert pipe.config.step2_sigma == 0.75


def test_both_transformers_act(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    noise = seeded_noise([0], (8, 8, 8))
    results = [call(TwoStepPipeline.from_pretrained(student), latents=noise).images]
    for first, second in ((1, 3), (3, 2)):
        other = tmp_path / f"{first}{second}"
        save_student(
            tiny_folder,
            random_transformer(first),
            random_transformer(second),
            schedule=Schedule(3.0, 0.75),
            folder=other,
        )
        results.append(call(TwoStepPipeline.from_pretrained(other), latents=noise).images)
    assert (results[0] - results[1]).abs().max() > 0.1
    assert (results[0] - results[2]).abs().max() > 0.1


def test_saved_again_it_is_the_same(pipe: TwoStepPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "again")
    again = TwoStepPipeline.from_pretrained(tmp_path / "again")
    noise = seeded_noise([5], (8, 8, 8))
    close(call(pipe, latents=noise).images, call(again, latents=noise).images)
    assert ModelFolder.open(tmp_path / "again").schedule() == Schedule(3.0, 0.75)


def test_plain_pipeline_refuses_a_student_instead_of_dropping_its_second_step(
    student: Path,
) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        ZImagePipeline.from_pretrained(student)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(student)


def test_ours_never_runs_the_folders_own_code(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(student, folder)
    (folder / "pipeline.py").write_text("raise SystemExit('ran')\n")
    (folder / "checksums.json").unlink()  # or the change is seen before
    assert call(TwoStepPipeline.from_pretrained(folder)).images.shape == (1, 8, 8, 8)


def test_ours_refuses_a_teacher(tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="no two-step student"):
        TwoStepPipeline.from_pretrained(tiny_folder)


def test_folder_runs_without_this_package(tiny_folder: Path, tmp_path: Path) -> None:
    """In a process that cannot import twostep: its images equal ours."""
    folders = [tmp_path / transition for transition in ("euler", "renoise")]
    for folder in folders:
        schedule = Schedule(3.0, 0.6, folder.name)
        models = random_transformer(1), random_transformer(2)
        save_student(tiny_folder, *models, schedule=schedule, folder=folder)
    TwoStepPipeline.from_pretrained(folder).save_pretrained(folder)  # our own saving keeps it so
    code = """
import sys
sys.modules["twostep"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
torch.set_num_threads(1)
noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
arguments = dict(height=32, width=32, latents=noise, output_type="latent")
for folder in ("euler", "renoise"):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    prompts, steps = ["a dog", "two cats"], []
    images = pipe(prompts, **arguments, callback_on_step_end=lambda p, i, t, k: steps.append(i)).images
    assert steps == [0, 1]
    # A second call, of the same list, saved and opened again.
    pipe.save_pretrained("again")
    pipe = DiffusionPipeline.from_pretrained("again", trust_remote_code=True, dtype=torch.float32)
    again = pipe(prompts, **arguments).images
    assert torch.equal(images, again)
    save_file({"images": images}, f"{folder}.safetensors")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)
    noise = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    for folder in folders:
        ours = call(TwoStepPipeline.from_pretrained(folder), ["a dog", "two cats"], latents=noise)
        alone = load_file(folder.with_suffix(".safetensors"))["images"]
        # diffusers computes 1 - sigma by way of 1000 steps; a random network magnifies rounding.
        torch.testing.assert_close(alone, ours.images, atol=2e-3, rtol=1e-3)


def test_a_batch_is_its_members_alone(pipe: TwoStepPipeline) -> None:
    prompts = ["a dog", "a strawberry to the left of a bus on a purple background"]
    noise = seeded_noise([1, 2], (8, 8, 8))
    together = call(pipe, prompts, latents=noise).images
    for i, prompt in enumerate(prompts):
        alone = call(pipe, prompt, latents=noise[i : i + 1]).images
        # A random network magnifies rounding; trained ones agree to 1e-5.
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-3, rtol=1e-3)


def test_images_previews_and_callback(pipe: TwoStepPipeline) -> None:
    steps = []

    def callback(_, step, time, tensors):
        steps.append((step, float(time), tuple(tensors["latents"].shape)))
        return {}

    result = call(
        pipe,
        ["a dog", "a cat"],
        output_type="pil",
        num_images_per_prompt=2,
        return_preview=True,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=callback,
    )
    assert [i.size for i in result.images] == [(32, 32)] * 4
    assert len(result.previews) == 4
    assert steps == [(0, 1000.0, (4, 8, 8, 8)), (1, 750.0, (4, 8, 8, 8))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 36}, "height must be a positive multiple of 8, got 36"),
        ({"width": 0}, "width must be a positive multiple"),
        ({"prompt": []}, "one or more strings"),
        ({"prompt": ["a dog", 5]}, "one or more strings"),
        ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
        ({"num_images_per_prompt": 0}, "at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "of latents, prompt_embeds, got noise"),
        ({"height": 4096, "width": 4096}, "at most 4194304 pixels"),
        ({"latents": torch.zeros(1, 8, 4, 4)}, "latents must have shape"),
        ({"latents": torch.full((1, 8, 8, 8), float("nan"))}, "finite"),
        ({"prompt": None, "prompt_embeds": [torch.zeros(3, 7)]}, r"\(tokens, 32\), got \(3, 7\)"),
    ],
)
def test_bad_input_is_refused_before_any_network_runs(
    pipe: TwoStepPipeline, changes: dict, message: str
) -> None:
    pipe.transformer.forward = pipe.text_encoder.forward = None
    with pytest.raises(ValueError, match=message):
        call(pipe, **changes)


def test_sampler_refuses_other_steps_for_a_student(student: Path) -> None:
    sampler = Sampler.load(str(student))
    with pytest.raises(ValueError, match="steps=2"):
        sampler.sample(["a"], seeded_noise([0], (8, 8, 8)), steps=8)
    with pytest.raises(ValueError, match="1 prompts but noise for 2"):
        sampler.sample(["a"], seeded_noise([0, 1], (8, 8, 8)))


def test_student_without_a_schedule_is_refused(student: Path, tmp_path: Path) -> None:
    import json
    import shutil

    folder = tmp_path / "broken"
    shutil.copytree(student, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["step2_sigma"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "checksums.json").unlink()
    with pytest.raises(ModelError, match="no step2_sigma"):
        Sampler.load(str(folder))


@pytest.mark.parametrize("how", ["leaf_level", "block_level", "sequential"])
def test_weights_that_wait_elsewhere_come_for_both_steps(
    student: Path, tmp_path: Path, how: str
) -> None:
    noise = seeded_noise([5], (8, 8, 8))
    expected = call(TwoStepPipeline.from_pretrained(student), latents=noise).images
    pipe = TwoStepPipeline.from_pretrained(student)
    if how == "sequential":
        for transformer in (pipe.transformer, pipe.transformer_2):
            cpu_offload(transformer, torch.device("cpu"))
            assert transformer.x_pad_token.device.type == "meta"
    else:
        for number, transformer in enumerate((pipe.transformer, pipe.transformer_2)):
            blocks = {"num_blocks_per_group": 1} if how == "block_level" else {}
            apply_group_offloading(
                transformer, torch.device("cpu"), offload_type=how,
                offload_to_disk_path=str(tmp_path / str(number)), **blocks,
            )  # fmt: skip
    for _ in range(2):
        close(call(pipe, latents=noise).images, expected)


def test_models_take_turns_under_offloading(student: Path) -> None:
    order = []

    class Recorder(ModelHook):
        def __init__(self, name: str) -> None:
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.append(self.name)
            return args, kwargs

    pipe = TwoStepPipeline.from_pretrained(student)
    for name in ("text_encoder", "transformer", "transformer_2"):
        add_hook_to_module(getattr(pipe, name), Recorder(name))
    call(pipe)
    assert order == ["text_encoder", "transformer", "transformer_2"]
