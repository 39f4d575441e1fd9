"""The stages of a run, from what its roles hold and what its turns were counted to need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from twostep.distill.objectives.roles import Roles
from twostep.models.folder import ModelFolder
from twostep.planning.disk import STORED, student_bytes
from twostep.planning.roles import RolePlan
from twostep.planning.stages import Stage
from twostep.planning.turns import Counted
from twostep.planning.weightless import load_weightless
from twostep.recipe.schema import Recipe
from twostep.runtime.memory_meter import weight_bytes

_NAMES = {"score": "score fit", "warm-up": "warm-up turn"}


@dataclass(frozen=True)
class RunStages:
    """What a run holds between its stages, in bytes of each process.

    Attributes:
        held: by role, while the student is trained.
        extra: of the device beside the roles: the sample sheet's decoder, gathered blocks.
        fitting: gradients and optimizer states of the score, while it is fitted.
        checkpoint: on disk, of all processes.
        frozen: on disk: the fitted score, written once.
        pair: of a student of two adapters, on disk; None for one of whole transformers.
    """

    recipe: Recipe
    held: Sequence[RolePlan]
    extra: int
    fitting: int
    checkpoint: int
    frozen: int
    pair: int | None = None

    @property
    def weights(self) -> int:
        return sum(role.weights + role.average for role in self.held) + self.extra

    @property
    def states(self) -> int:
        """Gradients and optimizer states, which stay from turn to turn."""
        return sum(role.gradients + role.optimizer for role in self.held)

    @property
    def average(self) -> int:
        return sum(role.average for role in self.held)

    def turns(self, runs: Mapping[str, Counted]) -> list[Stage]:
        """A stage for each turn."""
        return [
            Stage(
                _NAMES.get(name, f"{name} turn"),
                self.weights + (self.fitting if name == "score" else self.states) + run.peak,
                operations=run.operations,
            )
            for name, run in runs.items()
        ]

    def checks(self, validation: Counted, decoding: Counted) -> list[Stage]:
        """Validation, with the student's own weights put aside, and the sample sheet."""
        held = self.weights + self.states
        return [
            Stage(
                "validation",
                held + self.average + validation.peak,
                disk=2 * self.average,  # the best average, and the one that takes its place
                operations=validation.operations,
            ),
            Stage("sample sheet", held + decoding.peak, operations=decoding.operations),
        ]

    def save(self, processes: int) -> Stage:
        """A checkpoint: copied to the CPU's memory, and written before an old one is removed."""
        kept = self.recipe.training.keep_checkpoints + 1
        return Stage(
            "checkpoint",
            self.weights + self.states,
            host=self.checkpoint // processes,
            disk=kept * self.checkpoint + self.average + self.frozen,
        )

    def end(self, folder: ModelFolder) -> Stage:
        """The best student, written: its adapters, or put together a transformer at a time."""
        device = self.weights + self.states + self.average
        on_disk = (
            self.recipe.training.keep_checkpoints * self.checkpoint + self.average + self.frozen
        )
        if self.pair is not None:
            return Stage("end of run", device, host=self.pair, disk=on_disk + self.pair)
        adapters = self.recipe.student.weights == "lora"
        dtype = torch.float32
        if adapters and self.recipe.student.backbone_dtype != "float32":
            dtype = torch.bfloat16
        host = weight_bytes(load_weightless(folder, "transformer", dtype))
        if dtype is not STORED:
            host += host * STORED.itemsize // dtype.itemsize  # as it is written
        return Stage("end of run", device, host=host, disk=on_disk + student_bytes(folder))


def checkpoint_bytes(held: Sequence[RolePlan], roles: Roles, shards: int) -> int:
    """A checkpoint's tensors: what is trained, its average and its optimizers' states."""
    trained = sum(r.parameters for r in held if r.gradients)
    averaged = sum(r.parameters for r in held if r.average)
    states = sum(r.optimizer * (1 if r.name == "critic" else shards) for r in held)
    modules = [m for name, m in roles.trained_modules().items() if name != "score"]
    counters = sum(1 for module in modules for _ in module.parameters())  # steps taken, in fp32
    return 4 * (trained + averaged + counters) + states
