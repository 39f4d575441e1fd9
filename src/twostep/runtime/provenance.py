"""Which machine and which source a figure comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch


def stamp() -> dict[str, str]:
    """`commit`, `machine` and `date`, for a file of figures."""
    return {"commit": git_commit(), "machine": machine(), "date": date.today().isoformat()}


def git_commit(source: Path = Path(__file__)) -> str:
    """Commit of the source tree this package runs from, "+" if it was changed; or "unknown".

    Args:
        source: a file of the tree. A repository that does not track it, such as the one around a
            virtual environment that this package is installed in, has another's commits.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(
            ["git", *arguments],
            cwd=source.parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        changed = "+" if git("status", "--porcelain") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> str:
    """Processor, cores and accelerator in a few words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(li.split(":", 1)[1].strip() for li in lines if li.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores"
        if hasattr(os, "sched_getaffinity")
        else name
    )
