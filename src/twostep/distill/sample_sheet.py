"""Pictures of a few validation prompts: the teacher's, and the student's as it learns."""

from __future__ import annotations

from torch import Tensor

from twostep.distill.run_folder import RunFolder
from twostep.method.rollout import Rollout
from twostep.models.codec import Decoder
from twostep.runtime.images import image_grid


class SampleSheet:
    """A row each of teacher, teacher at two steps, preview and student.

    Args:
        decoder: on the device that has time for it.
        count: prompts, a column each.
    """

    def __init__(self, decoder: Decoder, folder: RunFolder, *, count: int) -> None:
        self.decoder, self.folder, self.count = decoder, folder, count
        self._teacher: dict[str, Tensor] = {}

    def draw(self, rollout: Rollout, *, teacher: Tensor, naive: Tensor, turn: int) -> None:
        """Writes the sheet of `turn`.

        Args:
            rollout: the student's, from the same noise as the others.
            teacher, naive: the teacher's latents at its own steps and at two, (N, C, H, W); the
                same in every call.
        """
        if not self._teacher:
            self._teacher = {"teacher": self._pictures(teacher), "naive": self._pictures(naive)}
        panels = {
            **self._teacher,
            "preview": self._pictures(rollout.clean1),
            "student": self._pictures(rollout.clean2),
        }
        image_grid(panels).save(self.folder.sample_sheet(turn))

    def _pictures(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents[: self.count]).cpu()
