"""Other people's models beside ours, and features by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from tiny import CPU, write_lora
from twostep.errors import UserError
from twostep.evaluation.baselines import parse_baseline, with_baselines
from twostep.evaluation.entries import list_entries, read_key
from twostep.evaluation.evaluate import EvaluationRequest, evaluate
from twostep.evaluation.features import ExtractorError, load_extractor
from twostep.evaluation.image_store import ImageStore, make_images
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.words import verdict
from twostep.families.family import PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.flow import euler_step
from twostep.method.rollout import seeded_noise
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile
from twostep.models.velocity import bind

SIZE = (32, 32)


def test_sigmas_that_were_given_are_the_levels_that_the_network_sees(tiny_folder: Path) -> None:
    sampler = Sampler.load(str(tiny_folder))
    noise = seeded_noise([3, 4], sampler.noise_shape(*SIZE))
    prompts = ["a dog", "a bus"]
    batch = PromptBatch.collate(sampler.encoder.encode(prompts), CPU)
    field = bind(sampler.velocities[0], batch)
    with torch.no_grad():
        between = euler_step(noise, field(noise, torch.tensor([1.0, 1.0])), 1.0, 0.65)
        expected = euler_step(between, field(between, torch.tensor([0.65, 0.65])), 0.65, 0.0)
    found = sampler.sample(prompts, noise, 2, sigmas=(1.0, 0.65)).latents
    assert torch.allclose(found, expected, atol=1e-5)
    own = sampler.sample(prompts, noise, 2).latents
    assert torch.equal(sampler.sample(prompts, noise, sigmas=(1.0, 0.75)).latents, own)  # shift 3
    assert not torch.allclose(found, own, atol=1e-2)
    with pytest.raises(ValueError, match="2 sigmas but steps=3"):
        sampler.sample(prompts, noise, 3, sigmas=(1.0, 0.65))


def test_a_line_of_text_is_an_entry(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "fun.safetensors")
    entry = parse_baseline(f"fun2={tiny_folder},lora={file}:0.9,sigmas=1:0.65,guidance=1.5")
    assert (entry.kind, entry.key, entry.label) == ("baseline", "fun2_2", "fun2, 2 steps")
    assert (entry.sigmas, entry.guidance_scale) == ((1.0, 0.65), 1.5)
    lora = LoraFile.open(file, 0.9)
    assert entry.open().fingerprint == ModelFolder.open(tiny_folder).with_loras([lora]).fingerprint
    assert parse_baseline(f"b={tiny_folder},sigmas=1:0.5:0").sigmas == (1.0, 0.5)
    assert parse_baseline(f"b={tiny_folder},steps=4").key == "b_4"
    assert parse_baseline(f"b={tiny_folder}").key == "b_8"
    assert parse_baseline("b=zoo:emoji-student").steps is None
    listed = list_entries(str(tiny_folder), 4, {"x": str(tiny_folder)}, student_steps=2)
    assert [e.key for e in with_baselines(listed, [entry])][-2:] == ["x_2", "fun2_2"]
    with pytest.raises(UserError, match="'x_2' is there already"):
        with_baselines(listed, [parse_baseline(f"x={tiny_folder},steps=2")])
    assert read_key("fun2_2", {"kind": "baseline"})[0] == "baseline"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{f}", "expected NAME=MODEL"),
        ("teacher={f}", "expected NAME=MODEL"),
        ("b={f},steps=0", "steps must be a positive number, got '0'"),
        ("b={f},steps=2,sigmas=1:0.5", "steps or sigmas"),
        ("b={f},steps=2,steps=3", "steps is given twice"),
        ("b={f},sigmas=0.9:0.5", "sigmas must fall from 1"),
        ("b={f},sigmas=1:0.5:0.6", "sigmas must fall from 1"),
        ("b={f},sigmas=1:nan", "sigmas must be a number"),
        ("b={f},guidance=-1", "guidance must be a number"),
        ("b={f},lora=none.safetensors", "--baseline: lora: no file at none.safetensors"),
        ("b={f},lora=x.bin", "lora: expected FILE.safetensors"),
        ("b={f},cfg=1", "expected NAME=MODEL"),
        ("b=zoo:emoji-student,steps=4", "is a two-step student, which takes no steps"),
        ("b=nowhere", "no model folder at 'nowhere'"),
    ],
)
def test_a_line_that_is_none(text: str, message: str, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        parse_baseline(text.format(f=tiny_folder))


def test_a_lora_and_its_sigmas_make_other_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "fun.safetensors")
    prompts = PromptSet(["a dog", "a bus"], None, 1)
    texts = {
        "plain": f"plain={tiny_folder},steps=2",
        "none": f"none={tiny_folder},steps=2,lora={file}:0",
        "lora": f"lora={tiny_folder},steps=2,lora={file}:0.9",
        "levels": f"levels={tiny_folder},sigmas=1:0.5",
    }
    made = {}
    for name, text in texts.items():
        entry = parse_baseline(text)
        store = ImageStore(tmp_path / name, entry, prompts=prompts, size=SIZE)
        make_images(store, lambda entry=entry: Sampler.load(entry.open()))  # type: ignore[misc]
        made[name] = store.read().images
    assert torch.equal(made["plain"], made["none"])
    assert not torch.equal(made["plain"], made["lora"])
    assert not torch.equal(made["plain"], made["levels"])


def test_a_baseline_is_a_row_of_the_figures(tiny_folder: Path, tmp_path: Path) -> None:
    listed = list_entries(str(tiny_folder), 2, {"student": str(tiny_folder)}, student_steps=3)
    other = parse_baseline(f"other={tiny_folder},sigmas=1:0.4")
    request = EvaluationRequest(
        entries=with_baselines(listed, [other]), prompts=PromptSet.load("emoji", 8), size=SIZE,
        halves=0, timed=1,
    )  # fmt: skip
    comparison = evaluate(request, tmp_path / "images")
    assert comparison is not None
    found = comparison.figures["models"]
    assert list(found) == ["teacher_2", "student_3", "other_2"]
    assert found["other_2"]["kind"] == "baseline"
    assert len(found["other_2"]["latency"]["steps"]) == 2
    assert found["other_2"]["paired_distance"] > 0
    assert "other" not in verdict(comparison.figures)  # its sentences are the students'
    comparison.write(tmp_path / "metrics.json", {})
    assert "other<span>2 steps</span>" in (tmp_path / "report.html").read_text()


# Features.


def test_features_by_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    dino = Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=56)).eval()
    dino.save_pretrained(tmp_path / "tiny-dino")
    vision = CLIPVisionConfig(
        **sizes, intermediate_size=32, projection_dim=8, image_size=32, patch_size=16
    )
    clip = CLIPVisionModelWithProjection(vision).eval()
    clip.save_pretrained(tmp_path / "tiny-clip")
    pixels = torch.rand(2, 3, 224, 224)
    extractor = load_extractor(f"dinov2={tmp_path / 'tiny-dino'}")
    assert extractor.name == "tiny-dino-16"
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():  # of the right size already: only the normalisation is left
        given = (pixels - mean[:, None, None]) / deviation[:, None, None]
        expected = dino(pixel_values=given).last_hidden_state[:, 0]
    assert torch.allclose(extractor(2 * pixels - 1), expected, atol=1e-5)
    extractor = load_extractor(f"clip={tmp_path / 'tiny-clip'}")
    assert extractor.name == "tiny-clip-8"
    assert extractor(2 * pixels - 1).shape == (2, 8)
    grey = torch.zeros(1, 3, 32, 32)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        given = ((0.5 - mean) / deviation)[None, :, None, None].expand(1, 3, 32, 32)
        expected = clip(pixel_values=given).image_embeds
    assert torch.allclose(extractor(grey), expected, atol=1e-5)
    for name in ("dinov2=", "dino", "lite=x"):
        with pytest.raises(ExtractorError, match="is unknown; allowed: inspector"):
            load_extractor(name)
    with pytest.raises(ExtractorError, match=r"weights of .*/none cannot be had"):
        load_extractor(f"dinov2={tmp_path / 'none'}")
