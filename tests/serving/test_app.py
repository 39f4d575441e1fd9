"""The application over a real uvicorn: OpenAI's own client, and clients that do not behave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest
from PIL import Image

from serving_fakes import FakeModel, broken, offer, running, served, until
from twostep.serving.door import Door
from twostep.serving.engine import Engine
from twostep.serving.keys import Keys
from twostep.serving.metrics import Metrics
from twostep.serving.requests import Limits

KEY = "a-key-of-this-test"
CATALOGUE = {"s": offer("s"), "t": offer("t", 8)}


@contextmanager
def fake_server(
    *, keys: tuple[str, ...] = (), limits: Limits | None = None, **options: Any
) -> Iterator[tuple[str, Engine, FakeModel]]:
    model, metrics = FakeModel(), Metrics()
    with running({"s": model, "t": FakeModel(8)}, observer=metrics, **options) as engine:
        engine.start = lambda: None  # it runs already
        with served(
            engine,
            CATALOGUE,
            metrics=metrics,
            keys=Keys(keys),
            limits=limits or Limits(),
            hosts={"127.0.0.1"},
        ) as url:
            yield url, engine, model
            model.gate.set()


def client(url: str, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


def ask(
    url: str, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    """Status, body (JSON read) and headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    kind = {} if data is None else {"Content-Type": "application/json"}
    names = {k.replace("_", "-"): v for k, v in headers.items()}
    request = Request(url + path, data, kind | names, method=method)
    try:
        with urlopen(request, timeout=20) as answer:
            status, text, found = answer.status, answer.read(), dict(answer.headers)
    except HTTPError as error:
        status, text, found = error.code, error.read(), dict(error.headers)
    if "json" in found.get("content-type", ""):
        return status, json.loads(text), found
    return status, text, found


def pixels(picture: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def metric(url: str, line: str, **headers: str) -> float:
    text = ask(url, "/metrics", **headers)[1].decode()
    return sum(float(each.split()[-1]) for each in text.splitlines() if each.startswith(line))


def test_openai_client_gets_pictures_that_say_how_they_were_made() -> None:
    with fake_server() as (url, _, _):
        answer = client(url).images.generate(
            model="s", prompt="a cat 猫", n=2, size="16x8", extra_body={"seed": 7}
        )
        assert answer.data is not None
        assert len(answer.data) == 2
        assert (answer.size, answer.output_format, answer.background) == ("16x8", "png", "opaque")
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 32)
        for index, each in enumerate(answer.data):
            assert each.b64_json is not None
            with Image.open(io.BytesIO(base64.b64decode(each.b64_json))) as image:
                assert image.info["seed"] == str(7 + index)
                assert (image.info["Description"], image.info["model"]) == ("a cat 猫", "s")
            assert pixels(each.b64_json)[0, 0].tolist() == [7 + index, 2, 0]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_and_urls(output_format: Any) -> None:
    with fake_server() as (url, _, _):
        answer = client(url).images.generate(
            prompt="a cat", response_format="url", output_format=output_format,
            output_compression=80, extra_body={"seed": 100},
        )  # fmt: skip
        assert answer.data is not None
        head, _, data = (answer.data[0].url or "").partition(",")
        assert head == f"data:image/{output_format};base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.format == output_format.upper()
        assert np.abs(pixels(data) - (100, 2, 0)).max() <= 3


def test_openai_client_streams_the_preview_before_step_2() -> None:
    with fake_server() as (url, engine, model):
        seen = []
        stream = client(url).images.generate(
            prompt="a cat", stream=True, partial_images=1, extra_body={"seed": 9}
        )
        for event in stream:
            seen.append(event)
        assert [event.type for event in seen] == [
            "image_generation.partial_image", "image_generation.completed",
        ]  # fmt: skip
        partial, completed = seen
        assert partial.partial_image_index == 0
        assert (partial.size, partial.output_format) == ("8x8", "png")
        assert completed.usage.total_tokens == 21
        assert pixels(partial.b64_json)[0, 0].tolist() == [9, 1, 0]
        assert pixels(completed.b64_json)[0, 0].tolist() == [9, 2, 0]
        assert metric(url, "twostep_previews_sent_total") == 1
        events = list(client(url).images.generate(prompt="a cat", stream=True, partial_images=0))
        assert [event.type for event in events] == ["image_generation.completed"]
        assert ("preview", [9]) in model.log
        assert engine.in_flight == engine.waiting == 0


def test_models_are_listed_with_what_they_are() -> None:
    with fake_server() as (url, _, _):
        models = client(url).models.list().data
        assert [model.id for model in models] == ["s", "t"]
        assert client(url).models.retrieve("t").twostep["steps"] == 8  # type: ignore[attr-defined]
        with pytest.raises(openai.NotFoundError):
            client(url).models.retrieve("u")


