"""A release holds what belongs to it, and a student is no teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tiny import random_transformer
from twostep.cards.origin import Origin
from twostep.errors import ModelError, UserError
from twostep.evaluation.entries import list_entries
from twostep.exports import registry
from twostep.exports.combine import assemble
from twostep.exports.registry import ExportOptions, export
from twostep.inference.generate import PictureRequest, generate
from twostep.models.folder import ModelFolder
from twostep.models.student import save_student


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "mine"
    teacher = run / "teacher"
    shutil.copytree(tiny_folder, teacher)
    (teacher / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (teacher / "tokenizer" / "evil.py").write_text("open('CANARY', 'w')")
    (teacher / "tokenizer" / "notes.txt").write_text("notes")
    (teacher / "tokenizer" / "linked.txt").symlink_to("notes.txt")
    model = ModelFolder.open(teacher)
    save_student(
        model.base,
        random_transformer(1),
        random_transformer(2),
        schedule=model.schedule(),
        folder=run / "student",
    )
    (run / "recipe.yaml").write_text(
        f"name: mine\nteacher:\n  model: {teacher}\ndata:\n  prompts: ~/secret/p.txt\n  cache: a/b\n"
    )
    return run / "student"


def test_files_by_pattern_without_links_and_local_paths(student: Path) -> None:
    names = {p.relative_to(student).as_posix() for p in student.rglob("*")}
    assert "tokenizer/tokenizer.json" in names
    assert not {"text_encoder/pytorch_model.bin", "tokenizer/evil.py"} & names
    assert not any(p.is_symlink() for p in student.rglob("*"))
    assert (student / "tokenizer" / "linked.txt").read_text() == "notes"
    here = str(student.parents[2])
    for path in student.rglob("*.json"):
        assert here not in path.read_text(), path
    assert Origin.of(student).recipe == (
        "name: mine\nteacher:\n  model: teacher\ndata:\n  prompts: p.txt\n  cache: a/b\n"
    )


def test_an_export_that_fails_leaves_nothing(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(model: ModelFolder, out: Path, options: ExportOptions) -> list[str]:
        assert not (tmp_path / "out").exists()
        (out / "first.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(registry.FORMATS, "comfyui", half)
    with pytest.raises(UserError, match=r"out cannot be written: No space left on device \("):
        export(str(student), "comfyui", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_student_is_no_teacher(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    name, out = str(student), tmp_path / "out"
    with pytest.raises(ModelError, match=r"^reference: .* is a two-step student"):
        list_entries(name, 8, {})
    with pytest.raises(ModelError, match=r"^teacher: .* is a two-step student"):
        export(name, "lora", out, ExportOptions(teacher=name))
    with pytest.raises(ModelError, match=r"^teacher: .* is a two-step student"):
        assemble(name, name, name, out=out)
    for step in ("first", "second"):
        (tmp_path / f"{step}.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    index = {"teacher": name, "step2_sigma": 0.75, "transition": "euler"}
    (tmp_path / "twostep.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"its teacher .* is a two-step student"):
        ModelFolder.open(tmp_path)
    assert not out.exists()


def test_two_long_prompts_never_share_a_file(student: Path, tmp_path: Path) -> None:
    """Both began with the same 60 letters and had the same 24 bits of checksum."""
    text = "a very long and carefully written prompt that begins the same way for all, variation number"
    prompts = [f"{text} 1532", f"{text} 4275", "\U00020000" * 70]
    request = PictureRequest(str(student), prompts, size=(32, 32))
    pictures = list(generate(request, tmp_path))
    assert len({p.path for p in pictures}) == 3
    assert all(p.path.is_file() and len(p.path.name.encode()) < 255 for p in pictures)
