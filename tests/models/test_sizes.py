"""The size that a model was made for: in its folder, and the default wherever none is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tiny import random_transformer
from twostep.errors import ModelError
from twostep.exports.combine import average
from twostep.exports.registry import export
from twostep.inference.compare import compare
from twostep.inference.generate import PictureRequest, generate
from twostep.inference.pipeline import TwoStepPipeline
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.student import save_student, write_lora_index
from twostep.models.student_index import read_sizes, sizes_text

SIZES = ((32, 48), (48, 32))


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes") / "student"
    parts = (random_transformer(1), random_transformer(2))
    save_student(
        tiny_folder, *parts,
        schedule=Schedule(3.0, 0.75), folder=folder, dtype=torch.float32, sizes=SIZES,
    )  # fmt: skip
    return folder


def test_text_is_width_by_height() -> None:
    assert sizes_text(SIZES) == "48x32 32x48"
    assert read_sizes("48x32 32x48") == SIZES
    assert read_sizes("") == ()
    for text in ("48", "0x32", "48x", "48x32x3", "axb"):
        with pytest.raises(ValueError, match="expected WIDTHxHEIGHT"):
            read_sizes(text)


def test_a_students_folder_says_it_and_its_exports_too(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert ModelFolder.open(student).sizes == SIZES
    export(str(student), "diffusers", tmp_path / "exported")
    average([str(student), str(student)], out=tmp_path / "mean")
    assert ModelFolder.open(tmp_path / "exported").sizes == SIZES
    assert ModelFolder.open(tmp_path / "mean").sizes == SIZES
    schedule = Schedule(3.0, 0.75)
    write_lora_index(tmp_path, teacher=str(tiny_folder), schedule=schedule, sizes=SIZES)
    assert json.loads((tmp_path / "twostep.json").read_text())["sizes"] == "48x32 32x48"
    broken = tmp_path / "broken"
    shutil.copytree(student, broken)
    (broken / "checksums.json").unlink()
    index = json.loads((broken / "model_index.json").read_text()) | {"sizes": "wide"}
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"sizes: expected WIDTHxHEIGHT, got 'wide'"):
        ModelFolder.open(broken)


def test_it_is_the_default(student: Path, tmp_path: Path) -> None:
    (made,) = generate(PictureRequest(str(student), ["a dog"]), tmp_path)
    with Image.open(made.path) as image:
        assert (image.size, image.info["size"]) == ((48, 32), "48x32")
    path = compare([(str(student), None)], ["a dog"], tmp_path / "c.png")
    asked = compare([(str(student), None)], ["a dog"], tmp_path / "d.png", size=SIZES[0])
    assert path.read_bytes() == asked.read_bytes()
    pipe = TwoStepPipeline.from_pretrained(student)
    assert pipe("a dog").images[0].size == (48, 32)
    assert pipe("a dog", height=48, width=32).images[0].size == (32, 48)
    pipe.save_pretrained(tmp_path / "saved")
    assert ModelFolder.open(tmp_path / "saved").sizes == SIZES


@pytest.mark.parametrize(("said", "side"), [(64, 64), (None, 1024), (32, 1024), (4096, 1024)])
def test_of_a_teacher_the_vae_says_it_as_far_as_there_are_positions(
    said: int | None, side: int, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "vae/config.json").read_text()) | {"sample_size": said}
    (folder / "vae/config.json").write_text(json.dumps(config))
    model = ModelFolder.open(folder)
    most = model.space.positions[0] * model.space.patch * model.space.scale
    assert model.sizes == ((min(side, most), min(side, most)),)


def test_the_embedded_models_say_64() -> None:
    for name in ("emoji-student", "emoji-teacher"):
        assert ModelFolder.open(f"zoo:{name}").sizes == ((64, 64),)