def test_errors_have_openais_shape() -> None:
    with fake_server() as (url, _, _):
        with pytest.raises(openai.BadRequestError) as caught:
            client(url).images.generate(prompt="x", extra_body={"negative_prompt": "y"})
        assert (caught.value.code, caught.value.param) == (
            "unsupported_parameter",
            "negative_prompt",
        )
        with pytest.raises(openai.NotFoundError):
            client(url).images.generate(prompt="x", model="dall-e-3")
        for path, method, status in [
            ("/v1/other", "GET", 404),
            ("/v1/images/generations", "GET", 405),
            ("/page/../app.py", "GET", 404),
            ("/page/..%2fapp.py", "GET", 404),
        ]:
            found, body, _ = ask(url, path, method=method)
            assert found == status
            assert set(body["error"]) == {"message", "type", "param", "code"}


def test_keys() -> None:
    with fake_server(keys=("another-key-of-16", KEY)) as (url, _, _):
        assert client(url, KEY).images.generate(prompt="a cat").data
        for wrong in (KEY[:-1], KEY + "x", "", KEY.upper()):
            with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
                client(url, wrong).images.generate(prompt="a cat")
        assert ask(url, "/v1/models", Authorization=f"Basic {KEY}")[0] == 401
        status, body, headers = ask(url, "/metrics")
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
        assert [ask(url, path)[0] for path in ("/", "/health", "/ready")] == [200] * 3
        assert ask(url, "/health", Host="elsewhere.example")[0] == 403


def test_a_request_has_an_id_and_a_line_without_its_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "twostep.serving"), fake_server() as (url, _, _):
        assert ask(url, "/health", X_Request_Id="mine-1")[2]["x-request-id"] == "mine-1"
        own = ask(url, "/health", X_Request_Id="spaces are not taken")[2]["x-request-id"]
        assert len(own) == 32
        client(url).images.generate(prompt="a secret cat")
    lines = [record.facts for record in caplog.records if record.getMessage() == "request"]
    last = lines[-1]
    assert (last["path"], last["status"], last["model"]) == ("/v1/images/generations", 200, "s")
    assert "secret" not in str([record.__dict__ for record in caplog.records])


def test_a_full_line_is_429_and_says_when_to_come_back() -> None:
    with fake_server(line=2) as (url, engine, model):
        model.gate.clear()
        threads = [
            threading.Thread(target=ask, args=(url, "/v1/images/generations", {"prompt": "x"}))
            for _ in range(3)
        ]
        threads[0].start()
        assert model.reached.wait(10)
        for thread in threads[1:]:
            thread.start()
        until(lambda: engine.waiting == 2)
        started = time.monotonic()
        status, body, headers = ask(url, "/v1/images/generations", {"prompt": "x"})
        assert time.monotonic() - started < 1
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            client(url).images.generate(prompt="x")
        model.gate.set()
        for thread in threads:
            thread.join(10)
        assert ask(url, "/v1/images/generations", {"prompt": "x"})[0] == 200
        assert metric(url, 'twostep_refusals_total{kind="queue_full"}') == 2


def test_open_requests_are_bounded_whatever_they_do() -> None:
    with fake_server(limits=Limits(open_requests=1)) as (url, _, model):
        model.gate.clear()
        first = threading.Thread(target=ask, args=(url, "/v1/images/generations", {"prompt": "x"}))
        first.start()
        assert model.reached.wait(10)
        status, body, headers = ask(url, "/v1/models")
        assert (status, body["error"]["code"]) == (429, "too_many_requests")
        assert headers["retry-after"] == "1"
        assert ask(url, "/health")[0] == 200  # probes are answered always
        model.gate.set()
        first.join(10)
        assert ask(url, "/v1/models")[0] == 200


