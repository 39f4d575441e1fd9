"""What an evaluation or an export can know before any picture is made or weight is read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from twostep.errors import UserError
from twostep.evaluation import evaluate as evaluation
from twostep.evaluation import external_scorer
from twostep.evaluation.entries import Entry
from twostep.evaluation.evaluate import EvaluationRequest, evaluate
from twostep.evaluation.external_scorer import ExternalScore
from twostep.evaluation.figures import AlignedSets, Measured, figures
from twostep.evaluation.prompts import PromptSet
from twostep.evaluation.report.words import verdict
from twostep.exports.registry import ExportOptions, export
from twostep.inference.generate import PictureRequest, generate

PROMPTS = PromptSet(["a dog", "a cat"], None, 2)
SAYS = f"{sys.executable} -c"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (33, 32)}, "size: height must be a positive multiple"),
        ({"scores": ["x=nosuchcommand"]}, "scores: x: no program 'nosuchcommand'"),
        ({"scores": ["x=false"]}, "scores: x: false ended with 1"),
        ({"scores": [f"x={SAYS} 'print(1e999)'"]}, "expected a finite number or null"),
        ({"scores": ["inspector"]}, "the inspector judges only prompts"),
        ({"scores": ["good"]}, "scores: 'good' is unknown"),
    ],
)
def test_an_evaluation_that_cannot_end_well_does_not_begin(
    changes: dict[str, object],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "make_all", lambda *_, **__: pytest.fail("images were made"))
    monkeypatch.setattr(evaluation, "load_extractor", lambda name: name)
    entry = Entry("teacher", "teacher", str(tiny_folder), 4)
    usual = {"entries": [entry], "prompts": PROMPTS, "scores": [], "size": (32, 32)}
    with pytest.raises(UserError, match=message) as error:
        evaluate(EvaluationRequest(**(usual | changes)), tmp_path)  # type: ignore[arg-type]
    assert error.value.exit_code == 2


def test_a_scorer_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_scorer, "START_SECONDS", 0.3)
    monkeypatch.setattr(external_scorer, "PICTURE_SECONDS", 0.0)
    score = ExternalScore(f"x={SAYS} 'import time; time.sleep(60)'")
    with pytest.raises(ValueError, match="not done with 1 pictures after 0 seconds"):
        score(torch.zeros(1, 3, 8, 8), PROMPTS.first())


def test_one_seed_leaves_diversity_out() -> None:
    features = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sets = {key: Measured(features + shift, {}) for key, shift in (("teacher_8", 0), ("s_2", 0.1))}
    found = figures(
        AlignedSets(
            groups=torch.arange(8),
            reference=Measured(features.flip(0), {}),
            teacher=sets["teacher_8"],
            sets=sets,
            floor="teacher_8",
            naive=None,
        )
    )
    assert "diversity" not in found["s_2"]
    assert found["s_2"]["paired_distance"] > 0
    assert "diversity" not in verdict({"models": {"s_2": {"kind": "student", **found["s_2"]}}})


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("lora", {"rank": 99999}, "^rank: must be at most 256, the largest"),
        ("lora", {"energy": 0.0}, "^energy: must be above 0"),
        ("lora", {"size": (63, 64)}, "^size: height must be a positive multiple"),
        ("torch", {"size": (64, 63)}, "^size: width must be a positive multiple"),
        ("torch", {"caption_tokens": 512}, "^caption_tokens: must be at most 480"),
        ("nothing", {}, "^to: 'nothing' is unknown"),
    ],
)
def test_an_export_that_cannot_be_made(
    target: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    given = ExportOptions(teacher="zoo:emoji-teacher", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        export("zoo:emoji-student", target, tmp_path / "out", given)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^out: .* is a file, expected a new folder"):
        export("zoo:emoji-student", "comfyui", tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (2**63, 1), (2**63 - 2, 3)])
def test_seeds_that_overflow(seed: int, count: int, tmp_path: Path) -> None:
    request = PictureRequest("zoo:emoji-student", ["a dog"], seed=seed, count=count)
    made: Callable[[], object] = lambda: list(generate(request, tmp_path / "out"))  # noqa: E731
    with pytest.raises(UserError, match=r"^seed: "):
        made()
    assert not (tmp_path / "out").exists()
