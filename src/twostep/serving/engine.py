"""The engine: one thread that takes pictures from a bounded line and makes them in batches.

Knows neither torch nor the web. Pictures join and leave batches before a step, never within one:
one that is cancelled or late leaves before step 1 or between the steps, and one that comes while
others are between the steps has its step 1 made before they go on, so that all go on together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twostep.serving.jobs import EngineState, FullError, Job, NotReadyError, Observer, StepModel
from twostep.serving.stages import Cohort, Stages

# Weight of the newest batch in the running mean of seconds a picture.
_NEWEST = 0.2


class Engine:
    """Makes pictures of one or more models, a step of one model at a time, models in turn.

    Args:
        load: gives the models by name, warmed up; called on the engine's thread.
        line: pictures that may wait.
        max_batch: pictures in a batch.
        batch_wait: seconds that a batch that is not full waits for more, where the one before it
            had more than one picture.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, StepModel]],
        *,
        line: int = 64,
        max_batch: int = 8,
        batch_wait: float = 0.004,
        observer: Observer | None = None,
    ) -> None:
        self.line, self.max_batch, self.batch_wait = line, max_batch, batch_wait
        self.state: EngineState = "starting"
        self.error: Exception | None = None
        self._load, self._observer = load, observer or Observer()
        self._stages = Stages(self._observer)
        self._models: Mapping[str, StepModel] = {}
        self._turns: list[str] = []  # whose turn it is, first first
        self._waiting: list[Job] = []
        self._between: dict[str, Cohort] = {}
        self._crowded = False
        self._seconds = 0.1
        self._abandon = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Loads the models, then works; returns at once."""
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Whether it is ready, once it is known or `timeout` is over."""
        with self._wake:
            self._wake.wait_for(lambda: self.state != "starting", timeout)
            return self.state == "ready"

    @property
    def waiting(self) -> int:
        """Pictures in line."""
        return len(self._waiting)

    @property
    def in_flight(self) -> int:
        """Pictures between two steps."""
        return sum(len(cohort.jobs) for cohort in list(self._between.values()))

    def busy(self) -> float | None:
        """Seconds after which to come back if the line is full; None if there is room."""
        if len(self._waiting) < self.line:
            return None
        with self._wake:
            self._drop_gone()
            return None if len(self._waiting) < self.line else self._patience()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all of `jobs` in line, or none.

        Raises:
            FullError: if there is no room for all.
            NotReadyError: if the engine takes none.
            KeyError: for a model that it does not have.
        """
        with self._wake:
            if self.state != "ready":
                raise NotReadyError(f"the engine is {self.state}")
            for job in jobs:
                if job.spec.model not in self._models:
                    raise KeyError(job.spec.model)
            if len(self._waiting) + len(jobs) > self.line:
                self._drop_gone()
            if len(self._waiting) + len(jobs) > self.line:
                raise FullError(self._patience())
            self._waiting.extend(jobs)
            self._wake.notify_all()

    def _patience(self) -> float:
        """Until about half of the line is gone."""
        return max(1.0, self._seconds * len(self._waiting) / 2)

    def close(self, timeout: float = 30.0) -> None:
        """Takes no more, finishes what it has, at most for `timeout` seconds, and ends."""
        with self._wake:
            if self.state in ("ready", "starting"):
                self.state = "draining"
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        with self._wake:
            self._abandon = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            self._models = dict(self._load())
        except Exception as error:
            with self._wake:
                self.error, self.state = error, "failed"
                self._wake.notify_all()
            return
        self._turns = list(self._models)
        with self._wake:
            if self.state == "starting":
                self.state = "ready"
            self._wake.notify_all()
        try:
            self._work()
        except Exception as error:
            self.error, self._abandon = error, True
            self._observer.failed(error)
        for cohort in self._between.values():
            self._stages.leave("closed", cohort.jobs)
        self._between.clear()
        with self._wake:
            self._stages.leave("closed", self._waiting)
            self._waiting = []
            self.state = "closed" if self.error is None else "failed"

    def _work(self) -> None:
        while True:
            with self._wake:
                work = self._next()
            if work is None:
                return
            work()

    def _next(self) -> Callable[[], None] | None:
        """The next thing to do, with the lock held; waits for one. None to end."""
        while not self._abandon:
            self._drop_gone()
            patience = None
            for name in list(self._turns):
                found = self._work_of(name)
                if callable(found):
                    self._turns.remove(name)
                    self._turns.append(name)
                    return found
                if found is not None:
                    patience = found if patience is None else min(patience, found)
            if patience is None and self.state == "draining":
                return None
            self._wake.wait(patience)
        return None

    def _work_of(self, name: str) -> Callable[[], None] | float | None:
        """What there is to do of a model, or seconds to wait for more of it, or None."""
        model, cohort = self._models[name], self._between.get(name)
        if cohort is not None:
            group, room = cohort.jobs[0].group, self.max_batch - len(cohort.jobs)
            if cohort.step == 1 and model.steps > 1 and not cohort.joined and room > 0:
                cohort.joined = True
                if jobs := self._take(name, group, room):
                    return lambda: self._join(model, cohort, jobs)
            return lambda: self._advance(name, model, cohort)
        mine = [job for job in self._waiting if job.spec.model == name]
        if not mine:
            return None
        group = self._group(model, mine[0])
        if self._crowded and self.state == "ready":
            alike = sum(self._group(model, job) == group for job in mine[: self.max_batch])
            rest = self.batch_wait - (time.monotonic() - mine[0].submitted)
            if alike < self.max_batch and rest > 0:
                return rest
        jobs = self._take(name, group, self.max_batch)
        self._crowded = len(jobs) > 1
        return lambda: self._begin(name, model, jobs)

    def _group(self, model: StepModel, job: Job) -> Any:
        if job.group is None:
            try:
                job.group = model.group(job.spec)
            except Exception as error:  # fails alone, in its step 1
                self._observer.failed(error)
                job.group = ("alone", id(job))
        return job.group

    def _take(self, name: str, group: Any, room: int) -> list[Job]:
        """The oldest that can share a batch, out of the line."""
        model = self._models[name]
        taken: list[Job] = []
        for job in self._waiting:
            if len(taken) == room:
                break
            if job.spec.model == name and self._group(model, job) == group:
                taken.append(job)
        chosen = set(map(id, taken))
        self._waiting = [job for job in self._waiting if id(job) not in chosen]
        return taken

    def _drop_gone(self) -> None:
        now = time.monotonic()
        stay = [job for job in self._waiting if not job.gone(now)]
        if len(stay) < len(self._waiting):
            self._observer.left("gone_before_step1", len(self._waiting) - len(stay))
            self._waiting = stay

    def _begin(self, name: str, model: StepModel, jobs: list[Job]) -> None:
        started = time.monotonic()
        jobs, states = self._stages.first(model, jobs)
        if jobs:
            cohort = self._between[name] = Cohort(jobs, states, started=started)
            if model.steps == 1:
                self._finish(name, model, cohort)

    def _join(self, model: StepModel, cohort: Cohort, jobs: list[Job]) -> None:
        jobs, states = self._stages.first(model, jobs)
        cohort.jobs.extend(jobs)
        cohort.states.extend(states)

    def _advance(self, name: str, model: StepModel, cohort: Cohort) -> None:
        self._stages.advance(model, cohort)
        if not cohort.jobs:
            del self._between[name]
        elif cohort.step == model.steps:
            self._finish(name, model, cohort)

    def _finish(self, name: str, model: StepModel, cohort: Cohort) -> None:
        del self._between[name]
        made = self._stages.finish(model, cohort)
        self._observer.finished(name, made)
        if made:
            seconds = (time.monotonic() - cohort.started) / made
            self._seconds += _NEWEST * (seconds - self._seconds)
