"""Both pipelines are called as diffusers' own, and give the trainer's pictures."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor

from tiny import lora_matrices, random_transformer, write_lora
from twostep.errors import ModelError
from twostep.families.family import PromptBatch
from twostep.inference.pipeline import TwoStepPipeline
from twostep.method.rollout import seeded_noise, two_step
from twostep.method.schedule import Schedule
from twostep.models import locate
from twostep.models.folder import ModelFolder
from twostep.models.standalone_pipeline import TwoStepPipeline as Standalone
from twostep.models.student import save_student
from twostep.models.velocity import bind
from twostep.runtime.devices import Placement

NOISE = seeded_noise([3, 4], (8, 8, 8))
PROMPTS = ("a dog", "two cats on a red sofa")


@pytest.fixture(scope="module", params=["euler", "renoise"])
def student(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("students") / "student"
    schedule = Schedule(3.0, 0.6, request.param)
    save_student(
        tiny_folder, random_transformer(1), random_transformer(2), schedule=schedule, folder=folder
    )
    return folder


@pytest.fixture(scope="module")
def pipes(student: Path) -> tuple[TwoStepPipeline, Standalone]:
    """The package's, and the folder's own without a process of its own to import it in."""
    ours = TwoStepPipeline.from_pretrained(student)
    parts = {
        part: ZImageTransformer2DModel.from_pretrained(student, subfolder=part)
        for part in ("transformer", "transformer_2")
    }
    own = {"step2_sigma": ours.config.step2_sigma, "transition": ours.config.transition}
    both = ours, Standalone(**ours.components | parts, **own)
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    return both


def call(pipe: Any, prompt: Any = PROMPTS, **changes: Any) -> Any:
    arguments = {"height": 32, "width": 32, "output_type": "latent", "latents": NOISE} | changes
    return pipe(list(prompt) if isinstance(prompt, tuple) else prompt, **arguments)


def close(found: Tensor, expected: Tensor) -> None:
    """diffusers computes 1 - sigma by way of 1000 steps; a random network magnifies rounding."""
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", [TwoStepPipeline, Standalone])
def test_the_signature_is_zimages_own(kind: Any) -> None:
    stock = dict(inspect.signature(ZImagePipeline.__call__).parameters)
    ours = dict(inspect.signature(kind.__call__).parameters)
    assert list(ours) == [*stock, "return_preview"]
    changed = {"num_inference_steps": 2, "guidance_scale": 0.0}
    for name, parameter in stock.items():
        found = ours[name].default
        wanted = changed.get(name, parameter.default)
        assert found == wanted or list(found) == wanted, name
        assert ours[name].kind == parameter.kind


def test_both_give_the_pictures_of_the_trainers_rollout(student: Path, pipes: Any) -> None:
    folder = ModelFolder.open(student)
    placement = Placement.on("cpu")
    prompts = PromptBatch.collate(folder.encoder(placement).encode(PROMPTS))
    first, second = (bind(velocity, prompts) for velocity in folder.velocities(placement))
    with torch.no_grad():
        rollout = two_step(first, second, NOISE, folder.schedule())
    for pipe in pipes:
        result = call(pipe, return_preview=True)
        close(result.images, rollout.clean2)
        close(result.previews, rollout.clean1)
        images, previews = call(pipe, return_preview=True, return_dict=False)
        assert torch.equal(images, result.images)
        assert torch.equal(previews, result.previews)
        (images,) = call(pipe, return_dict=False)
        assert torch.equal(images, result.images)


def test_what_is_fixed_is_warned_about_and_ignored(pipes: Any) -> None:
    others = {
        "num_inference_steps": 30, "guidance_scale": 7.5, "sigmas": [1.0, 0.5, 0.2],
        "negative_prompt": "ugly", "negative_prompt_embeds": [torch.ones(3, 32)],
    }  # fmt: skip
    for pipe in pipes:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            expected = call(pipe, num_inference_steps=2, guidance_scale=0, negative_prompt="")
        with pytest.warns(UserWarning, match="is fixed in a two-step student") as found:
            images = call(pipe, **others, cfg_normalization=True, cfg_truncation=0.5).images
        assert torch.equal(images, expected.images)
        said = [str(warning.message) for warning in found]
        for name in others:
            assert sum(f"{name} is fixed in a two-step student" in text for text in said) == 1
        assert "num_inference_steps is fixed in a two-step student: 30 is ignored" in said
        assert all(warning.filename == __file__ for warning in found)


def test_callbacks_see_and_change_what_stock_ones_do(pipes: Any) -> None:
    def record(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> None:
        seen.append((step, float(time), list(tensors), len(tensors["prompt_embeds"])))

    def change(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"] * 0.5
        return {"latents": latents, "prompt_embeds": [e[:4] for e in other] if step == 0 else other}

    names = ["prompt_embeds", "latents"]
    other = [torch.ones(5, 32), torch.ones(4, 32)]
    changed = []
    for pipe in pipes:
        seen: list[Any] = []
        plain = call(pipe, callback_on_step_end=record, callback_on_step_end_tensor_inputs=names)
        assert seen == [(0, 1000.0, names, 2), (1, pytest.approx(600.0, abs=1e-3), names, 2)]
        changed.append(call(pipe, callback_on_step_end=change).images)
        assert (changed[-1] - plain.images).abs().max() > 0.1
    close(*changed)


def test_an_interrupt_keeps_the_second_step_from_running(pipes: Any) -> None:
    found = []
    for pipe in pipes:
        steps: list[int] = []

        def stop(pipe: Any, step: int, time: Any, tensors: Any, steps: Any = steps) -> None:
            steps.append(step)
            pipe._interrupt = True

        found.append(call(pipe, callback_on_step_end=stop).images)
        assert steps == [0]
        assert (call(pipe).images - found[-1]).abs().max() > 0.1  # and only once
    close(*found)


def test_the_progress_bar_is_diffusers(pipes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for pipe in pipes:
        call(pipe)
        assert capsys.readouterr().err == ""
        pipe.set_progress_bar_config(disable=False)
        call(pipe)
        assert "2/2" in capsys.readouterr().err
        pipe.set_progress_bar_config(disable=True)


def test_prompts_are_left_as_they_were_and_may_be_cut(pipes: Any) -> None:
    cut = []
    for pipe in pipes:
        prompts = list(PROMPTS)
        whole = call(pipe, prompts).images
        assert prompts == list(PROMPTS)
        pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        assert prompts == list(PROMPTS)
        cut.append(call(pipe, prompts, max_sequence_length=9).images)
        assert (cut[-1] - whole).abs().max() > 0.1
        assert torch.equal(call(pipe, prompts, max_sequence_length=5000).images, whole)
    close(*cut)


def test_sizes_have_defaults_and_limits_of_the_model(pipes: Any) -> None:
    for pipe in pipes:
        images = pipe("a dog", width=32, output_type="latent").images
        assert images.shape == (1, 8, 64, 8)  # 32 positions of 2 latents of 4 pixels
        with pytest.raises(ValueError, match="width must be at most 256 for this model, got 264"):
            call(pipe, width=264)


def test_components_move_to_other_pipelines_and_back(pipes: Any) -> None:
    """`from_pipe` takes only what the annotations of a constructor allow."""
    for pipe in pipes:
        again = type(pipe).from_pipe(pipe)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(call(again).images, call(pipe).images)
        stock = ZImagePipeline.from_pipe(pipe, transformer=pipe.transformer)
        stock.set_progress_bar_config(disable=True)
        images = call(stock, num_inference_steps=2, guidance_scale=0.0).images
        assert images.shape == NOISE.shape


def test_tiles_and_slices_reach_the_vae(pipes: Any) -> None:
    for pipe in pipes:
        for what in ("tiling", "slicing"):
            getattr(pipe, f"enable_vae_{what}")()
            assert getattr(pipe.vae, f"use_{what}")
            getattr(pipe, f"disable_vae_{what}")()
            assert not getattr(pipe.vae, f"use_{what}")


def test_the_scale_of_a_users_lora(pipes: Any, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "style.safetensors", lora_matrices(5))
    results = []
    for pipe in pipes:
        plain = call(pipe).images
        pipe.load_lora_weights(tmp_path, weight_name=file.name)
        whole, half, none = (
            call(pipe, joint_attention_kwargs={"scale": scale}).images for scale in (1, 0.5, 0)
        )
        pipe.unload_lora_weights()
        close(none, plain)
        assert (whole - half).abs().max() > 0.01
        results.append(half)
    close(*results)


def test_how_a_model_of_the_hub_is_fetched(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(student)

    def gone(name: str, **options: Any) -> str:
        raise OSError("no network")

    locate._fetch.cache_clear()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    pinned = {"revision": "v1.0", "token": "secret", "cache_dir": Path("/there")}
    with pytest.raises(ValueError, match="variant=fp16"):  # diffusers', of the folder
        TwoStepPipeline.from_pretrained("owner/name", variant="fp16", **pinned)
    (name, options), *_ = asked
    assert name == "owner/name"
    assert "*.safetensors" in options.pop("allow_patterns")
    assert options == {
        "revision": "v1.0", "token": "secret", "cache_dir": "/there",
        "local_files_only": False, "force_download": False,
    }  # fmt: skip
    assert "secret" not in repr(locate.Hub.of(pinned))
    TwoStepPipeline.from_pretrained("owner/name", revision="v2.0")
    assert asked[-1][1]["revision"] == "v2.0"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ModelError, match="could the hub be asked: no network"):
        TwoStepPipeline.from_pretrained("owner/other")
