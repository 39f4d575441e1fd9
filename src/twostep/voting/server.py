"""The process: which pictures, a socket, uvicorn; what came of it once it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import uvicorn

from twostep.errors import InputError
from twostep.evaluation.picture_index import PictureIndex
from twostep.runtime.signals import catch_signals
from twostep.serving.address import LOOPBACK, is_loopback, listen, url_of
from twostep.voting.app import AppOptions, create_app
from twostep.voting.ballot_box import BallotBox

BOX = "votes.sqlite"


def choose(index: PictureIndex, keys: Sequence[str] = ()) -> tuple[str, ...]:
    """The models to compare: those named, or teacher and students without previews.

    Raises:
        InputError: for a name that the evaluation has not, or fewer than two.
    """
    usual = [
        key
        for key, each in index.sets.items()
        if each.kind != "naive" and each.tensor == "images" and key != "reference"
    ]
    for key in keys:
        if key not in index.sets:
            raise InputError(f"--model: no pictures of {key!r}; there are: {', '.join(index.sets)}")
    # In the index's order, so that a vote is found again whatever the order of the options.
    chosen = tuple(key for key in index.sets if key in (keys or usual))
    if len(chosen) < 2:
        raise InputError(f"--model: expected two models or more, got {', '.join(chosen) or 'none'}")
    return chosen


def open_box(run: Path, index: PictureIndex) -> BallotBox:
    """The votes on `run`'s pictures, a new file if there are none."""
    return BallotBox(run / BOX, {key: each.fingerprint for key, each in index.sets.items()})


class VoteServer:
    """The page for some models' pictures.

    Args:
        keys: of the models (`choose`).
        host: others than this machine's ask for the link with the invitation.
        port: 0 for a free one.
        goal: votes after which a voter is thanked.

    Raises:
        InputError: if the address cannot be listened on.
    """

    def __init__(
        self,
        index: PictureIndex,
        box: BallotBox,
        *,
        keys: Sequence[str],
        host: str = "127.0.0.1",
        port: int = 0,
        goal: int = 100,
    ) -> None:
        local = is_loopback(host)
        options = AppOptions(
            keys=tuple(keys),
            goal=goal,
            hosts={*LOOPBACK, host.lower()} if local else None,
            invitation=None if local else box.invitation,
        )
        self._socket = listen(host, port)
        self._socket.listen()  # who comes before uvicorn runs waits, and is not refused
        self.url = url_of(host, self._socket)
        if not local:
            self.url += f"/#{box.invitation}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(index, box, options), log_level="warning", access_log=False,
                server_header=False, lifespan="off", ws="none", timeout_graceful_shutdown=2,
            )
        )  # fmt: skip

    def run(self) -> None:
        """Serves until SIGTERM, SIGINT or `stop`."""
        with catch_signals():  # uvicorn raises them again when it has ended
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True
