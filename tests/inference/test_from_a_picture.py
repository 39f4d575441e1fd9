"""docs/inference.md's way from a picture through diffusers' own classes, word for word."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tiny import random_transformer
from twostep.families.family import PromptBatch
from twostep.method.rollout import first_step, second_step
from twostep.method.schedule import Schedule
from twostep.models.student import save_student
from twostep.models.velocity import bind

PAGE = Path(__file__).parents[2] / "docs" / "inference.md"
SCHEDULE = Schedule(3.0, 0.75)


@pytest.fixture(scope="module")
def names(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's script leaves behind; its pictures are of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("pictures") / "student"
    models = random_transformer(1), random_transformer(2)
    save_student(tiny_folder, *models, schedule=SCHEDULE, folder=folder)
    (script,) = re.findall(
        r"```python\n(from diffusers import ZImageImg2Img.*?)```", PAGE.read_text(), re.S
    )
    script = script.replace("runs/my-model/student", str(folder))
    script = script.replace(
        '"guidance_scale": 0.0', '"guidance_scale": 0.0, "height": 32, "width": 32'
    )
    noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray((255 * noise).byte().numpy())
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    found: dict[str, Any] = {"picture": picture, "mask": mask}
    exec(script, found)
    return found


def arguments(names: dict[str, Any]) -> dict[str, Any]:
    return {
        **names["two_steps"],
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(7),
    }


def noise_of_the_call() -> torch.Tensor:
    return torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(7))


def steps(names: dict[str, Any]) -> list[Any]:
    """Both steps as the trainer has them, their prompt bound."""
    student = names["student"]
    prompts = PromptBatch.collate(student.encoder.encode(["a red fox"]))
    return [bind(part, prompts) for part in (student.transformer, student.transformer_2)]


def test_one_step_from_a_picture_is_the_second_one(names: dict[str, Any]) -> None:
    assert names["changed"].size == (32, 32)
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    found = names["change"]("a red fox", image=latents, strength=0.5, **arguments(names)).images
    with torch.no_grad():
        start = 0.25 * latents + 0.75 * noise_of_the_call()
        expected = second_step(steps(names)[1], start, SCHEDULE)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=1e-3)


def test_a_part_is_made_anew_in_both_steps(
    names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names["painted"].size == (32, 32)
    # Without the draw from the VAE's spread, which takes from the generator, too.
    module = inspect.getmodule(type(names["paint"]))
    monkeypatch.setattr(module, "retrieve_latents", lambda output, **_: output.latent_dist.mode())
    vae = names["student"].vae
    with torch.no_grad():
        pixels = VaeImageProcessor().preprocess(names["picture"])
        latents = (vae.encode(pixels).latent_dist.mode() - 0.1) * 0.8
    found = [
        names["paint"](
            "a red fox", image=names["picture"], mask_image=names["mask"], strength=1.0,
            callback_on_step_end=names["next_step"], **arguments(names),
        ).images
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(*found)
    noise, new = noise_of_the_call(), torch.zeros(1, 1, 8, 8)
    new[..., 4:] = 1
    with torch.no_grad():
        first, second = steps(names)
        between = first_step(first, noise, SCHEDULE).latents2
        between = new * between + (1 - new) * (0.25 * latents + 0.75 * noise)
        expected = new * second_step(second, between, SCHEDULE) + (1 - new) * latents
    torch.testing.assert_close(found[0][..., :4], latents[..., :4])
    torch.testing.assert_close(found[0], expected, atol=5e-3, rtol=1e-3)
