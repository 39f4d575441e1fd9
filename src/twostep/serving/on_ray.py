"""The application on Ray Serve: a front that holds no model, and replicas that share the work.

The front is the same application as one process has, with `RemoteEngine` in the engine's place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from twostep.serving.app import AppOptions, create_app
from twostep.serving.catalogue import Catalogue
from twostep.serving.door import Application
from twostep.serving.jobs import Event, PictureSpec, StepModel
from twostep.serving.logs import log_to_stderr
from twostep.serving.metrics import Metrics
from twostep.serving.remote import RemoteEngine, ReplicaLostError
from twostep.serving.replica import Replica

APP, FRONT = "twostep", "front"
Load = Callable[[], Mapping[str, StepModel]]


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas, and what each is given.

    Attributes:
        replicas: of each stage.
        autoscale: (least, most) replicas, in place of `replicas`.
        gpus, cpus: of each replica; a share below 1 puts several on one.
        line: pictures that may wait besides those that all replicas may have.
        upscale_seconds, downscale_seconds: for which the queue is long, or short, before replicas
            are added, or ended.
        health_seconds: between two looks at a replica.
    """

    replicas: int = 1
    autoscale: tuple[int, int] | None = None
    gpus: float = 0.0
    cpus: float = 1.0
    line: int = 64
    max_batch: int = 8
    batch_wait: float = 0.004
    upscale_seconds: float = 5.0
    downscale_seconds: float = 300.0
    health_seconds: float = 5.0
    app: AppOptions = field(default_factory=AppOptions)

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscale is None else self.autoscale[1]

    @property
    def taken(self) -> int:
        """Pictures that a replica has at most: a batch in work, and the next one."""
        return 2 * self.max_batch


def build(
    stages: Mapping[str, Load], catalogue: Callable[[], Catalogue], options: ClusterOptions
) -> serve.Application:
    """The application, to be run by Ray Serve.

    Args:
        stages: what loads the models of each stage's replicas, in the order of a picture's way:
            one for whole models. Called in the replicas, as `catalogue` is in the front.
    """
    stations = [_station(name, load, options) for name, load in stages.items()]
    front = serve.deployment(
        name=FRONT,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=options.app.limits.open_requests + 16,  # the door refuses by itself
        graceful_shutdown_timeout_s=options.app.drain_seconds,
        health_check_period_s=options.health_seconds,
        max_surge_percent=100,
        logging_config=_quiet(),
    )(serve.ingress()(Front))
    return front.bind(catalogue, options, *stations)


def _station(name: str, load: Load, options: ClusterOptions) -> serve.Application:
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.autoscale is not None:
        least, most = options.autoscale
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                target_ongoing_requests=options.max_batch,
                upscale_delay_s=options.upscale_seconds,
                downscale_delay_s=options.downscale_seconds,
                look_back_period_s=max(1.0, options.upscale_seconds),
            )
        }
    deployment = serve.deployment(
        name=name,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        max_ongoing_requests=options.taken,
        graceful_shutdown_timeout_s=options.app.drain_seconds,
        health_check_period_s=options.health_seconds,
        max_surge_percent=100,  # a new student: the old ones serve until it is ready
        logging_config=_quiet(),
        **scaling,
    )(Replica)
    # Room for pictures that were cancelled and have not left yet.
    line = 2 * options.taken
    return deployment.bind(
        load, line=line, max_batch=options.max_batch, batch_wait=options.batch_wait
    )


def _quiet() -> LoggingConfig:
    """The door writes the log of requests."""
    return LoggingConfig(enable_access_log=False, log_level="WARNING")


class Front:
    """The door, the API and the page; every picture is made by a replica."""

    def __init__(
        self,
        catalogue: Callable[[], Catalogue],
        options: ClusterOptions,
        *handles: DeploymentHandle,
    ) -> None:
        log_to_stderr()
        self.metrics = Metrics()
        held = options.most_replicas * options.taken * len(handles)
        self.engine = RemoteEngine(
            [RayStation(handle) for handle in handles],
            line=options.line + held,
            observer=self.metrics,
        )
        self._catalogue, self._options = catalogue, options

    def __serve_build_asgi_app__(self) -> Application:  # Ray Serve's own name for it
        return create_app(
            self.engine, self._catalogue(), metrics=self.metrics, options=self._options.app
        )

    async def drain(self) -> None:
        """Takes no more, and returns when what it has is done."""
        await asyncio.to_thread(self.engine.close, self._options.app.drain_seconds)


class RayStation:
    """The replicas of one deployment."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._ask = handle.options(stream=True).make
        self._about = handle.left_early

    async def ready(self) -> None:
        while True:
            try:
                await self._about.remote()
                return
            except (RayError, RayServeException):
                await asyncio.sleep(0.5)

    async def make(
        self, spec: PictureSpec, preview: bool, seconds: float
    ) -> AsyncGenerator[Event, None]:
        answer = self._ask.remote(spec, preview, seconds)
        try:
            async for event in answer:
                yield event
        except RayActorError as error:  # died, or cannot be reached
            raise ReplicaLostError(str(error)) from error
        finally:
            with suppress(Exception):
                answer.cancel()
