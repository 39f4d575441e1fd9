"""What goes wrong with a request, in the shape that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: of HTTP.
        code: short and stable; also the kind that refusals are counted by.
        message: one sentence for a person.
        param: the field of the request that it is about.
        headers: of the answer, besides the usual ones.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """OpenAI's name for a status."""
        if self.status >= 500:
            return "server_error"
        names = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error")

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def full(retry_after: float) -> ApiError:
    """429: the line is full; `retry_after` in seconds, rounded up."""
    seconds = str(max(1, -int(-retry_after // 1)))
    return ApiError(
        429, "queue_full", f"too many pictures are waiting, try again in {seconds} s",
        headers={"Retry-After": seconds},
    )  # fmt: skip


def not_ready(state: str) -> ApiError:
    """503: the engine is starting, ending or has failed."""
    return ApiError(503, "not_ready", f"the server is {state}", headers={"Retry-After": "5"})


def too_late(seconds: float) -> ApiError:
    """504: past the deadline."""
    return ApiError(504, "deadline_exceeded", f"the picture was not done within {seconds:g} s")


def failed() -> ApiError:
    """500, without a word of what happened; the log has it."""
    return ApiError(500, "internal_error", "the server failed on this request")
