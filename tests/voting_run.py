"""An evaluation's folder of plain pictures, for tests of votes; no model runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PROMPTS = ["a red square", "a blue square", "三枚火箭，橙色背景", "a green square"]
MODELS = {
    "teacher_8": ("teacher", "teacher, 8 steps"),
    "naive_2": ("naive", "same weights, 2 steps"),
    "student_2": ("student", "student, 2 steps"),
    "student_2/preview": ("student", "student, step-1 preview"),
    "reference": ("teacher", "teacher, 8 steps, other noise"),
}


def make_run(run: Path, *, rows: int = 8, part: int = 3, student: str = "student") -> Path:
    """Every picture of a model has one colour: (40 x the model's number, 10 x row, 100).

    Args:
        student: stands for the student's weights.
    """
    sets = []
    for number, (key, (kind, label)) in enumerate(MODELS.items()):
        preview = key.endswith("/preview")
        folder = key.removesuffix("/preview")
        made = f"{student}-pictures" if kind == "student" else f"{key}-pictures"
        sets.append(
            {"key": key, "label": label, "kind": kind, "folder": folder, "fingerprint": made,
             "tensor": "previews" if preview else "images"}
        )  # fmt: skip
        if preview:
            continue
        (run / "images" / folder).mkdir(parents=True, exist_ok=True)
        for start in range(0, rows, part):
            pixels = torch.full((min(part, rows - start), 3, 64, 64), 100, dtype=torch.uint8)
            pixels[:, 0] = 40 * number
            pixels[:, 1] = 10 * torch.arange(start, start + len(pixels))[:, None, None]
            tensors = {"images": pixels}
            if kind == "student":
                tensors["previews"] = 255 - pixels
            path = run / "images" / folder / f"part-{start // part:05d}.safetensors"
            save_file(tensors, path, {"fingerprint": made})
    index = {
        "prompts": PROMPTS, "seeds": [1000 + row for row in range(rows)], "part": part, "sets": sets,
    }  # fmt: skip
    (run / "images" / "index.json").write_text(json.dumps(index))
    (run / "report.html").write_text("<p>before</p><!-- votes -->\n<!-- /votes --><p>after</p>")
    return run
