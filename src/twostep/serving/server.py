"""The process: a socket, uvicorn, and an end that loses no picture."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import uvicorn

from twostep.errors import InputError
from twostep.runtime.signals import catch_signals
from twostep.serving.address import LOOPBACK, is_loopback, listen, url_of
from twostep.serving.app import AppOptions, create_app
from twostep.serving.catalogue import Catalogue
from twostep.serving.engine import Engine
from twostep.serving.jobs import StepModel
from twostep.serving.logs import log, log_error, log_to_stderr
from twostep.serving.metrics import Metrics


@dataclass(frozen=True)
class ServerOptions:
    """Where it listens, and how it makes batches.

    Attributes:
        port: 0 for a free one.
        line, max_batch, batch_wait: as `Engine` has them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    line: int = 64
    max_batch: int = 8
    batch_wait: float = 0.004
    app: AppOptions = field(default_factory=AppOptions)


def check_open(options: ServerOptions) -> None:
    """Raises InputError if others than this machine could come in without a key."""
    if not is_loopback(options.host) and not options.app.keys:
        raise InputError(
            f"--host: {options.host} can be reached from other machines, which needs keys: "
            "--api-keys FILE or the variable TWOSTEP_API_KEY"
        )


def under_own_names(options: ServerOptions) -> AppOptions:
    """The application's options; without keys it answers under this machine's names alone."""
    if options.app.keys:
        return options.app
    return replace(options.app, hosts={*LOOPBACK, options.host.lower()})


def serve(
    load: Callable[[], Mapping[str, StepModel]],
    catalogue: Catalogue,
    options: ServerOptions,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or SIGINT; then takes no more, and ends with the last picture.

    Args:
        load: gives the models, warmed up.
        on_ready: called with the address once pictures can be made.

    Raises:
        InputError: if the address cannot be listened on.
        Exception: what `load` raised.
    """
    check_open(options)
    log_to_stderr()
    metrics = Metrics()
    engine = Engine(
        load, line=options.line, max_batch=options.max_batch, batch_wait=options.batch_wait,
        observer=metrics,
    )  # fmt: skip
    app_options = under_own_names(options)
    listening = listen(options.host, options.port)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, catalogue, metrics=metrics, options=app_options),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
            timeout_keep_alive=10,
            timeout_graceful_shutdown=int(app_options.drain_seconds) + 1,
        )
    )
    url = url_of(options.host, listening)

    def watch() -> None:
        if engine.wait_ready():
            log("ready", url=url, models=list(catalogue))
            on_ready(url)
        elif engine.error is not None:
            server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    log("starting", url=url, models=list(catalogue))
    with catch_signals():  # uvicorn raises them again when it has ended
        server.run(sockets=[listening])
    log("ended")
    if engine.error is not None:
        if not isinstance(engine.error, InputError):
            log_error("the models cannot be loaded", engine.error)
        raise engine.error
