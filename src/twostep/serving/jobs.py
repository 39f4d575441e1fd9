"""One picture on its way through the engine, and what its client is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (H, W, 3)


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
class Left:
    """The picture will not be made: the model failed on it, or the engine was closed."""

    reason: Literal["failed", "closed"]


Event = Preview | Finished | Left


@dataclass(eq=False)
class Job:
    """A picture that was asked for.

    Attributes:
        tell: called on the engine's thread with each event; must not block.
        preview: whether a `Preview` is wanted.
        deadline: on `time.monotonic`'s clock; past it the picture is not made.
        group: what may share a batch with it; the model says.
    """

    spec: PictureSpec
    tell: Callable[[Event], None]
    preview: bool = False
    deadline: float = float("inf")
    submitted: float = field(default_factory=time.monotonic)
    group: Hashable = None
    _cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves before its next step. From any thread."""
        self._cancelled = True

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

    def finish(self, states: list[Any]) -> list[Finished]:
        """The pictures, after the last step."""
        ...


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
