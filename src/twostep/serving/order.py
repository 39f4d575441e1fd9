"""A request's pictures, from the engine's thread into the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from twostep.serving.errors import failed, full, not_ready, too_late
from twostep.serving.jobs import (
    Event,
    Finished,
    FullError,
    Handover,
    Job,
    Left,
    Maker,
    NotReadyError,
    PictureSpec,
    Preview,
)


class Order:
    """Pictures in the engine; whoever makes one also cancels it in the end.

    Args:
        seconds: until the deadline.
    """

    def __init__(
        self, engine: Maker, specs: Sequence[PictureSpec], *, preview: bool, seconds: float
    ) -> None:
        self._engine, self._seconds = engine, seconds
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._until = self._loop.time() + seconds
        deadline = time.monotonic() + seconds
        self._jobs = [
            Job(spec, tell=self._teller(index), preview=preview, deadline=deadline)
            for index, spec in enumerate(specs)
        ]

    def _teller(self, index: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return tell

    def submit(self) -> None:
        """Puts the pictures in line.

        Raises:
            ApiError: 429 if there is no room for all, 503 if the engine takes none.
        """
        try:
            self._engine.submit(self._jobs)
        except FullError as error:
            raise full(error.retry_after) from None
        except NotReadyError:
            raise not_ready(self._engine.state) from None

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self._jobs:
            job.cancel()

    async def next(self) -> tuple[int, Preview | Finished]:
        """The next event, and which picture it is of.

        Raises:
            ApiError: 504 past the deadline, 500 or 503 if the picture will not come.
        """
        try:
            async with asyncio.timeout_at(self._until):
                index, event = await self._events.get()
        except TimeoutError:
            raise too_late(self._seconds) from None
        if isinstance(event, Left):
            raise failed() if event.reason == "failed" else not_ready("closing")
        assert not isinstance(event, Handover)  # that one goes to the next replica of a line
        return index, event

    async def pictures(self) -> list[Finished]:
        """All of them, in order."""
        found: dict[int, Finished] = {}
        while len(found) < len(self._jobs):
            index, event = await self.next()
            if isinstance(event, Finished):
                found[index] = event
        return [found[index] for index in range(len(self._jobs))]
