"""One picture on its way through the engine, and what its client is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

EngineState = Literal["starting", "ready", "failed", "draining", "closed"]
Pixels = NDArray[np.uint8]  # (H, W, 3)
# Bytes of a tensor, its shape and the name of its dtype: numpy knows no bf16.
Packed = tuple[bytes, tuple[int, ...], str]


@dataclass(frozen=True)
class PictureSpec:
    """What decides a picture: the same one, alone or in any batch.

    Attributes:
        size: (height, width) in pixels.
    """

    model: str
    prompt: str
    seed: int
    size: tuple[int, int]


@dataclass(frozen=True)
class HandedSpec(PictureSpec):
    """A picture whose step 1 was made elsewhere."""

    handover: Handover


@dataclass(frozen=True)
class Preview:
    """What step 1 points to."""

    pixels: Pixels


@dataclass(frozen=True)
class Finished:
    """The picture, and how many tokens its prompt and itself have."""

    pixels: Pixels
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Handover:
    """What lies between the steps, for whoever makes step 2.

    Attributes:
        latents: (C, H, W).
        embeds: (tokens, D).
    """

    latents: Packed
    embeds: Packed


@dataclass(frozen=True)
class Left:
    """The picture will not be made: the model failed on it, or the engine was closed."""

    reason: Literal["failed", "closed"]


Event = Preview | Finished | Handover | Left


@dataclass(eq=False)
class Job:
    """A picture that was asked for.

    Attributes:
        tell: called on the engine's thread with each event; must not block.
        preview: whether a `Preview` is wanted.
        deadline: on `time.monotonic`'s clock; past it the picture is not made.
        group: what may share a batch with it; the model says.
        on_cancel: called by `cancel`, where whoever makes the picture has to be told.
    """

    spec: PictureSpec
    tell: Callable[[Event], None]
    preview: bool = False
    deadline: float = float("inf")
    submitted: float = field(default_factory=time.monotonic)
    group: Hashable = None
    on_cancel: Callable[[], object] | None = None
    _cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves before its next step. From any thread."""
        self._cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    def gone(self, now: float) -> bool:
        """Whether it is cancelled or past its deadline."""
        return self._cancelled or now >= self.deadline


class StepModel(Protocol):
    """A model in steps, each over a batch; what lies between the steps is one state a picture.

    Attributes:
        steps: how many, at least 1.
    """

    steps: int

    def group(self, spec: PictureSpec) -> Hashable:
        """Equal for pictures that can share a batch."""
        ...

    def first(self, specs: list[PictureSpec]) -> list[Any]:
        """Step 1, from the prompts and seeds; a state for each."""
        ...

    def advance(self, states: list[Any], step: int) -> list[Any]:
        """Step number `step`, counted from 0, so at least 1."""
        ...

    def preview(self, states: list[Any]) -> list[Pixels]:
        """Pictures of what step 1 points to."""
        ...

    def finish(self, states: list[Any]) -> Sequence[Finished | Handover]:
        """The pictures, after the last step; or what the next stage of a line is given."""
        ...


class Maker(Protocol):
    """Makes pictures: an engine in this process, or replicas elsewhere.

    Attributes:
        state: as `Engine` has it.
        waiting: pictures in line.
        in_flight: pictures on their way.
    """

    @property
    def state(self) -> EngineState: ...

    @property
    def waiting(self) -> int: ...

    @property
    def in_flight(self) -> int: ...

    def start(self) -> None:
        """Begins; returns at once."""
        ...

    def busy(self) -> float | None:
        """Seconds after which to come back if the line is full; None if there is room."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all of `jobs` in line, or none.

        Raises:
            FullError: if there is no room for all.
            NotReadyError: if it takes none.
        """
        ...

    def close(self, timeout: float = 30.0) -> None:
        """Takes no more, finishes what it has, at most for `timeout` seconds, and ends."""
        ...


class FullError(Exception):
    """The line is full.

    Attributes:
        retry_after: seconds after which about half of it will be gone.
    """

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the line is full, try again in {retry_after:.1f} s")
        self.retry_after = retry_after


class NotReadyError(Exception):
    """The engine is starting, ending or has failed."""


class Observer:
    """Is told what the engine does; this one does nothing with it."""

    def batch(self, stage: str, pictures: int, seconds: float) -> None:
        """A batch went through `first`, `second`, `later`, `preview` or `decode`."""

    def waited(self, seconds: float) -> None:
        """A picture waited so long for its first step."""

    def left(self, reason: str, pictures: int) -> None:
        """Pictures left: gone_before_step1, gone_between_steps, failed or closed."""

    def finished(self, model: str, pictures: int) -> None:
        """Pictures were made."""

    def failed(self, error: Exception) -> None:
        """The model raised."""
