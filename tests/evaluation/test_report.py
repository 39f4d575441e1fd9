from __future__ import annotations

import base64
import io
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from twostep.evaluation.report.page import write_report
from twostep.evaluation.report.words import verdict
from twostep.runtime.images import image_grid, to_pil

CAPTIONS = ["a red apple on a blue background", "蓝色背景上的两只猫", "a <dog> & a car"]
ROWS = ["teacher, 8 steps", "same weights, 2 steps", "student, step-1 preview", "student, 2 steps"]
BROWSER_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1600",
]


def model(frechet: float, overall: float, diversity: float, seconds: float) -> dict[str, Any]:
    accuracy = {
        "overall": overall,
        "single": 0.97,
        "two": 0.91,
        "counting": 0.88,
        "position": 0.79,
        "background": 0.99,
    }
    return {
        "frechet_to_teacher": frechet,
        "accuracy": accuracy,
        "diversity": diversity,
        "seconds_per_image": seconds,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    student = model(1.51, 0.84, 0.95, 0.0513)
    student["preview"] = {"frechet_to_teacher": 7.77, "accuracy": {"overall": 0.61}}
    return {
        "models": {
            "teacher_8": model(0.625, 0.86, 1.0, 0.19),
            "naive_2": model(10.5, 0.33, 1.21, 0.05),
            "student_2": student,
            "shipped_2": model(0.912, 0.85, 0.98, 0.0514),
        },
        "floor": 0.625,
        "gap_closed": {"student_2": 0.9104, "shipped_2": 0.9709},
        "prompts": 200,
        "images": 400,
        "extractor": "inspector-96",
        "machine": "A Machine, 2 cores",
        "commit": "0123456789ab",
        "date": "2031-02-03",
        "command": "twostep demo --minutes 15",
        "minutes": 14.62,
        "turns": 1234,
        "steps": 2,
        "recipe": {"name": "emoji-demo"},
    }


@pytest.fixture
def panels() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {row: torch.rand(len(CAPTIONS), 3, 64, 64) * 2 - 1 for row in ROWS}


@pytest.fixture
def curves() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for turn in range(1, 301):
        record = {
            "turn": turn,
            "loss": math.sin(turn / 9),
            "final/distribution_matching": 0.5 + 1 / turn,
            "critic/accuracy_final": 0.7,
            "gradient_norm/first": 100 * math.exp(-turn / 40) + 0.01,
            "gradient_norm/second": math.nan if turn == 7 else 1.0,
        }
        if turn % 50 == 0:
            record["validation/kernel_distance"] = 1 / turn - 0.005
        records.append(record)
    return records


def write(
    tmp_path: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    curves: list[dict[str, Any]],
) -> str:
    path = write_report(
        tmp_path / "out",
        report,
        panels=panels,
        captions=CAPTIONS,
        curves=curves,
        title="Two steps from eight",
    )
    assert path == tmp_path / "out" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]  # nothing half-written stays
    return path.read_text(encoding="utf-8")


def test_page_is_whole_in_itself(
    tmp_path: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    curves: list[dict[str, Any]],
) -> None:
    page = write(tmp_path, report, panels, curves)
    sources = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'>\s]*)", page)
    links = {source for source in sources if source.startswith("#")}
    assert links - {"#_"} <= {f"#{name}" for name in re.findall(r" id=\"([^\"]+)\"", page)}
    pictures = [source for source in sources if source not in links]
    assert len(pictures) == len(ROWS) * len(CAPTIONS)
    assert all(source.startswith("data:image/png;base64,") for source in pictures)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "url(" not in page


