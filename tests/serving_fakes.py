"""A model without weights for the server's tests: it writes down its batches and waits where told."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from twostep.errors import InputError
from twostep.serving.app import AppOptions, create_app
from twostep.serving.catalogue import Offer
from twostep.serving.engine import Engine
from twostep.serving.jobs import Event, Finished, Handover, Job, PictureSpec, Pixels
from twostep.serving.metrics import Metrics


class FakeModel:
    """A state is (seed, steps taken); a picture is of one colour, its seed and steps.

    Attributes:
        log: what ran, as (stage, seeds).
        gate: where cleared, the next stage waits; `reached` is set when one waits there.
    """

    def __init__(self, steps: int = 2, seconds: float = 0.0) -> None:
        self.steps, self.seconds = steps, seconds
        self.log: list[tuple[str, list[int]]] = []
        self.gate, self.reached = threading.Event(), threading.Event()
        self.gate.set()
        self.bad: set[int] = set()

    def _enter(self, stage: str, seeds: list[int]) -> None:
        if not self.gate.is_set():
            self.reached.set()
            assert self.gate.wait(20)
        self.log.append((stage, seeds))
        time.sleep(self.seconds)
        if stage != "preview" and self.bad & set(seeds):
            raise RuntimeError("secret detail of a bad seed")

    def group(self, spec: PictureSpec) -> Hashable:
        return spec.size

    def first(self, specs: list[PictureSpec]) -> list[Any]:
        self._enter("first", [spec.seed for spec in specs])
        return [(spec.seed, 1) for spec in specs]

    def advance(self, states: list[Any], step: int) -> list[Any]:
        assert all(taken == step for _, taken in states)
        self._enter(f"step {step}", [seed for seed, _ in states])
        return [(seed, taken + 1) for seed, taken in states]

    def preview(self, states: list[Any]) -> list[Pixels]:
        self._enter("preview", [seed for seed, _ in states])
        return [_colour(seed, taken) for seed, taken in states]

    def finish(self, states: list[Any]) -> list[Finished]:
        assert all(taken == self.steps for _, taken in states)
        self._enter("finish", [seed for seed, _ in states])
        return [Finished(_colour(seed, taken), 5, 16) for seed, taken in states]


class MortalModel(FakeModel):
    """Where `sentence` is there, removes it and dies in its step 1: one process of several."""

    def __init__(self, sentence: Path, seconds: float) -> None:
        super().__init__(2, seconds)
        self.sentence = sentence

    @staticmethod
    def load(sentence: Path, seconds: float) -> dict[str, FakeModel]:
        return {"a": MortalModel(sentence, seconds)}

    def first(self, specs: list[PictureSpec]) -> list[Any]:
        try:
            self.sentence.unlink()
        except FileNotFoundError:
            return super().first(specs)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class HandingModel(FakeModel):
    """One stage of a line of two: number 1 hands its step over, number 2 goes on from there."""

    @staticmethod
    def stage(number: int, seconds: float) -> dict[str, FakeModel]:
        return {"a": (HandingModel if number == 1 else HandedModel)(1, seconds)}

    def finish(self, states: list[Any]) -> list[Any]:
        self._enter("finish", [seed for seed, _ in states])
        packed = [(bytes([taken]), (1,), "uint8") for _, taken in states]
        return [Handover(each, each) for each in packed]


class HandedModel(FakeModel):
    """What `HandingModel` handed over."""

    def first(self, specs: list[PictureSpec]) -> list[Any]:
        self._enter("first", [spec.seed for spec in specs])
        return [(spec.seed, spec.handover.latents[0][0] + 1) for spec in specs]  # type: ignore[attr-defined]

    def finish(self, states: list[Any]) -> list[Finished]:
        self._enter("finish", [seed for seed, _ in states])
        return [Finished(_colour(seed, taken), 5, 16) for seed, taken in states]


def _colour(seed: int, taken: int) -> Pixels:
    return np.full((8, 8, 3), (seed % 256, taken, 0), dtype=np.uint8)


def job(
    seed: int,
    events: list[tuple[int, Event]],
    *,
    model: str = "a",
    size: tuple[int, int] = (8, 8),
    preview: bool = False,
    seconds: float = 60,
) -> Job:
    """A picture whose events are written down with its seed."""
    return Job(
        PictureSpec(model, "a cat", seed, size),
        tell=lambda event: events.append((seed, event)),
        preview=preview,
        deadline=time.monotonic() + seconds,
    )


@contextmanager
def running(
    models: Mapping[str, FakeModel], *, no_load: Exception | None = None, **options: Any
) -> Iterator[Engine]:
    """An engine that is ready."""

    def load() -> Mapping[str, FakeModel]:
        if no_load is not None:
            raise no_load
        return models

    engine = Engine(load, **{"batch_wait": 0.0} | options)
    engine.start()
    engine.wait_ready(10)
    try:
        yield engine
    finally:
        for model in models.values():
            model.gate.set()
        engine.close(10)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def offer(name: str, steps: int = 2) -> Offer:
    """Of a fake model: pictures of 8 x 8 to 64 x 64."""

    def check(size: tuple[int, int]) -> None:
        if any(side % 8 or not 8 <= side <= 64 for side in size):
            raise InputError(f"size: sides are multiples of 8 up to 64, got {size}")

    return Offer(name, "student", steps, (8, 8), "0123", False, 1, check)


@contextmanager
def served(
    engine: Engine,
    catalogue: Mapping[str, Offer],
    *,
    metrics: Metrics | None = None,
    **options: Any,
) -> Iterator[str]:
    """The application on a real uvicorn; gives its address."""
    metrics = metrics or Metrics()
    app = create_app(engine, catalogue, metrics=metrics, options=AppOptions(**options))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        assert engine.wait_ready(60) or engine.error is not None
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def broken(source: random.Random) -> bytes:
    """A body of a request with something changed."""
    value: dict[str, Any] = {"prompt": "a cat", "n": 1, "size": "8x8", "seed": 1, "stream": False}
    odd = [None, -1, 2**63, 1e308, "", "\x00", "x" * 200, [], {}, [[]], True, "NaN", "💥", 0.5]
    for _ in range(source.randrange(1, 4)):
        key = source.choice([*value, "prompt", "extra", "output_format", "partial_images", ""])
        value[key] = source.choice(odd)
    body = bytearray(json.dumps(value, allow_nan=True).encode())
    for _ in range(source.choice([0, 0, 1, 3])):
        body[source.randrange(len(body))] = source.randrange(256)
    if source.random() < 0.2:
        del body[source.randrange(len(body)) :]
    return bytes(body)
