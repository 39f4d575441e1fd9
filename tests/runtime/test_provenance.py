from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import twostep


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def commit_seen_by(package: Path) -> str:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from twostep.runtime import provenance; "
        "assert provenance.__file__.startswith(sys.argv[1]); print(provenance.git_commit())"
    )
    command = [sys.executable, "-c", code, str(package.parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_commit_is_this_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "library" / "twostep"
    (package / "runtime").mkdir(parents=True)
    for name in ("__init__.py", "runtime/__init__.py", "runtime/provenance.py"):
        shutil.copy(Path(twostep.__file__).parent / name, package / name)
    assert commit_seen_by(package) == "unknown"  # no repository at all

    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "--quiet", "--message", "another project")
    assert commit_seen_by(package) == "unknown"  # another project's

    git(tmp_path, "add", "library")
    git(tmp_path, "commit", "--quiet", "--message", "the package")
    own = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert commit_seen_by(package) == own
    (package / "__init__.py").write_text("# changed\n")
    assert commit_seen_by(package) == own + "+"
