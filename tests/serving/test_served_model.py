"""Pictures of real networks: the same alone or in any batch, as the sampler makes them."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tiny import random_transformer
from twostep.cli.serve import with_loras
from twostep.errors import InputError, ModelError
from twostep.exports.lora import export_lora
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.student import save_student
from twostep.runtime.devices import Placement
from twostep.runtime.images import to_bytes
from twostep.serving.jobs import PictureSpec
from twostep.serving.logs import JsonLines
from twostep.serving.served_model import (
    HoldingOptions,
    ModelChoice,
    PictureState,
    ServedModel,
    load_models,
    open_models,
)

SIZE = (32, 48)
# Of 255: fp32 sums in another order may round a pixel to the level beside it, and no further.
TOLERANCE = 1
# Of latents, relative to the largest: fp32's, and of double precision, where only the way counts.
LATENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
PROMPTS = [
    "a cat",
    "two dogs on a red background",
    "三只猫在蓝色背景上",
    "a very long prompt of many words, " * 6,
    "a tree left of a house",
]


@pytest.fixture(scope="module", params=["euler", "renoise"])
def student(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("served") / f"student-{request.param}"
    save_student(
        tiny_folder,
        random_transformer(1),
        random_transformer(2),
        schedule=Schedule(3.0, 0.75, request.param),
        folder=folder,
        dtype=torch.float32,
    )
    return folder


def load(*choices: ModelChoice, dtype: torch.dtype = torch.float32) -> dict[str, ServedModel]:
    placement = Placement(torch.device("cpu"), dtype)
    return load_models(open_models(choices, size=SIZE), HoldingOptions(placement))


def assert_alike(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    assert float(difference) < LATENT_TOLERANCE[dtype]


def specs(count: int = 5) -> list[PictureSpec]:
    return [PictureSpec("s", PROMPTS[i % len(PROMPTS)], 100 + i, SIZE) for i in range(count)]


def in_groups(model: ServedModel, wanted: list[PictureSpec]) -> list[list[PictureSpec]]:
    """As the engine puts them into batches."""
    groups: dict[object, list[PictureSpec]] = {}
    for spec in wanted:
        groups.setdefault(model.group(spec), []).append(spec)
    return list(groups.values())


def through(model: ServedModel, batch: list[PictureSpec]) -> list[PictureState]:
    states = model.first(batch)
    for step in range(1, model.steps):
        states = model.advance(states, step)
    return states


@pytest.mark.parametrize("dtype", LATENT_TOLERANCE)
def test_a_picture_is_the_same_alone_and_in_any_batch(student: Path, dtype: torch.dtype) -> None:
    model = load(ModelChoice("s", str(student)), dtype=dtype)["s"]
    wanted = specs(10)
    groups = in_groups(model, wanted)
    assert 1 < len(groups) < len(wanted)  # captions of several lengths, batches of several pictures
    alone = {spec.seed: through(model, [spec])[0] for spec in wanted}
    for group in groups:
        for spec, state in zip(group, through(model, group), strict=True):
            assert_alike(state.latents, alone[spec.seed].latents, dtype)
            pixels = model.finish([state])[0].pixels.astype(int)
            own = model.finish([alone[spec.seed]])[0].pixels.astype(int)
            assert np.abs(pixels - own).max() <= TOLERANCE
    # The order, and who joins or leaves between the steps, do not matter either.
    group = max(groups, key=len)
    states = model.first(group[::-1])
    (last,) = model.advance(states[-1:], 1)
    assert_alike(last.latents, alone[group[0].seed].latents, dtype)


def test_pictures_and_previews_are_the_samplers(student: Path) -> None:
    model, sampler = load(ModelChoice("s", str(student)))["s"], Sampler.load(str(student))
    for group in in_groups(model, specs()):
        noise = seeded_noise([spec.seed for spec in group], sampler.noise_shape(*SIZE))
        sample = sampler.sample([spec.prompt for spec in group], noise)
        states = model.first(group)
        assert sample.preview is not None
        for state, clean1 in zip(states, sample.preview, strict=True):
            assert_alike(state.clean1, clean1)
        found = model.finish(model.advance(states, 1))
        expected = to_bytes(sampler.decoder.decode(sample.latents)).permute(0, 2, 3, 1).int()
        for each, pixels in zip(found, expected, strict=True):
            assert each.pixels.shape == (*SIZE, 3)
            assert np.abs(each.pixels.astype(int) - pixels.numpy()).max() <= TOLERANCE
        shown = model.preview(states)
        previews = to_bytes(sampler.decoder.decode(sample.preview)).permute(0, 2, 3, 1).int()
        assert np.abs(shown[0].astype(int) - previews[0].numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_teacher_takes_its_steps_one_by_one(tiny_folder: Path, steps: int) -> None:
    model = load(ModelChoice("t", str(tiny_folder), steps))["t"]
    assert model.steps == steps
    sampler, group = Sampler.load(str(tiny_folder)), specs(2)
    noise = seeded_noise([spec.seed for spec in group], sampler.noise_shape(*SIZE))
    expected = sampler.sample([spec.prompt for spec in group], noise, steps).latents
    found = torch.stack([state.latents for state in through(model, group)])
    assert_alike(found, expected)


def test_tokens_are_those_of_prompt_and_picture(tiny_folder: Path) -> None:
    model = load(ModelChoice("t", str(tiny_folder), 1))["t"]
    (found,) = model.finish(through(model, specs(1)))
    embeds = model.sampler.encoder.encode([PROMPTS[0]])[0]
    assert found.text_tokens == len(embeds) == model.sampler.encoder.count_tokens(PROMPTS[0])
    assert found.image_tokens == (32 // 8) * (48 // 8)
    assert model.sampler.encoder.count_tokens("word " * 2000) == model.sampler.encoder.max_tokens


def test_a_prompt_that_is_cut_is_counted_in_the_log_and_not_written_there(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load(ModelChoice("s", str(tiny_folder), 1))["s"]
    logger = logging.getLogger("twostep.serving")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    spec = PictureSpec("s", "confidential " * 400, 1, SIZE)
    try:
        # Another test's handler may print the line that logs: it must not hold the word itself.
        model.first([spec])
    finally:
        logger.removeHandler(caplog.handler)
    found = [each for each in caplog.records if each.getMessage() == "a prompt was cut"]
    assert {each.facts["tokens"] > 400 for each in found} == {True}  # type: ignore[attr-defined]
    said = capfd.readouterr()
    for text in (said.out, said.err, *map(JsonLines().format, caplog.records)):
        assert "confidential" not in text


def test_equal_files_share_text_encoder_and_decoder(tiny_folder: Path, student: Path) -> None:
    models = load(ModelChoice("t", str(tiny_folder), 2), ModelChoice("s", str(student)))
    assert models["t"].sampler.encoder is models["s"].sampler.encoder
    assert models["t"].sampler.decoder is models["s"].sampler.decoder


def test_other_files_are_not_shared(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.4}))
    models = load(ModelChoice("a", str(tiny_folder), 1), ModelChoice("b", str(other), 1))
    assert models["a"].sampler.encoder is models["b"].sampler.encoder
    assert models["a"].sampler.decoder is not models["b"].sampler.decoder


def test_two_lora_files_are_served_as_any_other(tiny_folder: Path, tmp_path: Path) -> None:
    full, pair = tmp_path / "full", tmp_path / "pair"
    schedule = Schedule(3.0, 0.75)
    save_student(
        tiny_folder, random_transformer(1), random_transformer(2), schedule=schedule, folder=full,
        dtype=torch.float32,
    )  # fmt: skip
    pair.mkdir()
    export_lora(ModelFolder.open(full), ModelFolder.open(tiny_folder), pair, rank=4)
    models = load(ModelChoice("t", str(tiny_folder), 1), ModelChoice("l", str(pair)))
    assert models["l"].sampler.encoder is models["t"].sampler.encoder
    group = specs(2)
    sampler = Sampler.load(str(pair))
    noise = seeded_noise([spec.seed for spec in group], sampler.noise_shape(*SIZE))
    expected = sampler.sample([spec.prompt for spec in group], noise).latents
    found = torch.stack([state.latents for state in through(models["l"], group)])
    assert_alike(found, expected)


def test_lora_files_make_another_model_of_the_same_folder(
    tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    save_student(
        tiny_folder, random_transformer(1), random_transformer(2), schedule=Schedule(3.0, 0.75),
        folder=other, dtype=torch.float32,
    )  # fmt: skip
    pair = tmp_path / "pair"
    pair.mkdir()
    export_lora(ModelFolder.open(other), ModelFolder.open(tiny_folder), pair, rank=4)
    file = pair / "first.safetensors"
    plain, styled = with_loras(
        [ModelChoice("t", str(tiny_folder), 1), ModelChoice("u", str(tiny_folder), 1)],
        [f"u={file}:0.5"],
    )
    assert (plain.loras, len(styled.loras), styled.loras[0].scale) == ((), 1, 0.5)
    offers = [opened.offer for opened in open_models([plain, styled], size=SIZE)]
    assert offers[0].weights != offers[1].weights
    models = load(plain, styled)
    assert models["u"].sampler.encoder is models["t"].sampler.encoder
    assert models["u"].sampler.decoder is models["t"].sampler.decoder
    group = specs(2)
    sampler = Sampler.load(ModelFolder.open(tiny_folder).with_loras(styled.loras))
    noise = seeded_noise([spec.seed for spec in group], sampler.noise_shape(*SIZE))
    expected = sampler.sample([spec.prompt for spec in group], noise, 1).latents
    found = [torch.stack([s.latents for s in through(models[name], group)]) for name in "tu"]
    assert_alike(found[1], expected)
    assert float((found[0] - expected).abs().max()) > 0.01
    with pytest.raises(InputError, match="no model 'x', there are: t, u"):
        with_loras([plain, replace(styled, loras=())], [f"x={file}"])


def test_a_batch_that_is_rounded_up_gives_the_same(student: Path) -> None:
    plain = load(ModelChoice("s", str(student)))["s"]
    rounded = ServedModel(plain.sampler, plain.folder, steps=2, rounded=True)
    group = [PictureSpec("s", "a cat", seed, SIZE) for seed in range(3)]
    ours, theirs = through(rounded, group), through(plain, group)
    assert len(ours) == 3
    for our, their in zip(ours, theirs, strict=True):
        assert_alike(our.latents, their.latents)
    assert len(rounded.finish(ours)) == len(rounded.preview(ours)) == 3


def test_int8_tiny_decoder_and_prompt_cache_are_taken(tmp_path: Path) -> None:
    opened = open_models([ModelChoice("s", "zoo:emoji-student")])
    assert opened[0].offer.size == (64, 64)
    assert opened[0].offer.embedded
    options = HoldingOptions(
        Placement.on("cpu", "int8"), tiny_decoder="zoo:emoji-tiny-decoder", prompt_cache=tmp_path
    )
    model = load_models(opened, options)["s"]
    assert type(model.sampler.decoder.vae).__name__ == "AutoencoderTiny"
    assert len(list(tmp_path.iterdir())) == 1  # the warm-up's prompt
    (found,) = model.finish(through(model, [PictureSpec("s", "a cat", 0, (64, 64))]))
    assert found.pixels.std() > 20


def test_what_cannot_be_served_is_said_before_weights_are_read(tiny_folder: Path) -> None:
    tiny = str(tiny_folder)
    with pytest.raises(InputError, match="two models are called 'a'"):
        open_models([ModelChoice("a", tiny), ModelChoice("a", tiny)])
    with pytest.raises(InputError, match="at least one model"):
        open_models([])
    with pytest.raises(InputError, match="two-step student, got 4"):
        open_models([ModelChoice("a", "zoo:emoji-student", 4)])
    with pytest.raises(InputError, match="at most 256"):
        open_models([ModelChoice("a", tiny)], size=(1024, 1024))
    with pytest.raises(ModelError):
        open_models([ModelChoice("a", "no/such/folder/here")])
    assert ModelFolder.open(tiny).kind == "teacher"
