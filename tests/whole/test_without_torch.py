"""What needs no network is answered without importing torch: mistakes, and pictures that are there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In one process, so that Python starts once; what an earlier line imported shows in a later one.
CODE = """
import json, sys
from twostep.cli import main
heavy = ("torch", "diffusers", "transformers", "peft", "accelerate")
for line in json.loads(sys.argv[1]):
    sys.argv = ["twostep", *line]
    try:
        main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    print(json.dumps([code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
"""
STUDENT = ["generate", "--model", "zoo:emoji-student"]
TEACHER = ["--reference", "zoo:emoji-teacher", "--out", "never"]
MISTAKES = [
    ["generate", "--model", "zoo:emoji-studen", "a dog"],
    ["generate", "--model", "emoji-student", "a dog"],
    [*STUDENT, "--size", "63", "a dog"],
    [*STUDENT, "--size", "big", "a dog"],
    [*STUDENT, "--steps", "3", "a dog"],
    [*STUDENT, "--device", "gpu", "a dog"],
    [*STUDENT, "--memory", "none", "a dog"],
    [*STUDENT, "--decoder", "zoo:emoji-teacher", "a dog"],
    [*STUDENT, "--lora", "none.safetensors", "a dog"],
    [*STUDENT, "--prompts", "none.txt"],
    STUDENT,
    ["compare", "zoo:emoji-student", "zoo:none", "--prompt", "a dog"],
    ["compare", "zoo:emoji-teacher", "--prompt", "a dog", "--preview"],
    ["evaluate", "--model", "zoo:none", *TEACHER],
    ["evaluate", "--model", "zoo:emoji-student", *TEACHER, "--size", "63"],
    ["evaluate", "--model", "zoo:emoji-student", "--reference", "zoo:emoji-student", "--out", "n"],
    ["export", "--model", "zoo:emoji-teacher", "--to", "lora", "--out", "never"],
    ["export", "--model", "zoo:emoji-student", "--to", "onnx", "--out", "never"],
    ["teach", "zoo:none"],
    ["distill", "zoo:emoji-demo", "teacher.model=zoo:none"],
    ["distill", "zoo:emoji-demo", "data.height=63"],
    ["distill", "zoo:emoji-demo", "data.prompts=none.txt"],
    ["distill", "zoo:emoji-demo", "training.device=gpu"],
    ["plan", "zoo:emoji-demo", "teacher.model=zoo:emoji-student"],
    ["runs", "nowhere"],
]


def test_mistakes_and_what_is_there_need_no_torch(tmp_path: Path) -> None:
    fine = [["models"], ["recipes"], ["runs", "."]]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([*MISTAKES, *fine])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    found = [json.loads(line) for line in ran.stderr.splitlines() if line.startswith("[")]
    wanted = [[2, []]] * len(MISTAKES) + [[0, []]] * len(fine)
    said = dict(zip(map(" ".join, [*MISTAKES, *fine]), found, strict=True))
    assert said == dict(zip(said, wanted, strict=True))


def test_pictures_that_are_there_need_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twostep.inference.generate import PictureRequest, generate

    made = list(generate(PictureRequest("zoo:emoji-student", ["a dog"]), tmp_path))
    assert [p.made for p in made] == [True]
    line = [*STUDENT, "a dog", "--out", str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([line])], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == [str(made[0].path)]
    assert json.loads(ran.stderr) == [0, []]
