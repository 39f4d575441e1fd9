"""The voting page's application: the next two pictures, a vote, undo."""

from __future__ import annotations

import io
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import compare_digest
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, Field, StringConstraints

from twostep.evaluation.picture_index import PictureIndex
from twostep.voting.ballot_box import Answer, BallotBox
from twostep.voting.tasks import Shown, Task, Tasks

_PAGE = Path(__file__).with_name("page")
_POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'; base-uri 'none'"
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)]


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Attributes:
    keys: of the models whose pictures are compared.
    goal: votes after which a voter is thanked, and may go on.
    hosts: names by which it answers; None for any, where an invitation is asked for.
    invitation: what a visitor's link must hold; None for none.
    """

    keys: tuple[str, ...]
    goal: int = 100
    hosts: Collection[str] | None = None
    invitation: str | None = None


class _Voter(BaseModel):
    voter: _Name


class _Vote(_Voter):
    task: Annotated[str, StringConstraints(max_length=64)]
    answer: Answer
    seconds: Annotated[float, Field(ge=0, le=86_400)] | None = None


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message


class _Booth:
    """What was shown to whom since the server began."""

    def __init__(self, index: PictureIndex, box: BallotBox, options: AppOptions) -> None:
        self.index, self.box, self.options = index, box, options
        self.tasks = Tasks(options.keys, len(index), box.secret)
        self.shown: dict[str, tuple[str, Shown]] = {}

    def page(self, voter: str, first: Task | None = None) -> dict[str, Any]:
        """What the page shows next: `first`, or what nobody judged."""
        own = self.box.votes(voter)
        done = {vote.task for vote in own}
        tasks = self.tasks.next(voter, own=done, counts=self.box.counts())
        if first is not None:
            tasks = [first, *(task for task in tasks if task != first)][:2]
        return {
            "pairs": [self._pair(voter, task) for task in tasks],
            "done": len(own),
            "goal": min(self.options.goal, len(self.tasks)),
            "total": len(self.tasks),
            "undo": bool(own),
        }

    def _pair(self, voter: str, task: Task) -> dict[str, str]:
        shown = self.tasks.show(voter, task)
        self.shown[shown.name] = voter, shown
        names = {side: f"/picture/{shown.name}-{side}.png" for side in ("left", "right")}
        return {"task": shown.name, "prompt": self.index.prompt(task.row), **names}

    def pictures(self, name: str) -> Shown:
        if name not in self.shown:
            raise _Refused(404, "no such picture")
        return self.shown[name][1]

    def task(self, name: str, voter: str) -> Shown:
        """What `name` is to the voter, shown by this server or by one before it."""
        who, shown = self.shown.get(name, (None, None))
        if shown is None:
            who, shown = voter, self.tasks.find(voter, name)
        if shown is None or who != voter:
            raise _Refused(409, "these pictures were shown to another voter, or are gone")
        return shown


def create_app(index: PictureIndex, box: BallotBox, options: AppOptions) -> FastAPI:
    """The application; votes go into `box`."""
    app = FastAPI(
        title="twostep vote", docs_url=None, redoc_url=None, openapi_url=None,
        exception_handlers={_Refused: _refuse, RequestValidationError: _invalid},
    )  # fmt: skip
    app.middleware("http")(_door(options))
    _add_api(app, _Booth(index, box, options))
    _add_page(app)
    return app


def _add_api(app: FastAPI, booth: _Booth) -> None:
    @app.post("/api/next")
    def enter(body: _Voter) -> dict[str, Any]:
        return booth.page(body.voter)

    @app.post("/api/vote")
    def vote(body: _Vote) -> dict[str, Any]:
        shown = booth.task(body.task, body.voter)
        booth.box.add(body.voter, shown, body.answer, seconds=body.seconds)
        return booth.page(body.voter)

    @app.post("/api/undo")
    def undo(body: _Voter) -> dict[str, Any]:
        return booth.page(body.voter, booth.box.take_back(body.voter))

    @app.get("/picture/{name}-{side}.png")
    def picture(name: str, side: str) -> Response:
        shown = booth.pictures(name)
        if side not in ("left", "right"):
            raise _Refused(404, "no such picture")
        key = shown.left if side == "left" else shown.right
        pixels = booth.index.picture(key, shown.task.row).permute(1, 2, 0).contiguous()
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, format="PNG", compress_level=1)
        return Response(buffer.getvalue(), media_type="image/png")


def _add_page(app: FastAPI) -> None:
    names = {path.name for path in _PAGE.glob("*") if path.suffix in _KINDS}

    def answer(name: str) -> Response:
        if name not in names:
            raise _Refused(404, "no such page")
        return FileResponse(_PAGE / name, media_type=_KINDS[Path(name).suffix])

    @app.get("/")
    def page() -> Response:
        return answer("index.html")

    @app.get("/page/{name}")
    def part(name: str) -> Response:
        return answer(name)


def _door(options: AppOptions) -> Callable[..., Awaitable[Response]]:
    """Keeps other sites' pages and uninvited visitors out."""

    def refusal(headers: Mapping[str, str], path: str) -> str | None:
        host = headers.get("host", "")
        name = re.sub(r":\d+$", "", host).lower()
        if options.hosts is not None and name not in options.hosts:
            return "this server answers under its own address alone"
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return "another page's request"
        open_to_all = path == "/" or path.startswith("/page/")
        if options.invitation is not None and not open_to_all:
            given = headers.get("x-invitation", "").encode("latin-1", "replace")
            if not compare_digest(given, options.invitation.encode()):
                return "the link has no invitation, or an old one"
        return None

    async def check(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        said = refusal(request.headers, request.url.path)
        response = JSONResponse({"error": said}, 403) if said else await answer(request)
        response.headers.update(_HEADERS)
        return response

    return check


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    return JSONResponse({"error": error.message}, error.status)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 422)
