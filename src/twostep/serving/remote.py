"""Pictures made by replicas elsewhere: what stands in an engine's place in the cluster's front.

Knows no cluster and no web framework: a `Station` is any group of replicas. A picture's events are
a function of its spec, so one whose replica died is asked for again, from the last station that
handed it on, and its client does not notice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from twostep.serving.jobs import (
    EngineState,
    Event,
    Finished,
    FullError,
    HandedSpec,
    Handover,
    Job,
    Left,
    NotReadyError,
    Observer,
    PictureSpec,
    Preview,
)

# A picture that kills its replicas shall not kill them all.
_LIVES = 3
_PAUSES = (0.05, 0.2, 0.5, 1.0)
# Weight of the newest picture in the running mean of seconds between pictures.
_NEWEST = 0.1


class ReplicaLostError(Exception):
    """The replica died, or cannot be reached, before its last event."""


class Station(Protocol):
    """Replicas that all do the same."""

    def make(self, spec: PictureSpec, preview: bool, seconds: float) -> AsyncGenerator[Event, None]:
        """As `Replica.make`, on any replica that has room; waits for one.

        Raises:
            ReplicaLostError: from the iterator.
        """
        ...

    async def ready(self) -> None:
        """Returns once a replica is there."""
        ...


class RemoteEngine:
    """Sends each picture through one station after another (`jobs.Maker`).

    To be used in one event loop, but for `close`, which blocks and is called from another thread.

    Args:
        line: pictures that may be open at one time, in line or on their way.
    """

    def __init__(
        self, stations: Sequence[Station], *, line: int, observer: Observer | None = None
    ) -> None:
        self.line = line
        self.state: EngineState = "starting"
        self.error: Exception | None = None
        self.retried = 0
        self._stations, self._observer = tuple(stations), observer or Observer()
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_flight, self._seconds, self._last = 0, 0.1, 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Pictures that no replica has begun."""
        return len(self._tasks) - self._in_flight

    @property
    def in_flight(self) -> int:
        """Pictures of which a station has told something."""
        return self._in_flight

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._until_ready())

    async def _until_ready(self) -> None:
        for station in self._stations:
            await station.ready()
        if self.state == "starting":
            self.state = "ready"

    def busy(self) -> float | None:
        return None if len(self._tasks) < self.line else self._patience()

    def _patience(self) -> float:
        return max(1.0, self._seconds * len(self._tasks) / 2)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Also before a replica is there: a new front may take over from an old one at any time."""
        if self.state not in ("starting", "ready"):
            raise NotReadyError(f"the front is {self.state}")
        if len(self._tasks) + len(jobs) > self.line:
            raise FullError(self._patience())
        for job in jobs:
            task = asyncio.get_running_loop().create_task(self._make(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            job.on_cancel = task.cancel

    async def _make(self, job: Job) -> None:
        walk = _Walk(job)
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                for station in self._stations:
                    await self._visit(station, walk)
                    if walk.last is not None:
                        break
        except TimeoutError:
            self._observer.left("gone_before_step1", 1)
            return
        except asyncio.CancelledError:
            self._observer.left("gone_between_steps" if walk.begun else "gone_before_step1", 1)
            raise
        except Exception as error:
            self._observer.failed(error)
            walk.last = Left("failed")
        finally:
            self._in_flight -= walk.begun
        if isinstance(walk.last, Finished):
            self._observer.finished(job.spec.model, 1)
            now = time.monotonic()
            if self._last:
                self._seconds += _NEWEST * (now - self._last - self._seconds)
            self._last = now
        else:
            walk.last = walk.last or Left("failed")
            self._observer.left("failed", 1)
        job.tell(walk.last)

    async def _visit(self, station: Station, walk: _Walk) -> None:
        """Until the station has handed the picture on, or told its last event."""
        lost = turn = 0
        while True:
            spec, preview = walk.spec, walk.job.preview and not walk.previewed
            try:
                seconds = walk.job.deadline - time.monotonic()
                async with aclosing(station.make(spec, preview, seconds)) as events:
                    async for event in events:
                        if not walk.begun:
                            walk.begun = 1
                            self._in_flight += 1
                        if walk.take(event):
                            return
            except ReplicaLostError as error:
                lost += 1
                if lost == _LIVES:
                    self._observer.failed(error)
                    walk.last = Left("failed")
                    return
            self.retried += 1
            await asyncio.sleep(_PAUSES[min(turn, len(_PAUSES) - 1)])
            turn += 1

    def close(self, timeout: float = 30.0) -> None:
        if self.state in ("starting", "ready"):
            self.state = "draining"
        end = time.monotonic() + timeout
        while self._tasks and time.monotonic() < end:
            time.sleep(0.01)
        self.state = "closed"
        if self._loop is not None and not self._loop.is_closed():
            for task in (*self._tasks, self._watch):
                if task is not None:
                    self._loop.call_soon_threadsafe(task.cancel)


class _Walk:
    """A picture on its way through the stations."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec = job, job.spec
        self.previewed, self.begun = False, 0
        self.last: Event | None = None

    def take(self, event: Event) -> bool:
        """Whether the station is done with the picture."""
        if isinstance(event, Preview):
            if not self.previewed:
                self.previewed = True
                self.job.tell(event)
            return False
        if isinstance(event, Handover):
            facts: dict[str, Any] = vars(self.job.spec)
            self.spec = HandedSpec(**facts, handover=event)
            return True
        if event == Left("closed"):  # that replica ends: another one takes it
            return False
        self.last = event
        return True