def test_page_shows_every_figure(
    tmp_path: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    curves: list[dict[str, Any]],
) -> None:
    page = write(tmp_path, report, panels, curves)
    cells = re.findall(r"<td>([^<]*)</td>", page)
    for figure in (
        "0.625",
        "10.5",
        "1.51",
        "0.912",
        "91%",
        "97%",
        "0.86",
        "0.33",
        "0.84",
        "0.85",
        "0.97",
        "0.91",
        "0.88",
        "0.79",
        "0.99",
        "1.00",
        "1.21",
        "0.95",
        "0.98",
        "190 ms",
        "50.0 ms",
        "51.3 ms",
        "51.4 ms",
        "0.27",
        "7.77",
        "0.61",
    ):
        assert figure in cells
    for text in (
        "inspector-96",
        "A Machine, 2 cores",
        "0123456789ab",
        "2031-02-03",
        "14.62",
        "1234",
        "twostep demo --minutes 15",
        "400 images",
        "200 held-out prompts",
        "emoji-demo",
        "Teacher<span>8 steps</span>",
        "Same weights<span>2 steps</span>",
        "Shipped student<span>2 steps</span>",
        "The student closes 91% of the gap between the teacher’s weights at 2 steps and at 8, "
        "at 0.27 of the teacher’s time per image; overall accuracy 0.84 against the "
        "teacher’s 0.86; diversity 95% of the teacher’s. The shipped student closes 97% of it; overall accuracy 0.85.",
        *ROWS,
        CAPTIONS[0],
        CAPTIONS[1],
        "a &lt;dog&gt; &amp; a car",
    ):
        assert text in page


def test_pictures_are_the_panels(
    tmp_path: Path, report: dict[str, Any], panels: dict[str, Tensor]
) -> None:
    page = write(tmp_path, report, panels, [])
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    expected = [image for images in panels.values() for image in images]
    for text, image in zip(found, expected, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(text)))
        assert np.array_equal(np.asarray(picture), np.asarray(to_pil(image)))


def test_curves_are_drawn_where_there_is_data(
    tmp_path: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    curves: list[dict[str, Any]],
) -> None:
    page = write(tmp_path, report, panels, curves)
    assert page.count("<svg") == 5  # kernel distance, matching, critic, gradient norms, loss
    lines = re.findall(r'<polyline class="s\d" points="([^"]+)"', page)
    assert len(lines) == 6
    for line in lines:
        points = [[float(v) for v in point.split(",")] for point in line.split()]
        assert 2 <= len(points) <= 120
        assert all(0 <= x <= 320 and 0 <= y <= 170 for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert page.count("logarithmic</span>") == 1  # the gradient norms
    assert "nan" not in "".join(lines)
    assert "<svg" not in write(tmp_path, report, panels, [{"turn": 1, "loss": 2.0}])


def test_six_charts_at_most(
    tmp_path: Path, report: dict[str, Any], panels: dict[str, Tensor]
) -> None:
    keys = (
        "loss",
        "final/distribution_matching",
        "critic/accuracy_final",
        "gradient_norm/first",
        "validation/kernel_distance",
        "validation/diversity",
        "fake/step1",
        "latents/std",
    )
    curves: list[dict[str, Any]] = [{"turn": t, **dict.fromkeys(keys, 0.0)} for t in (1, 2)]
    assert write(tmp_path, report, panels, curves).count("<svg") == 6


def test_models_may_be_missing(
    tmp_path: Path, report: dict[str, Any], panels: dict[str, Tensor]
) -> None:
    del report["models"]["shipped_2"], report["gap_closed"]["shipped_2"]
    page = write(tmp_path, report, panels, [])
    assert "The student closes 91%" in page
    assert "hipped" not in page
    report["models"] = {key: report["models"][key] for key in ("teacher_8", "naive_2")}
    assert "No student was compared" in write(tmp_path, report, panels, [])


def test_bare_figures(tmp_path: Path) -> None:
    models = {
        "teacher_4": {"accuracy": {"overall": math.nan}},
        "student_2": {"frechet_to_teacher": 3.0, "diversity": math.nan},
    }
    page = write_report(
        tmp_path, {"models": models}, panels={}, captions=[], title="Bare"
    ).read_text()
    assert "The student was compared with the teacher." in page
    assert "3.00" in page
    assert "nan" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("key", ["teacher_x_2", "naive_idea_2"])
def test_a_student_may_be_called_almost_like_its_teacher(
    key: str, tmp_path: Path, report: dict[str, Any], panels: dict[str, Tensor]
) -> None:
    report["models"][key] = report["models"].pop("student_2")
    report["gap_closed"][key] = report["gap_closed"].pop("student_2")
    page = write(tmp_path, report, panels, [])
    name = key.removesuffix("_2")
    assert f"The {name} closes 91% of it" in page
    assert "The shipped student closes 97% of the gap" in page


def test_kinds_tell_a_student_from_its_teacher(report: dict[str, Any]) -> None:
    """A file that says what each model is needs no guess by name."""
    for key, kind in (("teacher_8", "teacher"), ("naive_2", "naive"), ("shipped_2", "student")):
        report["models"][key]["kind"] = kind
    report["models"]["teacher_2"] = report["models"].pop("student_2") | {"kind": "student"}
    report["gap_closed"]["teacher_2"] = report["gap_closed"].pop("student_2")
    assert "The teacher closes 91% of it" in verdict(report)


def test_verdict_tells_of_a_student_that_lost(
    tmp_path: Path, report: dict[str, Any], panels: dict[str, Tensor]
) -> None:
    report["gap_closed"]["student_2"] = -0.4
    page = write(tmp_path, report, panels, [])
    assert "The student is further from the teacher than" in page
    assert "(gap closed: −40%)" in page


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 1, 8, 8), (3, 8, 8)])
def test_panels_that_do_not_fit(
    tmp_path: Path, report: dict[str, Any], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"panel 'odd' must have shape \(3, 3, H, W\)"):
        write_report(
            tmp_path,
            report,
            panels={"odd": torch.zeros(shape)},
            captions=CAPTIONS,
            title="Odd",
        )
    assert not list(tmp_path.iterdir())


