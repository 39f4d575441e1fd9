"""The rehearsal runs from end to end on a small folder, and what it measures is every stage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_small_rehearsal(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "rehearsal.py"
    command = [sys.executable, str(script), "--scale", "small", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rehearsal.json").read_text())
    commands = {command["name"]: command for command in found["commands"]}
    assert commands["distill-killed"]["killed"]
    assert all(c["exit"] == 0 for name, c in commands.items() if name != "distill-killed")
    # What was fitted before it was killed is not fitted again.
    fits = [s for s in commands["distill"]["stages"] if s["name"] == "score fit"]
    assert len(fits) <= 1
    stages = {stage["name"]: stage for stage in found["stages"]}
    planned = {stage["name"] for stage in found["plan"]["stages"]}
    used = {"generate", "evaluate: pictures", "evaluate: timing"}
    assert stages.keys() == planned - used
    # The interpreter is most of it at this size.
    assert all(0.6 < stage["ratio"] < 1.4 for stage in stages.values())
    assert not (tmp_path / "model").exists()
