"""What each stage of the work needs at its peak, from the teacher's samples to the evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twostep.planning.roles import RolePlan


@dataclass(frozen=True)
class Stage:
    """A stage at its peak; bytes, on each process.

    Attributes:
        name: as tables show it.
        device: weights included; without what the device needs for itself.
        host: in the CPU's memory beside that, for copies of weights; without the interpreter.
        disk: of all processes together: what lies there while it runs, at its most.
        operations: of a sample; 0 where nothing is computed.
    """

    name: str
    device: int
    host: int = 0
    disk: int = 0
    operations: int = 0


@dataclass(frozen=True)
class Needs:
    """What a training needs; bytes on each process.

    Attributes:
        activations: by turn, on pictures of the largest size: what comes alive at its peak beside
            what `roles` hold.
        flops: by turn, on the largest size: operations over the whole batch, of all processes.
        forwards: by turn: operations of a sample, in forwards of one sample through the teacher.
        turns_of_a_student: how many of each turn one update of the student comes with.
        stages: of the run, in their order.
        reserved: bytes that the device (or the interpreter, on a CPU) needs for itself.
        checkpoint, pair: on disk; the latter of a student of two adapters, None for a whole one.
        micro_batch: samples at a time.
    """

    roles: list[RolePlan]
    activations: dict[str, int]
    flops: dict[str, int]
    forwards: dict[str, float]
    turns_of_a_student: dict[str, int]
    stages: list[Stage]
    reserved: int
    checkpoint: int
    pair: int | None
    micro_batch: int

    @property
    def peak_stage(self) -> Stage:
        """The stage that needs the device's memory most."""
        return max(self.stages, key=lambda stage: stage.device)

    @property
    def peak(self) -> int:
        """Of the largest stage, with what the device needs for itself."""
        return self.peak_stage.device + self.reserved


@dataclass(frozen=True)
class TrainingPlan(Needs):
    """Needs of every stage against what there is.

    Attributes:
        cache, student: on disk.
        processes: GPUs.
        memory: bytes of each process.
        seconds_per_1000_turns: the critic's turns included; None without a rate.
        seconds_per_checkpoint: at the disk's rate.
        advice: which settings would make it fit, where it does not.
    """

    cache: int
    student: int
    processes: int
    memory: int
    seconds_per_1000_turns: float | None
    seconds_per_checkpoint: float
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    @property
    def forwards_of_a_turn(self) -> float:
        """An update of the student and the critic's that come with it, in forwards of a sample."""
        return sum(self.forwards[name] * n for name, n in self.turns_of_a_student.items())

    def as_json(self) -> str:
        found: dict[str, Any] = asdict(self)
        found |= {"peak": self.peak, "peak_stage": self.peak_stage.name, "fits": self.fits}
        return json.dumps(found | {"forwards_of_a_turn": self.forwards_of_a_turn}, indent=1)


def largest(stages: Sequence[Stage]) -> int:
    """Bytes of the device that the largest of `stages` takes."""
    return max(stage.device for stage in stages)