def test_to_pil() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0, 7.0]).reshape(1, 2, 2).repeat(3, 1, 1)
    image[2] = -1
    pixels = np.asarray(to_pil(image))
    assert pixels.shape == (2, 2, 3)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, 1].tolist() == [128, 128, 0]
    assert pixels[1].tolist() == [[255, 255, 0]] * 2


def test_image_grid_has_a_row_per_panel() -> None:
    white, black = torch.ones(3, 3, 8, 8), -torch.ones(3, 3, 8, 8)
    grid = np.asarray(image_grid({"white": white, "black": black}, scale=1))
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2 * 2, 3)
    assert (grid[:8] == 255).all()
    assert (grid[10:, :8] == 0).all()
    assert (grid[10:, 8:10] == 255).all()
    doubled = image_grid({"white": white, "black": black}, scale=2)
    assert doubled.size == (2 * 28, 2 * 18)


@pytest.mark.browser
def test_page_in_a_browser(
    tmp_path: Path,
    report: dict[str, Any],
    panels: dict[str, Tensor],
    curves: list[dict[str, Any]],
) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        reason = "no `chromium` on PATH: apt-get update && apt-get install -y chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    write(tmp_path, report, panels, curves)
    shot = tmp_path / "s.png"
    subprocess.run(
        [
            browser,
            *BROWSER_FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={shot}",
            (tmp_path / "out" / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    pixels = np.asarray(Image.open(shot).convert("RGB"), np.int64)
    assert pixels.shape == (1600, 1200, 3)
    ink = (np.abs(pixels - pixels[0, 0]).sum(-1) > 60).mean()
    assert ink > 0.02  # text and noisy pictures on plain paper
    colourful = (pixels.max(-1) - pixels.min(-1) > 60).mean()
    # Of random pixels most are; the pictures of 4 rows x 3 prompts are about a tenth of the page.
    assert colourful > 0.04
