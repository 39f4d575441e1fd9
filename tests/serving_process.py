"""`twostep serve` in a process of its own, for tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from typing import Any
from urllib.request import urlopen

import openai


class Served:
    """A process, its address once it is ready, and its log."""

    def __init__(self, *options: str, **variables: str) -> None:
        command = [sys.executable, "-m", "twostep", "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | variables
        )
        self.lines: list[dict[str, Any]] = []
        self.url = ""
        ready = threading.Event()

        def read() -> None:
            assert self.process.stderr is not None
            for line in self.process.stderr:
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                    if self.lines[-1]["event"] == "ready":
                        self.url = self.lines[-1]["url"]
                        ready.set()

        self.reading = threading.Thread(target=read, daemon=True)
        self.reading.start()
        if not ready.wait(180):  # a machine with much other work loads torch for a minute
            self.process.kill()
            raise AssertionError(f"not ready in time: {self.lines}")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=30)

    def waiting(self) -> float:
        with urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return float(re.search(r"^twostep_queue_pictures (.*)$", text, flags=re.M)[1])  # type: ignore[index]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.reading.join(10)
        return code
