"""Captions longer than the network has positions for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from twostep.families import FAMILIES
from twostep.inference.sampler import Sampler
from twostep.models.folder import ModelFolder
from twostep.runtime.devices import Placement


@pytest.mark.parametrize(
    ("frames", "tokens"), [(1536, 1504), (512, 480), (256, 224), (66, 64), (65, 32)]
)
def test_positions_of_a_caption(frames: int, tokens: int) -> None:
    """The caption, padded to a multiple of 32, is at 1 and after, the image one after it."""
    family = FAMILIES["ZImageTransformer2DModel"]
    assert family.caption_tokens({"axes_lens": [frames, 32, 32]}) == tokens
    assert 1 + tokens <= frames - 1 < 1 + tokens + 32


@pytest.mark.parametrize("words", [200, 2000])
def test_a_long_caption_is_cut_and_named_once(
    words: int, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = Sampler.load(ModelFolder.open(tiny_folder))
    prompt = "a dog " * words
    noise = torch.zeros(1, *sampler.noise_shape(32, 32))
    assert sampler.sample([prompt], noise, 1).latents.isfinite().all()
    sampler.encoder.forget()
    assert len(sampler.encoder.encode([prompt])[0]) == 224 == sampler.encoder.count_tokens(prompt)
    said = capsys.readouterr().err
    assert said.count("is cut at 224") == 1
    assert "'a dog a dog" in said


def test_a_caption_that_fits_is_not_cut(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = ModelFolder.open(tiny_folder).encoder(Placement.on("cpu"))
    cut: list[tuple[str, int]] = []
    encoder.on_cut = lambda prompt, tokens: cut.append((prompt, tokens))
    at_most = next(
        "a dog " * n for n in range(130, 0, -1) if encoder.count_tokens("a dog " * n) < 224
    )
    encoder.encode([at_most, "", at_most + "a dog " * 9])
    assert [prompt for prompt, _ in cut] == [at_most + "a dog " * 9]
    assert cut[0][1] > 224
    assert "is cut" not in capsys.readouterr().err
