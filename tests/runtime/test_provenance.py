from __future__ import annotations

import subprocess
from pathlib import Path

from twostep.runtime.provenance import git_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_named_only_by_the_repository_that_tracks_the_package(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    own, installed = tmp_path / "own.py", tmp_path / "environment" / "installed.py"
    own.write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    head = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert git_commit(own) == head
    installed.parent.mkdir()
    installed.write_text("")
    assert git_commit(installed) == "unknown"
    assert git_commit(own) == f"{head}+"
    assert git_commit(tmp_path.parent / "nowhere.py") == "unknown"
