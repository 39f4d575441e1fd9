"""Which pictures stand behind a figure, and the page that shows them, in a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from browsing import SHOTS
from twostep.evaluation.entries import Entry
from twostep.evaluation.figures import AlignedSets, Measured
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.page import write_report
from twostep.evaluation.report.pictures import PictureGroup
from twostep.evaluation.worst import worst_pictures

TEACHER = Entry("teacher", "teacher", "t", 8)
STUDENT = Entry("student", "student", "s")
PROMPTS = PromptSet([f"prompt {n}" for n in range(8)], None, 2)


def pictures(red: float) -> Tensor:
    """A picture of one colour a row; red tells the set, green the row."""
    found = torch.full((16, 3, 64, 64), -0.5)
    found[:, 0] = red
    found[:, 1] = torch.linspace(-1, 1, 16)[:, None, None]
    return found


def shown(image: Tensor) -> tuple[float, int]:
    """(its set's red, its row)."""
    return round(image[0, 0, 0].item(), 2), round((image[1, 0, 0].item() + 1) * 7.5)


def groups(student: Tensor, scores: dict[str, Tensor] | None = None) -> list[PictureGroup]:
    """Of a student with features (16, 1); the teacher's are 0, 10, 20 and on, its second set's
    the same, and it scores 1 everywhere."""
    row = torch.arange(16.0)[:, None] * 10
    scores = scores or {}
    teacher = Measured(row, {name: torch.ones(16) for name in scores})
    measured = Measured(student, scores)
    aligned = AlignedSets(
        groups=PROMPTS.groups, reference=Measured(row, {}), teacher=teacher,
        sets={TEACHER.key: teacher, STUDENT.key: measured}, floor=TEACHER.key, naive=None,
    )  # fmt: skip
    shots = {TEACHER: pictures(-1.0), STUDENT: pictures(1.0)}
    return worst_pictures(
        aligned, [TEACHER, STUDENT], PROMPTS, pictures=shots, reference=pictures(0.0)
    )


def by_figure(found: list[PictureGroup]) -> dict[str, PictureGroup]:
    return {figure: group for group in found for figure in group.figures}


def test_worst_by_features() -> None:
    student = torch.arange(16.0)[:, None] * 10
    student[3] = 74  # 44 from its pair; 4 from the nearest of the teacher's, row 7
    student[13] = 61  # 69 from its pair, 1 from row 6; as prompt 5's second seed
    student[5] = 55  # 5 from its pair and from the nearest; prompt 5's first
    student[12], student[14] = 118, 142
    found = by_figure(groups(student))
    pairs = found["paired_distance"].pairs
    assert [shown(p.left) for p in pairs[:3]] == [(-1.0, 13), (-1.0, 3), (-1.0, 5)]
    assert [shown(p.right) for p in pairs[:3]] == [(1.0, 13), (1.0, 3), (1.0, 5)]
    assert (pairs[0].caption, pairs[0].seed) == ("prompt 5", PROMPTS.noise_seeds()[13])
    strange = found["frechet_to_teacher"].pairs
    assert [shown(p.right)[1] for p in strange[:2]] == [5, 3]
    assert shown(strange[1].left) == (0.0, 7)
    assert strange[1].note == "nearest at 4"
    # Nothing of the student's is nearer than 12 to 130, the teacher's row 13.
    missed = found["coverage"].pairs
    assert shown(missed[0].left) == (0.0, 13)
    assert missed[0].seed == PROMPTS.noise_seeds(reference=True)[13]
    # Prompt 5's two are 6 apart where the teacher's are 80.
    alike = found["diversity"].pairs[0]
    assert [shown(alike.left), shown(alike.right)] == [(1.0, 5), (1.0, 13)]
    assert alike.note.endswith("0.08 of the teacher’s distance")


def test_worst_by_scores() -> None:
    right, read = torch.ones(16), torch.ones(16)
    right[[2, 9]] = 0
    read[4], read[5] = 0.25, torch.nan
    scores = {"accuracy.overall": right, "accuracy.single": right, "ocr": read}
    found = by_figure(groups(torch.arange(16.0)[:, None], scores))
    assert [shown(p.right)[1] for p in found["accuracy"].pairs] == [2, 9]
    assert [p.note for p in found["ocr"].pairs] == ["0.25, the teacher’s 1.00"]
    assert "single" not in str(found.keys())
    all_right = by_figure(groups(torch.arange(16.0)[:, None], {"ocr": torch.ones(16)}))
    assert "ocr" not in all_right  # nothing to show, nothing to link to


@pytest.mark.browser
def test_pictures_are_enlarged_and_figures_lead_to_them(browser: Any, tmp_path: Path) -> None:
    figures: dict[str, Any] = {"frechet_to_teacher": 1.0, "paired_distance": 0.1, "diversity": 0.9}
    report = {
        "models": {"teacher_8": {"kind": "teacher", **figures}}
        | {f"{n}_2": {"kind": "student", **figures} for n in ("student", "other", "third")},
        "prompts": 8,
        "images": 16,
    }
    large = torch.nn.functional.interpolate(pictures(1.0)[:3], scale_factor=12)
    path = write_report(
        tmp_path / "out", report, panels={"teacher, 8 steps": pictures(-1.0)[:3], "s": large},
        captions=["a", "b", "c"], title="T", groups=groups(torch.arange(16.0)[:, None]),
        seeds=[7, 8, 9],
    )  # fmt: skip
    assert "data:image/webp" in path.read_text()  # larger than a page wants it whole
    context = browser.new_context(
        color_scheme="dark", is_mobile=True, has_touch=True,
        viewport={"width": 390, "height": 844},
    )  # fmt: skip
    page = context.new_page()
    page.set_default_timeout(20_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.get_attribute("#picture-0-1", "title") == "teacher, 8 steps: b (seed 8)"
    page.tap("#picture-0-1")
    box = page.locator("#picture-0-1 img").bounding_box()
    assert box["width"] > 340
    assert page.is_visible("#picture-0-1 span")
    shot = Path(SHOTS or tmp_path) / "report-zoom.png"
    page.screenshot(path=shot)
    with Image.open(shot) as image:
        assert np.asarray(image.convert("RGB"))[2, 2].max() < 60  # dark, and nothing beside it
    page.tap("#picture-0-1 ~ .next")  # the same prompt by the next model
    assert page.url.endswith("#picture-1-1")
    page.tap("#picture-1-1 ~ .close")
    assert page.locator("#picture-1-1 img").bounding_box()["width"] < 130
    page.click('.figures a:text-is("Diversity")')
    assert page.url.endswith("#worst-most-alike")
    assert page.evaluate("document.querySelector('h3:target').getBoundingClientRect().top") < 60
    names = re.findall(r"href=\"#(worst-[^\"]+)\"", path.read_text())
    assert {"worst-furthest-apart", "worst-most-alike"} <= set(names)
    page.screenshot(path=Path(SHOTS or tmp_path) / "report-worst.png")
    assert problems == []
    context.close()
