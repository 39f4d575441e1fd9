"""Every request's way in and out: its id, host and key, the log's line, and no traceback out."""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from twostep.serving.errors import ApiError, failed, full
from twostep.serving.keys import Keys
from twostep.serving.logs import log, log_error
from twostep.serving.metrics import Metrics
from twostep.serving.requests import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

PICTURES = "/v1/images/generations"
# Open to everybody: whether it runs, and a page that holds no secret.
_PUBLIC = re.compile(r"/|/runs|/health|/ready|/page/[\w.-]+")
_ID = re.compile(r"[\w.-]{1,64}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class ClientGoneError(Exception):
    """The client went before its answer, or does not take it."""


def json_answer(error: ApiError) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an error's answer."""
    headers = {"Content-Type": "application/json", **error.headers}
    return json.dumps(error.as_json(), ensure_ascii=False).encode(), headers


class Door:
    """ASGI middleware around the application.

    Args:
        busy: seconds to come back after where no picture can be taken, else None; asked before
            a body is read, so that a flood costs little.
        hosts: names by which a server without keys answers, so that no page of the web can reach
            it under a name of its own; None for any.
    """

    def __init__(
        self,
        app: Application,
        *,
        keys: Keys,
        limits: Limits,
        metrics: Metrics,
        busy: Callable[[], float | None],
        hosts: Collection[str] | None,
    ) -> None:
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self.busy, self.hosts, self._open = busy, hosts, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = _Visit(scope, send, self.limits.send_seconds)
        self._open += 1
        try:
            self._check(scope, visit.headers)
            await self.app(scope, receive, visit.send)
        except ApiError as error:
            await visit.refuse(error)
        except ClientGoneError:
            visit.outcome(499, "client_gone")
        except asyncio.CancelledError:
            visit.outcome(499, "client_gone")
            raise
        except Exception as error:
            log_error("a request failed", error, request_id=visit.request_id)
            await visit.refuse(failed())
        finally:
            self._open -= 1
            self._note(scope, visit)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        public = _PUBLIC.fullmatch(scope["path"])
        if self._open > self.limits.open_requests and not public:  # probes are answered always
            raise ApiError(
                429, "too_many_requests", "too many requests are open", headers={"Retry-After": "1"}
            )
        if self.hosts is not None:
            host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1"))
            if host.lower() not in self.hosts:
                message = "without keys this server answers under its own address alone"
                raise ApiError(403, "wrong_host", message)
        if not public:
            given = headers.get(b"authorization")
            if not self.keys.allow(None if given is None else given.decode("latin-1")):
                message = "expected a header `Authorization: Bearer KEY` with a key of this server"
                raise ApiError(
                    401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"}
                )
        if scope["path"] == PICTURES and scope["method"] == "POST":
            seconds = self.busy()
            if seconds is not None:
                raise full(seconds)

    def _note(self, scope: Scope, visit: _Visit) -> None:
        facts = scope["state"]
        if visit.code is not None:
            facts["code"] = visit.code
        if "code" in facts:
            self.metrics.refusals.labels(facts["code"]).inc()
        seconds = time.monotonic() - visit.started
        self.metrics.latency.labels(str(visit.status)).observe(seconds)
        log(
            "request", request_id=visit.request_id, method=scope["method"], path=scope["path"],
            status=visit.status, ms=round(1000 * seconds, 1), **facts,
        )  # fmt: skip


class _Visit:
    """One request: what is known of it and what was sent."""

    def __init__(self, scope: Scope, send: Send, send_seconds: float) -> None:
        self.headers = dict(scope["headers"])
        self._send, self._send_seconds = send, send_seconds
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        # What the application adds to the log's line; `state` is Starlette's request.state.
        scope["state"] = {}
        self.started = time.monotonic()
        self.status, self._begun = 0, False
        self.code: str | None = None

    def outcome(self, status: int, code: str) -> None:
        self.status, self.code = status, code

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Passes a message on; a client that does not take it in time is gone."""
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            present = {name for name, _ in message["headers"]}
            more = [header for header in _HEADERS if header[0] not in present]
            own = [*more, (b"x-request-id", self.request_id.encode())]
            message = {**message, "headers": [*message["headers"], *own]}
        try:
            async with asyncio.timeout(self._send_seconds):
                await self._send(message)
        except TimeoutError:
            raise ClientGoneError from None

    async def refuse(self, error: ApiError) -> None:
        """Answers with the error, unless an answer has begun: then it ends there."""
        self.code = error.code
        if self._begun:
            return
        body, headers = json_answer(error)
        headers["Content-Length"] = str(len(body))
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        try:
            start = {"type": "http.response.start", "status": error.status, "headers": raw}
            await self.send(start)
            await self.send({"type": "http.response.body", "body": body})
        except ClientGoneError:
            self.outcome(499, "client_gone")
