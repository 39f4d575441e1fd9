"""The best averaged student of a run: kept on disk, and at the end written as a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from twostep.cards.card import lora_card, student_card, write_card
from twostep.cards.origin import Origin
from twostep.data.cache.spec import CacheSpec
from twostep.distill.checkpoint import CheckpointError, TrainingState
from twostep.distill.objectives.roles import Roles
from twostep.distill.run_folder import RunFolder
from twostep.distill.tensor_files import check_whole, load_tensors, save_folder
from twostep.models.lora_files import rank_of
from twostep.models.student import LORA_INDEX, STEPS, write_lora_pair, write_student
from twostep.models.transformer import whole_transformer
from twostep.runtime.distributed import World
from twostep.runtime.notices import notice


class BestStudent:
    """By the distance of its validation. Every process must make the same calls."""

    def __init__(
        self, roles: Roles, state: TrainingState, *, folder: RunFolder, world: World
    ) -> None:
        self.roles, self.state, self.folder, self.world = roles, state, folder, world

    def offer(self, distance: float, metrics: Mapping[str, float]) -> None:
        """Keeps the average as it is now if it is nearer than any before.

        Args:
            metrics: of its validation.
        """
        progress = self.state.progress
        if progress.best_distance is None or distance < progress.best_distance:
            progress.best_distance, progress.best_turn = distance, progress.turn
            progress.best_metrics = dict(metrics)
            save_folder(self._average(), self.folder.best, self.world)

    def export(self, spec: CacheSpec) -> Path:
        """Writes the best one and returns its folder: adapters as they are, full sets whole.

        Adapters on a teacher with LoRA files of its own are merged into whole sets, too, since a
        pair of files belongs to a model that others have.
        """
        if self.folder.best.is_dir():
            try:
                check_whole(self.folder.best)
                load_tensors(self._average(), self.folder.best)
            except Exception as error:
                raise CheckpointError(
                    f"{self.folder.best} cannot be read: {error}. Without the folder, the last "
                    "averages are written in its place"
                ) from error
        else:
            notice(f"{self.folder.best} is gone; the student is of the last turn's averages")
        with self.state.ema.applied():
            if self.roles.first.lora is None or spec.teacher.loras:
                self._write_whole(spec)
            elif self.world.is_first:
                steps = (self.roles.first, self.roles.second)
                write_lora_pair(
                    self.folder.student,
                    [role.lora() for role in steps if role.lora is not None],
                    teacher=spec.teacher.public_name(),
                    schedule=spec.schedule,
                    sizes=spec.sizes,
                )
        self.world.wait()
        return self.folder.student

    def describe(self, spec: CacheSpec) -> None:
        """Writes the student's card, once the run's outcome is known; on the first process."""
        folder = self.folder.student
        name = f"{self.folder.path.name}/{folder.name}"
        origin = Origin.of(folder, teacher=spec.teacher.name, base=spec.teacher.base)
        size = spec.sizes[0]
        if (folder / LORA_INDEX).is_file():
            rank = rank_of(load_file(folder / f"{STEPS[0]}.safetensors"))
            card = lora_card(name, spec.schedule, origin, rank=rank, size=size)
        else:
            card = student_card(name, spec.schedule, origin, size=size)
        write_card(folder, card, origin)

    def _write_whole(self, spec: CacheSpec) -> None:
        steps = self._steps()
        if self.world.is_first:
            write_student(
                spec.teacher.base,
                steps,
                schedule=spec.schedule,
                folder=self.folder.student,
                sizes=spec.sizes,
            )
        for _ in steps:  # the others only help to put it together
            pass

    def _steps(self) -> Iterator[Any]:
        """Each step's transformer, put together when its turn comes: one fills a host's memory."""
        for role in (self.roles.first, self.roles.second):
            yield whole_transformer(role.transformer(), keep=self.world.is_first)

    def _average(self) -> dict[str, Tensor]:
        return {str(index): value for index, value in enumerate(self.state.ema.values)}
