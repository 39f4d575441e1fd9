from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor
from typer.testing import CliRunner

from twostep.cli import app
from twostep.emoji.scenes import held_out_scenes, is_held_out
from twostep.errors import UserError
from twostep.evaluation.entries import Entry, list_entries
from twostep.evaluation.evaluate import EvaluationRequest, evaluate
from twostep.evaluation.features import load_extractor
from twostep.evaluation.figures import AlignedSets, Measured, figures, intervals, nested
from twostep.evaluation.image_store import ImageStore, make_images
from twostep.evaluation.latency import measure_latency
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.scorers import load_scorer, quoted_text, text_similarity
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.method.schedule import Schedule
from twostep.models.student import save_student
from twostep.runtime.memory_meter import weight_bytes
from twostep.runtime.processes import Share

runner = CliRunner()
SIZE = (32, 32)


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two transformers that are the teacher moved a little."""
    parts = []
    for scale in (1.02, 0.97):
        model = ZImageTransformer2DModel.from_pretrained(tiny_folder / "transformer")
        with torch.no_grad():
            model.all_final_layer["2-1"].linear.weight.mul_(scale)
        parts.append(model)
    folder = tmp_path_factory.mktemp("students") / "student"
    save_student(tiny_folder, parts[0], parts[1], schedule=Schedule(3.0, 0.75), folder=folder)
    return folder


# Prompts and noise.


def test_prompts_are_held_out_in_two_languages_and_seeds_are_disjoint() -> None:
    prompts = PromptSet.load("emoji", 32)
    assert len(prompts) == 32
    assert len(prompts.prompts) == 16
    assert prompts.scenes == held_out_scenes(16)
    assert all(is_held_out(s) for s in prompts.scenes)
    chinese = [any("\u4e00" <= c <= "\u9fff" for c in p) for p in prompts.prompts]
    assert sum(chinese) == 8
    assert prompts.captions[16:] == prompts.captions[:16]
    assert prompts.groups.tolist() == [*range(16), *range(16)]
    own, other = prompts.noise_seeds(), prompts.noise_seeds(reference=True)
    assert len({*own, *other}) == 64
    expected = seeded_noise(own[3:5], (8, 4, 4))
    assert torch.equal(prompts.noise(slice(3, 5), (8, 4, 4)), expected)
    assert PromptSet.load("emoji", 32, seed=1).noise_seeds() != own


def test_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    prompts = PromptSet.load(str(path), 9, seeds_per_prompt=3)
    assert prompts.scenes is None
    assert len(prompts) == 9
    with pytest.raises(ValueError, match="fewer than two prompts"):
        PromptSet.load("emoji", 3)


# Images on disk.


def test_images_are_resumed_and_equal_a_run_in_one_go(
    tiny_folder: Path, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twostep.evaluation.image_store.PART", 4)
    prompts = PromptSet.load("emoji", 12)
    entry = Entry("student", "student", str(student))
    assert entry.key == "student_2"
    assert entry.as_preview().key == "student_2/preview"
    whole = ImageStore(tmp_path / "whole", entry, prompts=prompts, size=SIZE)
    made = 0

    def load() -> Sampler:
        return Sampler.load(str(student))

    make_images(whole, load)
    expected = whole.read()
    sampler = load()
    noise = prompts.noise(slice(None), sampler.noise_shape(*SIZE))
    alone = sampler.generate(prompts.captions, noise)
    assert (expected.images - alone).abs().max() <= 0.51 / 127.5 + 1e-5
    assert expected.previews is not None
    assert (expected.previews - expected.images).abs().max() > 0.02

    parts = ImageStore(tmp_path / "parts", entry, prompts=prompts, size=SIZE)
    parts.make(sampler, 1)
    assert parts.missing() == [0, 2]
    (tmp_path / "parts" / "part-00000.safetensors").write_bytes(b"torn")
    make_images(parts, load, share=Share(1, 2))
    assert parts.missing() == [0, 2]  # the second process has part 1 only

    def count(images: int) -> None:
        nonlocal made
        made += images

    make_images(parts, load, on_images=count)
    assert made == 12
    assert torch.equal(parts.read().images, expected.images)

    def refuse() -> Sampler:
        raise AssertionError("nothing is missing")

    make_images(parts, refuse)
    teacher = Entry("teacher", "teacher", str(tiny_folder), 4)
    other = ImageStore(tmp_path / "parts", teacher, prompts=prompts, size=SIZE)
    assert other.missing() == [0, 1, 2]  # another model's images are not taken for its own


def test_reference_has_other_noise(tiny_folder: Path, tmp_path: Path) -> None:
    prompts = PromptSet.load("emoji", 4)
    sets = []
    for name, reference in (("a", False), ("b", True)):
        entry = Entry("teacher", "teacher", str(tiny_folder), 2, reference=reference)
        store = ImageStore(tmp_path / name, entry, prompts=prompts, size=SIZE)
        make_images(store, lambda: Sampler.load(str(tiny_folder)))
        sets.append(store.read().images)
    assert (sets[0] - sets[1]).abs().max() > 0.05


# Figures.


def gaussian_aligned(shift: float, prompts: int = 64) -> AlignedSets:
    """The teacher, naive 2 units away along each of 4 axes, a student `shift` away."""
    generator = torch.Generator().manual_seed(0)

    def draw(offset: float) -> Measured:
        features = torch.randn(2 * prompts, 4, generator=generator, dtype=torch.float64) + offset
        right = (torch.arange(2 * prompts) % 4 != 0).double()
        some = torch.where(torch.arange(2 * prompts) % 2 == 0, right, math.nan)
        return Measured(features, {"accuracy.overall": right, "accuracy.single": some})

    teacher = draw(0)
    sets = {"teacher_8": teacher, "naive_2": draw(2), "student_2": draw(shift)}
    groups = torch.arange(prompts).repeat(2)
    return AlignedSets(
        groups=groups,
        reference=draw(0),
        teacher=teacher,
        sets=sets,
        floor="teacher_8",
        naive="naive_2",
    )


def test_figures_of_gaussians() -> None:
    found = figures(gaussian_aligned(shift=1.0, prompts=2000))
    # |mean difference|^2 is 4 shift^2: 16 for naive, 4 for the student.
    assert found["naive_2"]["frechet_to_teacher"] == pytest.approx(16, rel=0.1)
    assert found["student_2"]["frechet_to_teacher"] == pytest.approx(4, rel=0.15)
    assert found["student_2"]["gap_closed"] == pytest.approx(0.75, abs=0.03)
    assert found["student_2"]["diversity"] == pytest.approx(1, abs=0.05)
    assert found["student_2"]["accuracy.overall"] == 0.75
    assert found["student_2"]["accuracy.single"] == 0.5
    assert found["teacher_8"]["paired_distance"] == 0
    assert "gap_closed" not in found["naive_2"]
    assert nested(found["student_2"])["accuracy"] == {"overall": 0.75, "single": 0.5}


def test_intervals_cover_what_fresh_draws_give() -> None:
    """The interval of a mean is what the binomial says; that of a distance shrinks with images."""
    small, large = (intervals(gaussian_aligned(1.0, n), halves=60) for n in (50, 800))
    assert small["student_2"]["frechet_to_teacher"] > large["student_2"]["frechet_to_teacher"]
    aligned = gaussian_aligned(1.0, 400)
    flags = (torch.rand(800, generator=torch.Generator().manual_seed(1)) < 0.5).double()
    aligned.sets["student_2"].scores["accuracy.overall"][:] = flags
    around = intervals(aligned, halves=200)["student_2"]["accuracy.overall"]
    assert around == pytest.approx(1.96 * math.sqrt(0.25 / 800), rel=0.25)
    assert intervals(aligned, halves=0) == {}


def test_no_gap_without_naive_weights() -> None:
    aligned = gaussian_aligned(1.0)
    sets = {k: v for k, v in aligned.sets.items() if k != "naive_2"}
    without = replace(aligned, sets=sets, naive=None)
    assert "gap_closed" not in figures(without)["student_2"]


def test_latency_splits_the_time(tiny_folder: Path, student: Path) -> None:
    noise = seeded_noise([0, 1], (8, 8, 8))
    for folder, steps, expected in ((tiny_folder, 4, 4), (student, None, 2)):
        latency = measure_latency(
            Sampler.load(str(folder)), ["a dog", "two cats"], noise, steps=steps
        )
        assert len(latency.steps) == expected
        parts = latency.text + sum(latency.steps) + latency.decode
        assert latency.total == pytest.approx(parts)
        assert min(latency.text, latency.decode, *latency.steps) > 0
        sampler = Sampler.load(str(folder))
        weights = weight_bytes(*sampler.modules())
        assert weights < latency.peak_memory_bytes < 2 * weights


# Scores.


def test_text_in_prompts() -> None:
    assert quoted_text('a shop sign that says "Open Now" at night') == "Open Now"
    assert quoted_text("海报写着“新年快乐”和“2026”") == "新年快乐 2026"
    assert quoted_text("it's a dog") is None
    assert text_similarity("Open Now", "OPEN  NOW!") == 1
    assert text_similarity("abcd", "abxd") == 0.75
    assert text_similarity("abc", "") == 0


def test_scorers_and_extractors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features: 'fid' is unknown; allowed: inspector"):
        load_extractor("fid")
    with pytest.raises(UserError, match="scores: 'taste' is unknown; allowed: inspector"):
        load_scorer("taste")
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    with pytest.raises(UserError, match="only prompts of the embedded world"):
        load_scorer("inspector")(torch.zeros(4, 3, 64, 64), PromptSet.load(str(path), 4))


SCORER = """
import json, sys
from PIL import Image
for line in sys.stdin:
    record = json.loads(line)
    red = Image.open(record["image"]).convert("RGB").getpixel((0, 0))[0]
    print("null" if "skip" in record["prompt"] else red + len(record["prompt"]) / 10)
