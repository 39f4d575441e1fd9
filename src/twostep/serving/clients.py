"""A client's side of a request: its body within limits, its leaving, a stream of events to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from twostep.serving.door import ClientGoneError
from twostep.serving.errors import ApiError
from twostep.serving.requests import Limits

T = TypeVar("T")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, JSON by its own account.

    Raises:
        ApiError: 408 if it comes too slowly, 413 if it is too large, 415 if it is something else.
        ClientGoneError: if the client went before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != (
        "identity"
    ):
        message = "expected Content-Type: application/json, not compressed"
        raise ApiError(415, "unsupported_media_type", message)
    length = request.headers.get("content-length", "0")
    too_large = ApiError(413, "body_too_large", f"at most {limits.body_bytes} bytes")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body did not come within {limits.body_seconds:g} s"
        raise ApiError(408, "body_too_slow", message) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    return bytes(body)


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes; the body must be read.

    Raises:
        ClientGoneError: if it goes first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; unlike Starlette's stream it ends when the client goes, not at the next
    event, so that a picture between its steps is given up at once."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def all_events() -> None:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        async with aclosing(self._events):
            try:
                await while_there(Request(scope, receive), all_events())
            except ClientGoneError:
                scope["state"]["code"] = "client_gone"
