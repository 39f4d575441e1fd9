"""A batch through a model's stages; one picture that a model fails on spoils no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from twostep.serving.jobs import Event, Job, Left, Observer, Preview, StepModel


@dataclass
class Cohort:
    """Pictures of one model that are between two steps."""

    jobs: list[Job]
    states: list[Any]
    step: int = 1
    joined: bool = False
    started: float = field(default_factory=time.monotonic)


class Stages:
    """Runs batches and tells their jobs, and `observer`, what came of them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def first(self, model: StepModel, jobs: list[Job]) -> tuple[list[Job], list[Any]]:
        """Step 1, and its previews for those who want them."""
        now = time.monotonic()
        for job in jobs:
            self._observer.waited(now - job.submitted)
        pairs = self._each("first", model.first, [(job, job.spec) for job in jobs])
        now = time.monotonic()
        wanted = [pair for pair in pairs if pair[0].preview and not pair[0].gone(now)]
        for job, pixels in self._each("preview", model.preview, wanted):
            _tell(job, Preview(pixels))
        return [job for job, _ in pairs], [state for _, state in pairs]

    def advance(self, model: StepModel, cohort: Cohort) -> None:
        """The next step of those who are still there; the others leave the cohort."""
        now = time.monotonic()
        pairs = list(zip(cohort.jobs, cohort.states, strict=True))
        here = [pair for pair in pairs if not pair[0].gone(now)]
        if len(here) < len(pairs):
            self._observer.left("gone_between_steps", len(pairs) - len(here))
        step = cohort.step
        stage = "second" if step == 1 else "later"
        pairs = self._each(stage, lambda states: model.advance(states, step), here)
        cohort.jobs, cohort.states = [job for job, _ in pairs], [state for _, state in pairs]
        cohort.step += 1

    def finish(self, model: StepModel, cohort: Cohort) -> int:
        """Makes the pictures and tells of them; how many there are."""
        pairs = list(zip(cohort.jobs, cohort.states, strict=True))
        done = self._each("decode", model.finish, pairs)
        for job, finished in done:
            _tell(job, finished)
        return len(done)

    def _each(
        self,
        stage: str,
        call: Callable[[list[Any]], Sequence[Any]],
        pairs: list[tuple[Job, Any]],
    ) -> list[tuple[Job, Any]]:
        """`call` on a batch; where it raises, on each alone, and who fails alone leaves."""
        if not pairs:
            return []
        started = time.monotonic()
        try:
            results = call([value for _, value in pairs])
        except Exception as error:
            self._observer.failed(error)
            if len(pairs) == 1:
                if stage != "preview":  # the picture itself may still come
                    self.leave("failed", [pairs[0][0]])
                return []
            return [found for pair in pairs for found in self._each(stage, call, [pair])]
        self._observer.batch(stage, len(pairs), time.monotonic() - started)
        return [(job, result) for (job, _), result in zip(pairs, results, strict=True)]

    def leave(self, reason: Literal["failed", "closed"], jobs: Sequence[Job]) -> None:
        if jobs:
            self._observer.left(reason, len(jobs))
        for job in jobs:
            _tell(job, Left(reason))


def _tell(job: Job, event: Event) -> None:
    """Whoever listened may be gone with its event loop; the others' pictures still come."""
    with suppress(Exception):
        job.tell(event)
