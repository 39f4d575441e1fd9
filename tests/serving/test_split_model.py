"""A student's two steps as two stages: the picture that the whole student makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import random_transformer
from twostep.errors import InputError
from twostep.method.schedule import Schedule
from twostep.models.student import save_student
from twostep.runtime.devices import Placement
from twostep.serving.jobs import HandedSpec, PictureSpec
from twostep.serving.served_model import HoldingOptions, ModelChoice, load_models, open_models
from twostep.serving.split_model import load_part

SIZE = (32, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_stages_make_the_whole_students_pictures(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    save_student(
        tiny_folder, random_transformer(1), random_transformer(2),
        schedule=Schedule(3.0, 0.75, "euler"), folder=tmp_path / "student", dtype=torch.float32,
    )  # fmt: skip
    opened = open_models([ModelChoice("s", str(tmp_path / "student"))], size=SIZE)
    options = HoldingOptions(Placement(torch.device("cpu"), dtype))
    whole = load_models(opened, options)["s"]
    first = load_part(opened, options, "first")["s"]
    # The second stage needs no text encoder, and none of the first's weights.
    for part in ("text_encoder", "transformer"):
        for file in (tmp_path / "student" / part).glob("*.safetensors"):
            file.unlink()
    second = load_part(opened, options, "second")["s"]
    assert (first.steps, second.steps) == (1, 1)
    wanted = [PictureSpec("s", "two dogs", seed, SIZE) for seed in (1, 2, 3)]
    assert first.group(wanted[0]) == whole.group(wanted[0])
    states = first.first(wanted)
    own = whole.first(wanted)
    for found, expected in zip(first.preview(states), whole.preview(own), strict=True):
        assert np.array_equal(found, expected)
    handed = [
        HandedSpec(**vars(spec), handover=handover)  # type: ignore[arg-type]
        for spec, handover in zip(wanted, first.finish(states), strict=True)
    ]
    assert second.group(handed[0]) == whole.group(wanted[0])
    finished = second.finish(second.first(handed))
    for found, expected in zip(finished, whole.finish(whole.advance(own, 1)), strict=True):
        assert np.array_equal(found.pixels, expected.pixels)  # type: ignore[union-attr]
        assert found.text_tokens == expected.text_tokens  # type: ignore[union-attr]


def test_a_teacher_has_no_second_stage(tiny_folder: Path) -> None:
    opened = open_models([ModelChoice("t", str(tiny_folder))], size=SIZE)
    options = HoldingOptions(Placement(torch.device("cpu")))
    with pytest.raises(InputError, match="--two-stage: t has no second step"):
        load_part(opened, options, "first")
