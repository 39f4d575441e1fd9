"""The lock with hashes holds what the tests run with."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ENTRY = re.compile(
    r"^([a-z0-9][a-z0-9._-]*)(?:\[[^\]]*\])?==([^\s;]+)(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_versions_are_those_of_the_constraints_and_every_file_has_its_hash() -> None:
    text = (REPOSITORY / "requirements.lock").read_text()
    locked = {canonical(n): (v, rest) for n, v, rest in ENTRY.findall(text)}
    pinned = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        name, same, version = line.partition("==")
        if same:
            pinned[canonical(name)] = version
    assert len(locked) > 100
    assert {n: v for n, (v, _) in locked.items() if n in pinned} == {
        n: v for n, v in pinned.items() if n in locked
    }
    # Not of our own requirements, but of what other systems need in their place.
    assert len(pinned.keys() - locked.keys()) < 12, sorted(pinned.keys() - locked.keys())
    for name, (_, rest) in locked.items():
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", rest)
        assert hashes, name
