"""`POST /v1/images/generations`: one answer with all pictures, or a stream with a preview."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from twostep.serving.catalogue import Catalogue
from twostep.serving.clients import EventStream, read_body, while_there
from twostep.serving.door import PICTURES
from twostep.serving.errors import ApiError, failed
from twostep.serving.jobs import Finished, Maker, Pixels, Preview
from twostep.serving.logs import log_error
from twostep.serving.metrics import Metrics
from twostep.serving.order import Order
from twostep.serving.pictures import as_base64, encode_picture
from twostep.serving.requests import GenerationBody, ImageRequest, Limits, read_request

_EVENT = "image_generation"
_BODY = {"application/json": {"schema": GenerationBody.model_json_schema()}}


def images_api(
    engine: Maker,
    catalogue: Catalogue,
    *,
    limits: Limits,
    metrics: Metrics,
    log_prompts: bool = False,
) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post(
        PICTURES,
        openapi_extra={"requestBody": {"required": True, "content": _BODY}},
    )
    async def generate(request: Request) -> Response:
        """Pictures of a prompt."""
        body = await read_body(request, limits)
        asked = read_request(body, catalogue=catalogue, limits=limits)
        facts = request.scope["state"]
        facts |= {"model": asked.offer.name, "size": asked.size_text, "n": asked.n}
        facts |= {"stream": asked.stream} | ({"prompt": asked.prompt} if log_prompts else {})
        order = Order(
            engine, asked.specs(), preview=asked.partial_images > 0, seconds=limits.deadline
        )
        order.submit()
        handed_on = False
        try:
            if not asked.stream:
                answer = await while_there(request, _answer(asked, order))
                return Response(answer, media_type="application/json")
            # The status waits for the first event: a deadline passed in line is a 504.
            first = await while_there(request, order.next())
            handed_on = True
            return EventStream(_events(asked, order, first[1], metrics=metrics, state=facts))
        finally:
            if not handed_on:
                order.cancel()

    return router


async def _answer(asked: ImageRequest, order: Order) -> bytes:
    done = await order.pictures()
    return await asyncio.to_thread(_answer_body, asked, done)


def _answer_body(asked: ImageRequest, done: list[Finished]) -> bytes:
    data = []
    for index, each in enumerate(done):
        seed = asked.seed + index
        picture = _picture(asked, each.pixels, seed)
        if asked.as_url:
            data.append({"url": f"data:image/{asked.output_format};base64,{picture}", "seed": seed})
        else:
            data.append({"b64_json": picture, "seed": seed})
    body = {"created": int(time.time()), "data": data, **_about(asked), "usage": _usage(done)}
    return json.dumps(body).encode()


async def _events(
    asked: ImageRequest,
    order: Order,
    first: Preview | Finished,
    *,
    metrics: Metrics,
    state: dict[str, Any],
) -> AsyncGenerator[bytes]:
    """Server-sent events; one that goes wrong is the last and says so."""
    event = first
    try:
        while True:
            name, more = _named(asked, event)
            yield await asyncio.to_thread(_event, asked, event.pixels, name, more)
            if isinstance(event, Finished):
                return
            metrics.previews.inc()
            event = (await order.next())[1]
    except ApiError as error:
        state["code"] = error.code
        yield _sse("error", {"type": "error", **error.as_json()})
    except Exception as error:
        log_error("a stream failed", error)
        state["code"] = failed().code
        yield _sse("error", {"type": "error", **failed().as_json()})
    finally:
        order.cancel()


def _named(asked: ImageRequest, event: Preview | Finished) -> tuple[str, dict[str, Any]]:
    if isinstance(event, Preview):
        return f"{_EVENT}.partial_image", {"partial_image_index": 0}
    return f"{_EVENT}.completed", {"usage": _usage([event])}


def _event(asked: ImageRequest, pixels: Pixels, name: str, more: dict[str, Any]) -> bytes:
    picture = _picture(asked, pixels, asked.seed)
    value = {"type": name, "b64_json": picture, "created_at": int(time.time())}
    return _sse(name, value | _about(asked) | {"seed": asked.seed} | more)


def _sse(name: str, value: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def _picture(asked: ImageRequest, pixels: Pixels, seed: int) -> str:
    data = encode_picture(
        pixels,
        asked.output_format,
        compression=asked.output_compression,
        facts=asked.facts(seed),
    )
    return as_base64(data)


def _about(asked: ImageRequest) -> dict[str, Any]:
    return {
        "size": asked.size_text,
        "quality": "auto",
        "background": "opaque",
        "output_format": asked.output_format,
    }


def _usage(done: list[Finished]) -> dict[str, Any]:
    text, image = done[0].text_tokens, sum(each.image_tokens for each in done)
    return {
        "input_tokens": text,
        "input_tokens_details": {"text_tokens": text, "image_tokens": 0},
        "output_tokens": image,
        "total_tokens": text + image,
    }
