"""A visit to one of our pages in a real browser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Where set, screenshots are kept there to be looked at.
SHOTS = os.environ.get("TWOSTEP_SCREENSHOTS")


class Visit:
    """A page, what it complained of, and which servers it asked.

    Args:
        script: run before any of the page's own.
    """

    def __init__(self, browser: Any, url: str, *, script: str = "", **options: Any) -> None:
        self.context = browser.new_context(**{"locale": "en-US"} | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.problems: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        if script:
            self.page.add_init_script(script)
        self.page.goto(url)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(message.text)

    def shot(self, name: str, tmp_path: Path, *, full_page: bool = True) -> np.ndarray:
        """A screenshot's pixels; kept where `SHOTS` says."""
        path = Path(SHOTS or tmp_path) / f"{name}.png"
        self.page.screenshot(path=path, full_page=full_page)
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"), dtype=np.int64)

    def end(self) -> None:
        """Leaves; it must have complained of nothing and asked nobody else."""
        self.context.close()
        assert self.problems == []
        assert len({host for host in self.hosts if host}) == 1
