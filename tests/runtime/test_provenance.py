from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

from twostep.runtime import provenance


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_commit_is_this_packages_own(tmp_path: Path) -> None:
    copy = tmp_path / "library" / "provenance.py"
    copy.parent.mkdir()
    shutil.copy(provenance.__file__, copy)
    spec = importlib.util.spec_from_file_location("copied", copy)
    assert spec is not None
    assert spec.loader is not None
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.git_commit() == "unknown"  # no repository at all

    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "--quiet", "--message", "another project")
    assert copied.git_commit() == "unknown"  # another project's

    git(tmp_path, "add", "library")
    git(tmp_path, "commit", "--quiet", "--message", "the package")
    own = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert copied.git_commit() == own
    copy.write_text(copy.read_text() + "# changed\n")
    assert copied.git_commit() == own + "+"
