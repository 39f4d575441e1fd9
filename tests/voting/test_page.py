"""The booth in a real browser: votes by keys and touch, undo, two voters, and how it looks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from browsing import Visit
from serving_fakes import until
from twostep.evaluation.picture_index import PictureIndex
from twostep.voting.ballot_box import BallotBox
from twostep.voting.server import VoteServer, choose, open_box
from voting_run import make_run


class Poll:
    """A server of its own thread, and its box."""

    def __init__(self, run: Path, port: int = 0) -> None:
        index = PictureIndex.read(run)
        self.box: BallotBox = open_box(run, index)
        self.server = VoteServer(index, self.box, keys=choose(index), port=port, goal=3)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def answers(self) -> list[tuple[str, str]]:
        return [(vote.voter, vote.answer) for vote in self.box.votes()]

    def end(self) -> None:
        self.server.stop()
        self.thread.join(20)
        self.box.close()


class Voter(Visit):
    """A voter's page."""

    def enter(self, name: str) -> None:
        self.page.fill("#name", name)
        self.page.press("#name", "Enter")
        self.page.wait_for_selector("#pair:not(.waiting) img[src]")

    def task(self) -> str:
        return str(self.page.evaluate("document.body.dataset.task"))

    def press(self, key: str) -> None:
        """A key, and the wait for the pictures that follow it."""
        before = self.task()
        self.page.keyboard.press(key)
        until(lambda: self.task() != before or self.page.is_visible("#end"), seconds=20)

    def look(self, name: str, tmp_path: Path) -> np.ndarray:
        return self.shot(f"vote-{name}", tmp_path, full_page=False)


@pytest.mark.browser
def test_voters_by_keys_and_by_touch(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "check")
    poll = Poll(run)
    ann = Voter(browser, poll.server.url, viewport={"width": 1280, "height": 800})
    page = ann.page
    ann.look("welcome", tmp_path)
    ann.enter("ann")
    assert page.inner_text("#count") == "0 of 3"
    assert page.is_disabled("#undo")
    pixels = ann.look("desktop", tmp_path)
    # Two pictures of one colour each, side by side, of one size.
    left, right = pixels[400, 320], pixels[400, 960]
    assert {int(left[0]), int(right[0])} == {0, 80}
    assert left[1] == right[1]
    # Enlarged, the keys vote for nobody.
    page.click("#pair button >> nth=0")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("ArrowLeft")
    assert not page.is_visible("dialog")
    assert poll.answers() == []
    ann.press("ArrowLeft")
    first = ann.task()
    ann.press("ArrowDown")
    assert poll.answers() == [("ann", "left"), ("ann", "same")]
    assert page.inner_text("#count") == "2 of 3"
    # Undo brings the same pictures back.
    page.keyboard.press("Backspace")
    until(lambda: ann.task() == first, seconds=20)
    assert poll.answers() == [("ann", "left")]

    # Another voter at the same time, on a phone, in the dark, with a Chinese prompt among them.
    bob = Voter(
        browser, poll.server.url, color_scheme="dark", has_touch=True, is_mobile=True,
        viewport={"width": 390, "height": 844},
    )  # fmt: skip
    bob.enter("bob")
    dark = bob.look("phone-dark", tmp_path)
    assert dark[2, 2].max() < 60
    assert bob.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert bob.page.evaluate("document.documentElement.scrollHeight") <= 844  # nothing to scroll
    assert bob.page.evaluate("document.getElementById('left').clientWidth") > 300
    before = bob.task()
    bob.page.tap("[data-answer=skip]")
    until(lambda: bob.task() != before, seconds=20)
    bob.page.tap("[data-answer=right]")
    until(lambda: len(poll.answers()) == 3, seconds=20)
    assert poll.answers()[1:] == [("bob", "skip"), ("bob", "right")]

    # The server ends and comes back: whoever has the page open goes on as if nothing had been.
    port = int(poll.server.url.rpartition(":")[2])
    poll.end()
    poll = Poll(run, port)
    ann.press("ArrowRight")
    ann.press("2")
    page.wait_for_selector("#end:not([hidden])")
    ann.look("end", tmp_path)
    assert "5 more pairs" in page.inner_text("#thanks")
    page.click("#more")
    page.wait_for_selector("#booth:not([hidden])")
    assert page.inner_text("#count") == "3 of 8"
    page.reload()
    page.wait_for_selector("#end:not([hidden])")  # who it was is remembered
    ann.end()
    bob.end()
    poll.end()


@pytest.mark.browser
def test_a_link_with_an_invitation(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "check")
    index = PictureIndex.read(run)
    box = open_box(run, index)
    server = VoteServer(index, box, keys=choose(index), host="0.0.0.0", goal=3)
    port = server.url.rpartition("#")[0].rpartition(":")[2]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        visit = Voter(browser, f"http://127.0.0.1:{port}#{box.invitation}")
        visit.enter("ann")
        visit.press("1")
        assert [vote.answer for vote in box.votes()] == ["left"]
        visit.end()
        stranger = Voter(browser, f"http://127.0.0.1:{port}")
        stranger.page.fill("#name", "eve")
        stranger.page.press("#name", "Enter")
        stranger.page.wait_for_selector("#trouble:not([hidden])")
        assert "no invitation" in stranger.page.inner_text("#trouble")
        stranger.context.close()
    finally:
        server.stop()
        thread.join(20)
        box.close()
