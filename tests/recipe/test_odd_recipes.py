"""Recipes that a stranger, or a slip, wrote: one short message in no time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from twostep.errors import RecipeError
from twostep.recipe.loading import load
from twostep.recipe.rules import MOST, flatten
from twostep.recipe.schema import Recipe

GOOD = "name: x\nteacher:\n  model: m\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)  # fmt: skip

TEXTS: dict[str, tuple[bytes, str]] = {
    "bomb": (BOMB.encode() + GOOD.encode(), "found an alias"),
    "bomb in a key": (b"name: &a [1]\nteacher: {model: *a}\n", "found an alias"),
    "not UTF-8": (b"name: \xff\n", "is not UTF-8 text"),
    "UTF-16": (GOOD.encode("utf-16"), "is not UTF-8 text"),
    "no day": (b"name: 2024-99-99\n", "not valid YAML"),
    "long integer": (b"name: " + b"9" * 5000 + b"\n", "not valid YAML"),
    "nested": (b"name: " + b"[" * 3000, "deeper ones, than a recipe has"),
    "nested mappings": (b"name: " + b"{a: " * 3000, "deeper ones, than a recipe has"),
    "many keys": (b"".join(b"k%d: 1\n" % i for i in range(60_000)), "more values"),
    "large": (b"# " + b"x" * (1 << 20), "a recipe at most 1048576"),
    "key twice": (GOOD.encode() + b"name: y\n", "the key 'name' a second time"),
    "section twice": (GOOD.encode() + b"teacher:\n  model: n\n", "the key 'teacher' a second time"),
    "a tag of Python": (b"name: !!python/object/apply:os.system [touch CANARY]\n", "not valid YAML"),
    "a list": (b"[1]\n", "must hold a mapping, found list"),
    "empty": (b"", "must hold a mapping, found NoneType"),
    "long value": (GOOD.encode() + b"shift: " + b"x" * 100_000, "(100002 characters)"),
    "many wrong keys": (GOOD.encode() + b"".join(b"w%d: 1\n" % i for i in range(5000)), "mistakes more"),
    "control": (GOOD.encode() + b'shift: "\\e[2J"\n', "shift: "),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_an_odd_text(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = TEXTS[case]
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(RecipeError) as error:
        load(path)
    assert time.monotonic() - started < 10
    assert message in str(error.value)
    assert len(str(error.value)) < 2000
    assert not (tmp_path / "CANARY").exists()


def test_files_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecipeError, match="no ordinary file"):
            load(path)
    for path in (tmp_path / "none", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(RecipeError, match="no recipe at"):
            load(path)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(tmp_path / "r.yaml").name == "x"


VALUES: dict[str, str] = {
    "training.seed=-1": r"training\.seed: must be from 0 to 2\^63 - 1, got -1",
    "data.seed=99999999999999999999": r"data\.seed: must be from 0",
    "teacher.steps=100000000000000000000000000": r"teacher\.steps: must be at most 10000, got 1",
    "data.prompt_count=99999999": r"data\.prompt_count: the embedded world has 1000000",
    "training.betas=[0, 1]": r"training\.betas: each must be below 1, got \[0\.0, 1\.0\]",
    "critic.tau_range=[1, 0]": r"critic\.tau_range: must ascend",
    "critic.tau_range=[0.5, 0.5]": r"critic\.tau_range: must ascend",
    "training.validation_samples=1": r"training\.validation_samples: must be at least 2",
    "output=~/x": "~ is not read as a home folder",
    "losses.final.weight=0 losses.step1.weight=0": r"losses\.final and losses\.step1: a weight",
    "training.turns="
    + "9" * 4000: r"training\.turns: must be at most 10{12}, got a number of more",
}


@pytest.mark.parametrize("overrides", VALUES)
def test_an_odd_value(overrides: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    parts = overrides.split(" ") if "losses" in overrides else [overrides]
    with pytest.raises(RecipeError, match=VALUES[overrides]) as error:
        load(tmp_path / "r.yaml", parts)
    assert len(str(error.value)) < 2000


def test_every_limit_is_of_a_setting() -> None:
    values: dict[str, Any] = flatten(
        Recipe.parse({"name": "x", "teacher": {"model": "m"}}).model_dump()
    )
    assert set(MOST) <= set(values)
    assert all(values[key] <= most for key, most in MOST.items())
