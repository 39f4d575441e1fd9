"""The application: routes, the door before them, the page. Knows no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request

import twostep
from twostep.serving.catalogue import Catalogue
from twostep.serving.door import Application, Door, json_answer
from twostep.serving.errors import ApiError, failed, not_ready
from twostep.serving.images_api import images_api
from twostep.serving.jobs import Maker
from twostep.serving.keys import Keys
from twostep.serving.metrics import Metrics
from twostep.serving.requests import Limits
from twostep.serving.runs import RunReader, runs_api

_PAGE = Path(__file__).with_name("page")
# Nothing from other servers, and nothing inline.
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


@dataclass(frozen=True)
class AppOptions:
    """What the application is told besides its models.

    Attributes:
        hosts: names by which a server without keys answers; None for any.
        runs: a run's folder, or one of them, whose trainings are shown at `/runs`.
        drain_seconds: for the pictures in line when it ends.
    """

    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    hosts: Collection[str] | None = None
    log_prompts: bool = False
    runs: Path | None = None
    drain_seconds: float = 30.0


def create_app(
    engine: Maker, catalogue: Catalogue, *, metrics: Metrics, options: AppOptions | None = None
) -> Application:
    """An ASGI application that starts `engine` when it starts, and closes it when it ends."""
    options = options or AppOptions()
    metrics.watch(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close, options.drain_seconds)

    app = FastAPI(
        title="twostep",
        version=twostep.__version__,
        description="OpenAI's images API over models of two steps.",
        lifespan=lifespan,
        docs_url=None,  # those pages ask other servers for their scripts
        redoc_url=None,
        exception_handlers={
            ApiError: _refuse,
            HTTPException: _not_found,
            Exception: _fail,
        },
    )
    app.include_router(
        images_api(
            engine,
            catalogue,
            limits=options.limits,
            metrics=metrics,
            log_prompts=options.log_prompts,
        )
    )
    _add_models(app, catalogue)
    _add_state(app, engine, metrics)
    _add_page(app, runs=options.runs)
    return Door(
        app,
        keys=options.keys,
        limits=options.limits,
        metrics=metrics,
        busy=engine.busy,
        hosts=options.hosts,
    )


def _add_models(app: FastAPI, catalogue: Catalogue) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """What can be asked for; the first is the default."""
        return {"object": "list", "data": [offer.as_json() for offer in catalogue.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        if name not in catalogue:
            raise ApiError(404, "model_not_found", f"no model {name[:80]!r} here", "model")
        return catalogue[name].as_json()


def _add_state(app: FastAPI, engine: Maker, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process works."""
        if engine.state == "failed":
            raise not_ready("failed")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Whether it takes requests: models loaded and warm, not ending."""
        if engine.state != "ready":
            raise not_ready(engine.state)
        return {"status": "ready"}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, *, runs: Path | None) -> None:
    def answer(name: str) -> Response:
        path = _PAGE / name
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return FileResponse(path, media_type=_KINDS[path.suffix], headers=headers)

    names = {path.name for path in _PAGE.glob("*") if path.suffix in _KINDS}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return answer("index.html")

    if reader := RunReader.of(runs):
        app.include_router(runs_api(reader))

        @app.get("/runs", include_in_schema=False)
        async def runs_page() -> Response:
            return answer("runs.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in names:
            raise ApiError(404, "not_found", "no such page")
        return answer(name)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope["state"]["code"] = error.code
    body, headers = json_answer(error)
    return Response(body, error.status, headers=headers)


async def _fail(request: Request, error: Exception) -> Response:
    """What it was goes on to the door, which writes it into the log."""
    return await _refuse(request, failed())


async def _not_found(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return await _refuse(request, ApiError(error.status_code, code, error.detail, headers=headers))