"""


def test_scores_by_a_program_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(SCORER)
    (tmp_path / "prompts.txt").write_text("ab\nskip me\n")
    prompts = PromptSet.load(str(tmp_path / "prompts.txt"), 4)
    images = torch.full((4, 3, 8, 8), -1.0)
    images[2, 0] = 1.0
    command = f"{sys.executable} {tmp_path / 'score.py'}"
    found = load_scorer(f"red={command}")(images, prompts)["red"]
    torch.testing.assert_close(
        found, torch.tensor([0.2, math.nan, 255.2, math.nan]), equal_nan=True
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=python", "expected NAME=COMMAND, got '=python'"),
        ("taste=", "expected NAME=COMMAND"),
        ("taste=/no/such/program", "taste: cannot run /no/such/program"),
        (f"taste={sys.executable} -c 'import sys; sys.exit(\"no weights\")'", "no weights"),
        (f"taste={sys.executable} -c 'print(1)'", "taste: 4 pictures, but 1 answers"),
        (f"taste={sys.executable} -c 'for _ in range(4): print(\"good\")'", "got 'good'"),
    ],
)
def test_a_program_that_does_not_score_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    prompts = PromptSet.load(str(tmp_path / "prompts.txt"), 4)
    with pytest.raises(UserError, match=message):
        load_scorer(text)(torch.zeros(4, 3, 8, 8), prompts)


def test_efficientnet_features() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    extract = load_extractor("efficientnet-lite0")
    assert extract.name == "efficientnet-lite0-1280"
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = extract(images)
    assert features.shape == (3, 1280)
    assert torch.allclose(extract(images[:1]), features[:1], atol=1e-4)
    assert (features[0] - features[1]).norm() > 0.1


def test_written_text_is_read(tmp_path: Path) -> None:
    pytest.importorskip("rapidocr")
    from PIL import Image, ImageDraw

    path = tmp_path / "p.txt"
    path.write_text('a sign that says "HELLO"\na sign\n')
    picture = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(picture).text((20, 20), "HELLO", fill="black", font_size=48)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image: Tensor = pixels.reshape(96, 256, 3).permute(2, 0, 1) / 127.5 - 1
    images = torch.stack([image, image, torch.ones_like(image), image])
    scores = load_scorer("ocr")(images, PromptSet.load(str(path), 4))["ocr"]
    assert scores[0] == 1
    assert scores[2] == 0
    assert scores[[1, 3]].isnan().all()


# The whole of it.


def test_a_teacher_as_its_own_student_is_at_the_floor(tiny_folder: Path, tmp_path: Path) -> None:
    models = list_entries(str(tiny_folder), 4, {"student": str(tiny_folder)}, student_steps=4)
    assert [m.key for m in models] == ["teacher_4", "naive_2", "student_4"]
    request = EvaluationRequest(
        entries=models,
        prompts=PromptSet.load("emoji", 24),
        size=SIZE,
        halves=4,
        timed=0,
        features=("inspector",),
    )
    comparison = evaluate(request, tmp_path)
    assert comparison is not None
    found = comparison.figures["models"]
    assert found["student_4"]["frechet_to_teacher"] == comparison.figures["floor"]
    assert found["student_4"]["paired_distance"] == 0
    assert found["student_4"]["diversity"] == 1
    assert comparison.figures["gap_closed"]["student_4"] == 1


def test_command_writes_figures_and_report(
    tiny_folder: Path, student: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", "--model", str(student), "--reference", str(tiny_folder)]
    arguments += ["--out", str(tmp_path / "out"), "--images", "16", "--size", "32"]
    arguments += ["--reference-steps", "4", "--halves", "3", "--device", "cpu"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(found["models"]) == ["teacher_4", "naive_2", "student_2"]
    model = found["models"]["student_2"]
    for key in ("frechet_to_teacher", "kernel_to_teacher", "precision", "coverage", "vendi"):
        assert math.isfinite(model[key])
        assert math.isfinite(model["preview"][key])
        assert model["interval"][key] >= 0
    assert set(model["accuracy"]) == {
        "overall", "single", "two", "counting", "position", "background"
    }  # fmt: skip
    assert len(model["latency"]["steps"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Furthest apart" in page
    assert "student, step-1 preview" in page
    assert "±" in page


def test_processes_share_the_images(tiny_folder: Path, student: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "twostep", "evaluate", "--model", str(student)]
    command += ["--reference", str(tiny_folder), "--out", str(tmp_path / "out"), "--images", "8"]
    command += ["--size", "32", "--reference-steps", "4", "--halves", "0", "--device", "cpu"]
    shares = [
        subprocess.Popen(
            command,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [p.wait(timeout=300) for p in shares] == [0, 0]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 8


def test_models_of_one_name_are_refused(tmp_path: Path) -> None:
    models = ["--model", "a/x/student", "--model", "b/x/student"]
    arguments = ["evaluate", *models, "--reference", "zoo:emoji-teacher", "--out", str(tmp_path)]
    with pytest.raises(UserError, match="both called 'x'"):
        runner.invoke(app, [*arguments, "--images", "8"], catch_exceptions=False)
    with pytest.raises(UserError, match="would be called 'teacher_8', as another is"):
        list_entries("zoo:emoji-teacher", 8, {"teacher": "zoo:emoji-teacher"})


def test_entries_have_the_names_of_the_figures() -> None:
    models = {"teacher_x": "zoo:emoji-student", "x": "zoo:emoji-teacher"}
    found = list_entries("zoo:emoji-teacher", 8, models)
    assert [e.key for e in found] == ["teacher_8", "naive_2", "teacher_x_2", "x_8"]
    assert [e.kind for e in found] == ["teacher", "naive", "student", "student"]
    labels = ["teacher, 8 steps", "same weights, 2 steps", "teacher_x, 2 steps", "x, 8 steps"]
    assert [e.label for e in found] == labels
    assert found[2].as_preview().label == "teacher_x, step-1 preview"
    assert found[0].as_reference().key == "reference"
