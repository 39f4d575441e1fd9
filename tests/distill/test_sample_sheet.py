from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from twostep.distill.run_folder import RunFolder
from twostep.distill.sample_sheet import SampleSheet
from twostep.method.rollout import Rollout


@dataclass
class Echo:
    """A decoder whose pictures are the latents' first three channels."""

    decoded: list[int] = field(default_factory=list)

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(len(latents))
        return latents[:, :3]


def test_the_teachers_rows_are_decoded_once_and_no_more_than_are_shown(tmp_path: Path) -> None:
    decoder: Any = Echo()
    sheet = SampleSheet(decoder, RunFolder(tmp_path), count=3)
    rows = [torch.full((8, 4, 16, 16), value) for value in (-1.0, -0.5, 0.0, 0.5)]
    teacher, naive, preview, student = rows
    for turn in (100, 200):
        rollout = Rollout(clean1=preview, latents2=preview, clean2=student)
        sheet.draw(rollout, teacher=teacher, naive=naive, turn=turn)
        student = student + 0.5
    assert decoder.decoded == [3] * 6  # four rows, then two
    for turn, last in ((100, 0.5), (200, 1.0)):
        pixels = np.asarray(Image.open(tmp_path / "samples" / f"turn-{turn:07d}.png"))
        side = pixels.shape[0] // 4
        shown = [pixels[r * side + side // 2, 16, 0] / 127.5 - 1 for r in range(4)]
        np.testing.assert_allclose(shown, [-1, -0.5, 0, last], atol=0.02)
