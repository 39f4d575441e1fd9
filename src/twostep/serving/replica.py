"""One replica of a cluster: an engine in a process of its own, asked for a picture at a time.

Knows no cluster; what a deployment adds is in `on_ray.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping

from twostep.errors import InputError
from twostep.serving.engine import Engine
from twostep.serving.jobs import Event, Job, Left, NotReadyError, PictureSpec, Preview, StepModel
from twostep.serving.logs import log_error, log_to_stderr
from twostep.serving.metrics import Metrics


class Replica:
    """Loads its models before it takes a request.

    Args:
        load: gives the models, warmed up.
        line: pictures that it takes at one time; the cluster sends no more.

    Raises:
        RuntimeError: if the models cannot be loaded, with a sentence where one is known.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, StepModel]],
        *,
        line: int,
        max_batch: int,
        batch_wait: float,
    ) -> None:
        log_to_stderr()
        self.metrics = Metrics()
        self._engine = Engine(
            load, line=line, max_batch=max_batch, batch_wait=batch_wait, observer=self.metrics
        )
        self.metrics.watch(self._engine)
        self._engine.start()
        if not self._engine.wait_ready():
            error = self._engine.error
            if isinstance(error, InputError):
                raise RuntimeError(str(error))
            if error is not None:
                log_error("the models cannot be loaded", error)
            raise RuntimeError("the models cannot be loaded, the replica's log says why")

    async def make(
        self, spec: PictureSpec, preview: bool, seconds: float
    ) -> AsyncGenerator[Event, None]:
        """The events of one picture; none after its deadline, `seconds` from now.

        Leaves the engine between its steps when the caller goes.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(spec, tell=tell, preview=preview, deadline=time.monotonic() + seconds)
        until = loop.time() + seconds
        try:
            self._engine.submit([job])
            while True:
                async with asyncio.timeout_at(until):
                    event = await events.get()
                yield event
                if not isinstance(event, Preview):
                    return
        except TimeoutError:
            return
        except (KeyError, NotReadyError):  # another student's replica, or one that ends
            yield Left("closed")
        finally:
            job.cancel()

    async def left_early(self) -> dict[str, float]:
        """Pictures that left before they were done, by reason."""
        (family,) = self.metrics.left_early.collect()
        return {
            sample.labels["reason"]: sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    async def metrics_text(self) -> bytes:
        """For Prometheus."""
        return self.metrics.text()

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed: the cluster then starts another replica."""
        if self._engine.state == "failed":
            raise RuntimeError("the engine has failed, the replica's log says why")

    def close(self, seconds: float) -> None:
        """Finishes what it has."""
        self._engine.close(seconds)
