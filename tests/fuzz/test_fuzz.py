"""The fuzz target on its corpus, whole and mutated; `target.py` alone goes on for longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fuzz.target import CORPUS, READERS, mutated, read


def test_every_reader_has_its_seed() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(READERS)


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_gives_a_value_or_a_sentence(kind: str, tmp_path: Path) -> None:
    seed = (CORPUS / kind).read_bytes()
    read(kind, seed, tmp_path)
    draw = random.Random(kind)
    for _ in range(25):
        read(kind, mutated(seed, draw), tmp_path)
