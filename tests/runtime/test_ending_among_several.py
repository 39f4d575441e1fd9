"""A process of several ends with its own code, whatever gloo's threads still hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("slow_tensor.py")


@pytest.mark.distributed
def test_a_process_ends_while_a_thread_of_gloo_holds_a_tensor() -> None:
    """By the interpreter's own way out it would end with 0, or with -6 and no reason."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "done\n"), done.stderr
