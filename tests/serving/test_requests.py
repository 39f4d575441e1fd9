"""Bodies of requests: what is taken, and that nothing else gets as far as a model."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from serving_fakes import broken, offer
from twostep.serving.errors import ApiError
from twostep.serving.requests import MAX_SEED, ImageRequest, Limits, read_request

CATALOGUE = {"s": offer("s"), "t": offer("t", 8)}
LIMITS = Limits(prompt_characters=100, pixels=32 * 32)


def read(value: Any) -> ImageRequest:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_request(body, catalogue=CATALOGUE, limits=LIMITS)


def refused(value: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(value)
    assert 400 <= caught.value.status < 500
    return caught.value


def test_a_prompt_is_enough() -> None:
    asked = read({"prompt": "a cat"})
    assert (asked.offer.name, asked.n, asked.size, asked.output_format) == ("s", 1, (8, 8), "png")
    assert (asked.stream, asked.partial_images, asked.as_url) == (False, 0, False)
    assert 0 <= asked.seed < 2**31
    assert len({read({"prompt": "a cat"}).seed for _ in range(5)}) > 1


def test_every_field_is_read() -> None:
    asked = read(
        {
            "prompt": "一只猫", "model": "t", "n": 3, "size": "32x16", "response_format": "url",
            "output_format": "webp", "output_compression": 40, "quality": "auto",
            "background": "auto", "moderation": "low", "user": "u", "stream": False,
            "partial_images": 0, "seed": MAX_SEED, "negative_prompt": None,
        }
    )  # fmt: skip
    assert (asked.offer.steps, asked.size, asked.size_text) == (8, (16, 32), "32x16")
    assert (asked.as_url, asked.output_compression) == (True, 40)
    assert [spec.seed for spec in asked.specs()] == [MAX_SEED, MAX_SEED + 1, MAX_SEED + 2]
    facts = asked.facts(5)
    assert facts.pop("parameters").startswith("一只猫\nNegative prompt: \nSteps: 8, ")
    assert facts == {
        "Description": "一只猫", "seed": "5", "steps": "8", "model": "t", "size": "32x16",
        "weights": "0123",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "status", "code", "param"),
    [
        ({}, 400, "missing_required_parameter", "prompt"),
        ({"prompt": " "}, 400, "invalid_value", "prompt"),
        ({"prompt": 3}, 400, "invalid_value", "prompt"),
        ({"prompt": "x" * 101}, 400, "invalid_value", "prompt"),
        ({"prompt": "x", "negative_prompt": "y"}, 400, "unsupported_parameter", "negative_prompt"),
        ({"prompt": "x", "steps": 4}, 400, "unknown_parameter", "steps"),
        ({"prompt": "x", "model": "dall-e"}, 404, "model_not_found", "model"),
        ({"prompt": "x", "n": 0}, 400, "invalid_value", "n"),
        ({"prompt": "x", "n": 11}, 400, "invalid_value", "n"),
        ({"prompt": "x", "n": 1.5}, 400, "invalid_value", "n"),
        ({"prompt": "x", "n": True}, 400, "invalid_value", "n"),
        ({"prompt": "x", "n": 2, "stream": True}, 400, "invalid_value", "n"),
        ({"prompt": "x", "partial_images": 1}, 400, "invalid_value", "partial_images"),
        ({"prompt": "x", "partial_images": 2, "stream": True}, 400, "invalid_value", "partial_images"),
        ({"prompt": "x", "size": "8"}, 400, "invalid_value", "size"),
        ({"prompt": "x", "size": "9x8"}, 400, "invalid_value", "size"),
        ({"prompt": "x", "size": "64x64"}, 400, "invalid_value", "size"),
        ({"prompt": "x", "size": "99999x99999"}, 400, "invalid_value", "size"),
        ({"prompt": "x", "size": "８x８"}, 400, "invalid_value", "size"),
        ({"prompt": "x", "size": 8}, 400, "invalid_value", "size"),
        ({"prompt": "x", "output_format": "gif"}, 400, "invalid_value", "output_format"),
        ({"prompt": "x", "output_compression": 50}, 400, "invalid_value", "output_compression"),
        ({"prompt": "x", "background": "transparent"}, 400, "invalid_value", "background"),
        ({"prompt": "x", "seed": -1}, 400, "invalid_value", "seed"),
        ({"prompt": "x", "seed": 2**70}, 400, "invalid_value", "seed"),
        ({"prompt": "x", "user": "u" * 257}, 400, "invalid_value", "user"),
        ([], 400, "invalid_json", None),
        (b"", 400, "invalid_json", None),
        (b'{"prompt": "\xff"}', 400, "invalid_json", None),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json", None),
        (b"[" * 60_000, 400, "invalid_json", None),
    ],
)  # fmt: skip
def test_what_is_refused(value: Any, status: int, code: str, param: str | None) -> None:
    error = refused(value)
    assert (error.status, error.code, error.param) == (status, code, param)
    body = error.as_json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"
    if param is not None:
        assert param in body["message"]


def test_messages_do_not_repeat_what_was_sent() -> None:
    assert "secret" not in refused({"prompt": ["secret"]}).message
    assert len(refused({"prompt": "x", "model": "m" * 5000}).message) < 200
    assert len(refused({"prompt": "x", "k" * 5000: 1}).message) < 200


def test_fuzzed_bodies_are_read_or_refused() -> None:
    source, statuses = random.Random(0), []
    for _ in range(2000):
        try:
            read(broken(source))
        except ApiError as error:
            statuses.append(error.status)
    assert set(statuses) <= {400, 404}
    assert 1000 < len(statuses) < 1980
