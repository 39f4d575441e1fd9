"""The body of `POST /v1/images/generations`: OpenAI's fields, checked before any model's work."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twostep.errors import InputError
from twostep.inference.parameters import parameters_text
from twostep.serving.catalogue import Catalogue, Offer
from twostep.serving.errors import ApiError
from twostep.serving.jobs import PictureSpec

OutputFormat = Literal["png", "jpeg", "webp"]
MAX_SEED = 2**52  # exact in JavaScript, with room for n more
_RANDOM_SEEDS = 2**31


@dataclass(frozen=True)
class Limits:
    """What is refused before any model's work.

    Attributes:
        prompt_characters: of a prompt; models read 512 tokens of it.
        pixels: of one picture.
        body_bytes: of a request.
        body_seconds: within which the body must have come.
        send_seconds: within which the client must take what it is sent.
        open_requests: at one time, whatever they do.
        deadline: seconds from the request to its picture.
    """

    prompt_characters: int = 4000
    pixels: int = 2048 * 2048
    body_bytes: int = 64 * 1024
    body_seconds: float = 10.0
    send_seconds: float = 30.0
    open_requests: int = 1024
    deadline: float = 60.0


class GenerationBody(BaseModel):
    """As sent; `seed` is an extension, and null is the same as a field left out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(description="what the picture shows")]
    model: Annotated[str | None, Field(description="of GET /v1/models; the first if left out")] = (
        None
    )
    n: Annotated[int | None, Field(ge=1, le=10, description="pictures, seeds ascending")] = None
    size: Annotated[str | None, Field(description="WIDTHxHEIGHT in pixels, or auto")] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Field(description="url gives a data: URL")
    ] = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[
        int | None, Field(ge=0, le=100, description="quality of jpeg and webp")
    ] = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Annotated[str | None, Field(max_length=256, description="neither used nor logged")] = None
    stream: bool | None = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=1, description="1 streams what step 1 points to")
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MAX_SEED, description="of the first picture; random if left out")
    ] = None
    negative_prompt: Annotated[Any, Field(description="refused")] = None


@dataclass(frozen=True)
class ImageRequest:
    """A request that can be served.

    Attributes:
        size: (height, width) in pixels.
        partial_images: 0 or 1, of a stream.
        as_url: a `data:` URL in place of base64 alone.
    """

    offer: Offer
    prompt: str
    seed: int
    n: int
    size: tuple[int, int]
    output_format: OutputFormat
    output_compression: int | None
    as_url: bool
    stream: bool
    partial_images: int

    @property
    def size_text(self) -> str:
        return f"{self.size[1]}x{self.size[0]}"

    def specs(self) -> list[PictureSpec]:
        """A picture for each seed."""
        return [
            PictureSpec(self.offer.name, self.prompt, self.seed + i, self.size)
            for i in range(self.n)
        ]

    def facts(self, seed: int) -> dict[str, str]:
        """What a PNG says of itself, as those of `twostep generate`."""
        return {
            "Description": self.prompt,
            "seed": str(seed),
            "steps": str(self.offer.steps),
            "model": self.offer.name,
            "size": self.size_text,
            "weights": self.offer.weights,
            "parameters": parameters_text(
                self.prompt, seed=seed, steps=self.offer.steps, size=self.size,
                model=self.offer.name, weights=self.offer.weights,
            ),
        }  # fmt: skip


def read_request(body: bytes, *, catalogue: Catalogue, limits: Limits) -> ImageRequest:
    """The request that `body` holds.

    Raises:
        ApiError: 400 or 404, naming the field.
    """
    try:
        asked = GenerationBody.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error) from None
    if asked.negative_prompt is not None:
        raise ApiError(
            400,
            "unsupported_parameter",
            "negative_prompt is not supported: these models run without guidance; "
            "say in the prompt what the picture shows",
            "negative_prompt",
        )
    if not asked.prompt.strip():
        raise _wrong("prompt", "must not be empty")
    if len(asked.prompt) > limits.prompt_characters:
        most = limits.prompt_characters
        raise _wrong("prompt", f"at most {most} characters, this one has {len(asked.prompt)}")
    offer = _offer(asked.model, catalogue)
    stream, n = bool(asked.stream), asked.n or 1
    if stream and n > 1:
        raise _wrong("n", "must be 1 with stream: events do not say which picture they are of")
    if asked.partial_images and not stream:
        raise _wrong("partial_images", "needs stream")
    output_format = asked.output_format or "png"
    if output_format == "png" and asked.output_compression not in (None, 100):
        raise _wrong("output_compression", "is for jpeg and webp; png is lossless")
    return ImageRequest(
        offer=offer,
        prompt=asked.prompt,
        seed=secrets.randbelow(_RANDOM_SEEDS) if asked.seed is None else asked.seed,
        n=n,
        size=_size(asked.size, offer, limits),
        output_format=output_format,
        output_compression=asked.output_compression,
        as_url=asked.response_format == "url",
        stream=stream,
        partial_images=asked.partial_images or 0,
    )


def _offer(name: str | None, catalogue: Catalogue) -> Offer:
    if name is None:
        return next(iter(catalogue.values()))
    if name not in catalogue:
        known = ", ".join(catalogue)
        message = f"model: no model {name[:80]!r} here; there are: {known}"
        raise ApiError(404, "model_not_found", message, "model")
    return catalogue[name]


def _size(text: str | None, offer: Offer, limits: Limits) -> tuple[int, int]:
    if text is None or text == "auto":
        return offer.size
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", text)
    if not match:
        raise _wrong("size", f"expected WIDTHxHEIGHT or auto, got {text[:40]!r}")
    width, height = int(match[1]), int(match[2])
    if width * height > limits.pixels:
        raise _wrong("size", f"at most {limits.pixels} pixels, {text} has {width * height}")
    try:
        offer.check_size((height, width))
    except InputError as error:
        raise ApiError(400, "invalid_value", str(error), "size") from None
    return height, width


def _wrong(param: str, text: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{param}: {text}", param)


def _invalid(error: ValidationError) -> ApiError:
    """The first problem; never what was sent, which may be anything."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if not first["loc"]:
        if first["type"] == "json_invalid":
            return ApiError(400, "invalid_json", "the body is not valid JSON")
        return ApiError(400, "invalid_json", "the body must be a JSON object")
    param = str(first["loc"][0])[:80]
    if first["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"unknown parameter: {param!r}", param)
    if first["type"] == "missing":
        code = "missing_required_parameter"
        return ApiError(400, code, f"missing required parameter: {param!r}", param)
    return ApiError(400, "invalid_value", f"{param}: {first['msg'].lower()}", param)
