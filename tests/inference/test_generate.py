"""`twostep generate` and `twostep compare`: files, names, resuming, sheets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tiny import random_transformer, write_lora
from twostep.cli import app
from twostep.cli.arguments import parse_model, parse_size, read_prompts
from twostep.errors import InputError, ModelError
from twostep.inference.compare import compare
from twostep.inference.generate import PictureRequest, generate
from twostep.inference.pipeline import TwoStepPipeline
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile
from twostep.models.student import save_student
from twostep.runtime.images import labelled_rows, tile, to_pil

SIZE = (32, 32)


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate") / "student"
    parts = (random_transformer(1), random_transformer(2))
    save_student(
        tiny_folder, *parts, schedule=Schedule(3.0, 0.75), folder=folder, dtype=torch.float32
    )
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_carry_parameters_as_others_read_them(student: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "style.safetensors")
    request = PictureRequest(
        str(student), ["a dog, two cats"], seed=7, size=(32, 48), loras=[LoraFile.open(lora, 0.8)]
    )
    (made,) = generate(request, tmp_path / "out")
    with Image.open(made.path) as image:
        text = image.info["parameters"]
        assert "prompt" not in image.info  # ComfyUI would take it for a graph
    prompt, negative, line = text.split("\n")
    assert negative == "Negative prompt: "
    assert prompt == "a dog, two cats <lora:style:0.8>"
    # A1111's own pattern for a line of settings (infotext_utils.py).
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)
    settings = dict(found)
    tuned = ModelFolder.open(student).with_loras(request.loras)
    assert settings["Model hash"] == tuned.fingerprint[:10]
    assert settings["Lora hashes"] == f'"style: {request.loras[0].sha256[:12]}"'
    wanted = {"Steps": "2", "Sampler": "Euler", "CFG scale": "1", "Seed": "7", "Size": "48x32"}
    assert wanted.items() <= settings.items()
    assert settings["Model"] == student.name


def test_pictures_say_how_they_were_made(student: Path, tmp_path: Path) -> None:
    made = list(
        generate(PictureRequest(str(student), ["一只狗"], seed=7, size=(32, 48), count=2), tmp_path)
    )
    assert [p.path.name for p in made] == ["一只狗-7-2steps.png", "一只狗-8-2steps.png"]
    with Image.open(made[1].path) as image:
        assert image.size == (48, 32)
        assert image.info["Description"] == "一只狗"
        assert (image.info["seed"], image.info["steps"]) == ("8", "2")
        assert image.info["model"] == student.name  # no folder of this machine
    alone = next(
        generate(PictureRequest(str(student), ["一只狗"], seed=8, size=(32, 48)), tmp_path / "b")
    )
    assert np.abs(pixels(alone.path).astype(int) - pixels(made[1].path)).max() <= 1


def test_a_preview_is_what_the_pipeline_previews(student: Path, tmp_path: Path) -> None:
    (made,) = generate(
        PictureRequest(str(student), ["a dog"], seed=3, size=SIZE, preview=True), tmp_path
    )
    pipe = TwoStepPipeline.from_pretrained(student)
    noise = seeded_noise([3], (8, 8, 8))
    result = pipe("a dog", height=32, width=32, latents=noise, return_preview=True)
    assert made.preview is not None
    for path, image in ((made.path, result.images[0]), (made.preview, result.previews[0])):
        assert np.abs(pixels(path).astype(int) - np.asarray(image)).max() <= 1


def test_what_is_there_is_not_made_again(student: Path, tmp_path: Path) -> None:
    first = list(generate(PictureRequest(str(student), ["a dog", "a cat"], size=SIZE), tmp_path))
    assert all(p.made for p in first)
    first[0].path.write_bytes(b"torn")
    again = list(generate(PictureRequest(str(student), ["a dog", "a cat"], size=SIZE), tmp_path))
    assert [p.made for p in again] == [True, False]
    other = list(
        generate(PictureRequest(str(student), ["a dog", "a cat"], size=(48, 32)), tmp_path)
    )
    assert all(p.made for p in other)
    asked = list(
        generate(PictureRequest(str(student), ["a dog"], size=(48, 32), preview=True), tmp_path)
    )
    assert [p.made for p in asked] == [True]  # the preview was missing


def test_other_weights_make_other_pictures(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "student"
    save_student(
        tiny_folder,
        random_transformer(1),
        random_transformer(3),
        schedule=Schedule(3.0, 0.75),
        folder=other,
        dtype=torch.float32,
    )
    out = tmp_path / "out"
    first = next(generate(PictureRequest(str(student), ["a dog"], size=SIZE), out))
    kept = {first.path: first.path.read_bytes()}
    for request in (
        PictureRequest(str(other), ["a dog"], size=SIZE),
        PictureRequest(str(student), ["a dog"], size=(48, 32)),
    ):
        again = next(generate(request, out))
        assert again.made
        assert again.path not in kept
        kept[again.path] = again.path.read_bytes()
        assert not next(generate(request, out)).made
    own = out / "a-cat-0-2steps.png"
    Image.new("RGB", (4, 4)).save(own)  # somebody else's
    kept[own] = own.read_bytes()
    cat = next(generate(PictureRequest(str(student), ["a cat"], size=SIZE), out))
    assert cat.path.name.startswith("a-cat-0-2steps-")
    assert {path: path.read_bytes() for path in kept} == kept


def test_prompts_that_look_alike_have_their_own_files(student: Path, tmp_path: Path) -> None:
    prompts = ["a dog", "a-dog", "a dog!", "x " * 80 + "1", "x " * 80 + "2", "?"]
    paths = [p.path for p in generate(PictureRequest(str(student), prompts, size=SIZE), tmp_path)]
    assert len(set(paths)) == len(prompts)
    assert paths[0].name == "a-dog-0-2steps.png"


def test_bad_arguments_are_named(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two-step student, got 8"):
        next(generate(PictureRequest(str(student), ["x"], steps=8), tmp_path))
    with pytest.raises(InputError, match="multiple of 8, got 30"):
        next(generate(PictureRequest(str(student), ["x"], size=(30, 32)), tmp_path))
    with pytest.raises(InputError, match="must not be empty"):
        next(generate(PictureRequest(str(student), ["x", " "], size=SIZE), tmp_path))
    with pytest.raises(ModelError, match="is no two-step student"):
        next(generate(PictureRequest(str(tiny_folder), ["x"], size=SIZE, preview=True), tmp_path))


def test_prompts_come_from_arguments_files_and_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "from a file"}))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n two \n")))
    assert read_prompts(["zero", "-"], str(file)) == ["zero", "one", "two", "from a file"]
    with pytest.raises(InputError, match="none given"):
        read_prompts([])


def test_the_command_prints_json_and_lays_out_a_grid(student: Path, tmp_path: Path) -> None:
    arguments = ["generate", "a dog", "-", "--model", str(student), "--size", "32", "--count", "2"]
    options = ["--out", str(tmp_path), "--grid", "--json", "--preview", "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, *options], input="a cat\n")
    assert result.exit_code == 0, result.output
    *records, last = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["prompt"], r["seed"]) for r in records] == [
        ("a dog", 0), ("a dog", 1), ("a cat", 0), ("a cat", 1),
    ]  # fmt: skip
    grid = pixels(Path(last["grid"]))
    assert grid.shape == (4 * 34 - 2, 2 * 34 - 2, 3)
    assert np.array_equal(grid[:32, 34:], pixels(Path(records[1]["preview"])))
    assert np.array_equal(grid[34 : 34 + 32, 34:], pixels(Path(records[1]["path"])))


def test_compare_shows_each_model_at_equal_noise(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    models = [parse_model(f"{tiny_folder}@2"), (str(student), None)]
    path = compare(models, ["a dog"], tmp_path / "c.png", seed=5, size=SIZE, preview=True)
    picture = pixels(path)
    teachers, students = tmp_path / "teacher", tmp_path / "student"
    (teacher,) = generate(
        PictureRequest(str(tiny_folder), ["a dog"], seed=5, steps=2, size=SIZE), teachers
    )
    (made,) = generate(
        PictureRequest(str(student), ["a dog"], seed=5, size=SIZE, preview=True), students
    )
    rows = [teacher.path, made.preview, made.path]
    images = []
    for row in rows:
        assert row is not None
        images.append(Image.open(row).convert("RGB"))
    labels = [f"{tiny_folder.name}, 2 steps", "student, preview after step 1", "student, 2 steps"]
    expected = labelled_rows({label: [image] for label, image in zip(labels, images, strict=True)})
    assert np.array_equal(picture, np.asarray(expected))


def test_compare_refuses_what_it_cannot_show(student: Path, tmp_path: Path) -> None:
    assert parse_model("a/b@4") == ("a/b", 4)
    assert parse_model("a/b") == ("a/b", None)
    for text in ("a@x", "a@0", "a@"):
        with pytest.raises(InputError, match="MODEL@STEPS"):
            parse_model(text)
    with pytest.raises(InputError, match=r"expected a \.png"):
        compare([(str(student), None)], ["a dog"], tmp_path / "c.jpg", size=SIZE)
    with pytest.raises(InputError, match="two rows would be called"):
        compare([(str(student), None)] * 2, ["a dog"], tmp_path / "c.png", size=SIZE)
    with pytest.raises(InputError, match="two-step student, got 8"):
        compare([(str(student), 8)], ["a dog"], tmp_path / "c.png", size=SIZE)


def test_tiles_lie_where_they_belong() -> None:
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    sheet = np.asarray(tile([[red, blue], [blue]]))
    assert sheet.shape == (8, 10, 3)
    assert (sheet[:3, :4] == (255, 0, 0)).all()
    assert (sheet[:3, 6:] == (0, 0, 255)).all()
    assert (sheet[5:, 6:] == 255).all()


def test_a_picture_keeps_its_values() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 3.0]).expand(3, 1, 4)
    assert np.asarray(to_pil(image))[0, :, 0].tolist() == [0, 128, 255, 255]


def test_sizes() -> None:
    assert parse_size("64") == (64, 64)
    assert parse_size("96x64") == (64, 96)
    for text in ("0x", "big", "64x64x64", "-8"):
        with pytest.raises(InputError, match="expected SIDE"):
            parse_size(text)
    with pytest.raises(InputError, match="at most"):
        parse_size("9000x9000")
