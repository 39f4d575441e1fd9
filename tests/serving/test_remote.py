"""Pictures made elsewhere: replicas that die, end or are slow, without a cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from serving_fakes import FakeModel, job
from twostep.serving.jobs import (
    Event,
    Finished,
    FullError,
    HandedSpec,
    Handover,
    Left,
    NotReadyError,
    PictureSpec,
    Preview,
)
from twostep.serving.remote import RemoteEngine, ReplicaLostError
from twostep.serving.replica import Replica

PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
DONE, PREVIEW = Finished(PIXELS, 1, 1), Preview(PIXELS)
HANDOVER = Handover((b"", (0,), "float32"), (b"", (0,), "float32"))
LOST = ReplicaLostError("killed")


class Script:
    """A station that answers its calls one after another as told; an exception is raised."""

    def __init__(self, *answers: list[Event | Exception | float]) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[PictureSpec, bool]] = []
        self.cancelled = 0

    async def make(
        self, spec: PictureSpec, preview: bool, seconds: float
    ) -> AsyncGenerator[Event, None]:
        self.calls.append((spec, preview))
        assert 0 < seconds < 61
        try:
            for event in self.answers.pop(0):
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, float):
                    await asyncio.sleep(event)
                else:
                    yield event
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def ready(self) -> None:
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 20))  # type: ignore[arg-type]


async def idle(engine: RemoteEngine) -> None:
    while engine.waiting or engine.in_flight:
        await asyncio.sleep(0.005)


def events_of(*stations: Script, preview: bool = True, seconds: float = 60) -> list[Event]:
    found: list[tuple[int, Event]] = []

    async def test() -> None:
        engine = RemoteEngine(stations, line=4)
        engine.start()
        engine.submit([job(7, found, preview=preview, seconds=seconds)])
        await idle(engine)

    run(test)
    return [event for _, event in found]


def test_a_lost_replica_costs_a_second_call_and_no_second_preview() -> None:
    station = Script([PREVIEW, LOST], [DONE])
    assert events_of(station) == [PREVIEW, DONE]
    assert [preview for _, preview in station.calls] == [True, False]
    assert station.calls[0][0] == station.calls[1][0]


def test_a_picture_that_kills_its_replicas_is_given_up() -> None:
    station = Script([LOST], [LOST], [LOST], [DONE])
    assert events_of(station) == [Left("failed")]
    assert len(station.calls) == 3


def test_a_replica_that_ends_is_no_death() -> None:
    station = Script(*[[Left("closed")] for _ in range(5)], [DONE])
    assert events_of(station) == [DONE]


def test_what_the_model_fails_on_is_not_tried_again() -> None:
    station = Script([Left("failed")], [DONE])
    assert events_of(station) == [Left("failed")]
    assert len(station.calls) == 1


def test_a_line_of_two_hands_over_and_repeats_only_the_stage_that_died() -> None:
    first, second = Script([PREVIEW, HANDOVER]), Script([LOST], [DONE])
    assert events_of(first, second) == [PREVIEW, DONE]
    assert len(first.calls) == 1
    for spec, _ in second.calls:
        assert isinstance(spec, HandedSpec)
        assert spec.handover is HANDOVER
        assert spec.seed == 7


def test_past_the_deadline_nothing_is_told_and_the_call_is_given_up() -> None:
    station = Script([PREVIEW, 30.0, DONE])
    started = time.monotonic()
    assert events_of(station, seconds=0.1) == [PREVIEW]
    assert station.cancelled == 1
    assert time.monotonic() - started < 5


def test_a_cancelled_picture_ends_its_call() -> None:
    station, found = Script([PREVIEW, 30.0, DONE]), []

    async def test() -> None:
        engine = RemoteEngine([station], line=4)
        engine.start()
        asked = job(1, found, preview=True)
        engine.submit([asked])
        while not found:
            await asyncio.sleep(0.005)
        assert (engine.waiting, engine.in_flight) == (0, 1)
        asked.cancel()
        await idle(engine)
        assert station.cancelled == 1

    run(test)


def test_the_line_is_bounded_and_the_end_waits_for_what_is_open() -> None:
    station, found = Script(*[[0.1, DONE] for _ in range(3)]), []

    async def test() -> None:
        engine = RemoteEngine([station], line=3)
        engine.start()
        assert engine.busy() is None
        engine.submit([job(seed, found) for seed in range(2)])
        with pytest.raises(FullError) as full:
            engine.submit([job(seed, found) for seed in range(2)])
        assert full.value.retry_after >= 1
        engine.submit([job(2, found)])
        assert engine.busy() is not None
        await asyncio.to_thread(engine.close, 10)
        assert engine.state == "closed"
        assert sorted(seed for seed, _ in found) == [0, 1, 2]
        with pytest.raises(NotReadyError):
            engine.submit([job(3, found)])

    run(test)


def test_it_is_ready_when_all_stations_are_and_takes_pictures_before() -> None:
    class Late(Script):
        async def ready(self) -> None:
            await gate.wait()

    station, found, gate = Late([DONE]), [], asyncio.Event()

    async def test() -> None:
        engine = RemoteEngine([station], line=3)
        engine.start()
        engine.submit([job(0, found)])
        await idle(engine)
        assert (engine.state, [event for _, event in found]) == ("starting", [DONE])
        gate.set()
        await asyncio.sleep(0.01)
        assert engine.state == "ready"

    run(test)


def test_a_replica_makes_pictures_and_lets_go_of_those_nobody_waits_for() -> None:
    model = FakeModel()
    spec = PictureSpec("a", "a cat", 3, (8, 8))

    async def test() -> None:
        replica = Replica(lambda: {"a": model}, line=8, max_batch=4, batch_wait=0.0)
        kinds = [type(event) async for event in replica.make(spec, True, 10.0)]
        assert kinds == [Preview, Finished]
        other = PictureSpec("b", "of another student", 3, (8, 8))
        assert [event async for event in replica.make(other, True, 10.0)] == [Left("closed")]
        model.gate.clear()
        asked = replica.make(spec, True, 10.0)
        waiting = asyncio.ensure_future(anext(asked))
        assert await asyncio.to_thread(model.reached.wait, 10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        model.gate.set()
        while (await replica.left_early()) != {"gone_between_steps": 1.0}:
            await asyncio.sleep(0.005)
        replica.check_health()
        replica.close(5)
        assert [event async for event in replica.make(spec, True, 10.0)] == [Left("closed")]

    run(test)
    assert [stage for stage, _ in model.log] == ["first", "preview", "step 1", "finish", "first"]


def test_a_replica_without_models_does_not_start() -> None:
    def load() -> Any:
        raise ValueError("a secret path")

    with pytest.raises(RuntimeError, match="cannot be loaded") as error:
        Replica(load, line=8, max_batch=4, batch_wait=0.0)
    assert "secret" not in str(error.value)