def test_a_client_that_does_not_read_is_let_go() -> None:
    sent: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a picture"})
        sent.append("all of it")

    async def blocked(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.sleep(30)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    metrics = Metrics()
    door = Door(
        app, keys=Keys(), limits=Limits(send_seconds=0.05), metrics=metrics, busy=lambda: None,
        hosts=None,
    )  # fmt: skip
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(asyncio.wait_for(door(scope, receive, blocked), 5))
    assert sent == ["http.response.start", "http.response.body"]
    assert b'twostep_refusals_total{kind="client_gone"} 1.0' in metrics.text()


@pytest.mark.parametrize("stream", [False, True])
def test_past_the_deadline_is_504_and_the_picture_is_not_made(stream: bool) -> None:
    with fake_server(limits=Limits(deadline=0.3)) as (url, engine, model):
        model.gate.clear()
        first = threading.Thread(
            target=ask, args=(url, "/v1/images/generations", {"prompt": "x", "size": "16x16"})
        )
        first.start()
        assert model.reached.wait(10)
        body = {"prompt": "late", "seed": 77, "stream": stream}
        status, found, _ = ask(url, "/v1/images/generations", body)
        assert (status, found["error"]["code"]) == (504, "deadline_exceeded")
        model.gate.set()
        first.join(10)
        until(lambda: engine.waiting == engine.in_flight == 0)
    assert all(77 not in seeds for _, seeds in model.log)


def begin(url: str, body: dict[str, Any]) -> socket.socket:
    """A request whose answer is not waited for."""
    host, _, port = url.removeprefix("http://").partition(":")
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    line = socket.create_connection((host, int(port)), timeout=10)
    line.sendall(head.encode() + data)
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_picture_out_between_the_steps(stream: bool) -> None:
    with fake_server() as (url, engine, model):
        model.gate.clear()
        body = {"prompt": "x", "seed": 5, "stream": stream, "partial_images": int(stream)}
        line = begin(url, body)
        assert model.reached.wait(10)  # in step 1
        line.close()
        until(lambda: metric(url, 'twostep_refusals_total{kind="client_gone"}') == 1)
        model.gate.set()
        left = 'twostep_pictures_left_total{reason="gone_between_steps"}'
        until(lambda: metric(url, left) == 1)
        assert {stage for stage, _ in model.log} <= {"first", "preview"}
        assert engine.in_flight == 0


def test_a_stream_whose_client_goes_after_the_preview_ends_there() -> None:
    with fake_server() as (url, engine, model):
        body = {"prompt": "x", "seed": 5, "stream": True, "partial_images": 1}
        second = threading.Event()
        advance = model.advance

        def held(states: list[Any], step: int) -> list[Any]:
            assert second.wait(10)
            return advance(states, step)

        model.advance = held  # type: ignore[method-assign]
        line = begin(url, body)
        received = b""
        while b"partial_image" not in received:
            received += line.recv(65536)
        assert b"completed" not in received
        line.close()
        until(lambda: metric(url, 'twostep_refusals_total{kind="client_gone"}') == 1)
        second.set()
        until(lambda: engine.in_flight == 0)


def test_a_failing_model_is_500_without_a_word_of_why() -> None:
    with fake_server() as (url, _, model):
        model.bad = {3}
        status, body, headers = ask(url, "/v1/images/generations", {"prompt": "x", "seed": 3})
        assert (status, body["error"]["code"]) == (500, "internal_error")
        assert "secret" not in json.dumps(body) + str(headers)
        body = {"prompt": "x", "seed": 3, "stream": True}
        assert ask(url, "/v1/images/generations", body)[0] == 500
        assert ask(url, "/v1/images/generations", {"prompt": "x", "seed": 4})[0] == 200


def test_a_stream_that_fails_after_its_preview_ends_with_an_error() -> None:
    with fake_server() as (url, _, model):
        advance = model.advance

        def fail(states: list[Any], step: int) -> list[Any]:
            raise RuntimeError("secret")

        model.advance = fail  # type: ignore[method-assign]
        stream = client(url).images.generate(prompt="x", stream=True, partial_images=1)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "secret" not in str(caught.value)
        model.advance = advance  # type: ignore[method-assign]
        assert client(url).images.generate(prompt="x").data


def test_what_no_body_may_be() -> None:
    with fake_server(limits=Limits(body_bytes=1000, body_seconds=0.3)) as (url, _, model):
        path = "/v1/images/generations"
        big = {"prompt": "x" * 2000}
        status, body, _ = ask(url, path, big)
        assert (status, body["error"]["code"]) == (413, "body_too_large")
        assert ask(url, path, b"prompt=x", Content_type="text/plain")[0] in (400, 415)
        assert ask(url, path, {"prompt": "x"}, Content_Encoding="gzip")[0] == 415
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(
                f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                'Content-Length: 500\r\n\r\n{"prompt"'.encode()
            )
            assert b" 408 " in slow.recv(65536)
        with socket.create_connection((host, int(port)), timeout=10) as endless:
            endless.sendall(
                f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            for _ in range(4):
                endless.sendall(b"190\r\n" + b" " * 400 + b"\r\n")
            assert b" 413 " in endless.recv(65536)
        assert model.log == []


def test_no_fuzzed_body_fails_the_server() -> None:
    source, statuses = random.Random(1), []
    with fake_server() as (url, _, _):
        for _ in range(200):
            statuses.append(ask(url, "/v1/images/generations", broken(source))[0])
        assert ask(url, "/ready")[0] == 200
    assert set(statuses) <= {200, 400, 404}
    assert statuses.count(400) > 50


def test_health_and_ready_while_it_loads_and_when_it_cannot() -> None:
    loading = threading.Event()
    engine = Engine(lambda: {"s": FakeModel()} if loading.wait(10) else {})
    ready = engine.wait_ready
    engine.wait_ready = lambda timeout=None: True  # type: ignore[method-assign]
    with served(engine, CATALOGUE) as url:
        assert ask(url, "/health")[0] == 200
        assert ask(url, "/ready")[0] == 503
        status, body, headers = ask(url, "/v1/images/generations", {"prompt": "x"})
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "not_ready", "5")
        loading.set()
        assert ready(10)
        assert ask(url, "/ready")[0] == 200
        assert metric(url, "twostep_ready") == 1
