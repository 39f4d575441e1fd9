"""Files of prompts that a stranger, or a slip, made: each mistake with its line."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from twostep.cli.arguments import read_prompts
from twostep.data.prompts import PromptError, load_prompts
from twostep.errors import UserError
from twostep.inference.generate import Picture

READ: dict[str, tuple[str, bytes, list[str]]] = {
    "mark": ("p.txt", b"\xef\xbb\xbfa dog\na cat\n", ["a dog", "a cat"]),
    "mark in jsonl": ("p.jsonl", b'\xef\xbb\xbf{"prompt": "a dog"}\n', ["a dog"]),
    "CRLF": ("p.txt", b"a dog\r\n\r\na cat\r\n", ["a dog", "a cat"]),
    "no line of its own": (
        "p.txt",
        "a\u2028dog\nb\u0085c\nd\x0ce\n".encode(),
        ["a\u2028dog", "b\u0085c", "d\x0ce"],
    ),
    "line separator in a string": (
        "p.jsonl",
        '{"prompt": "a\u2028dog"}\n'.encode(),
        ["a\u2028dog"],
    ),
    "no last line feed": ("p.txt", b"a dog\na cat", ["a dog", "a cat"]),
}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("p.txt", b"a dog\n\xff\xfe\n", r"p\.txt:2: not UTF-8 text"),
    "zipped": ("p.txt", gzip.compress(b"a dog"), r"p\.txt:1: not UTF-8 text"),
    "NUL": ("p.txt", b"a dog\na\0cat\n", r"p\.txt:2: a prompt must not hold NUL"),
    "long": ("p.txt", b"a dog\n" + b"x" * 20_001, r"p\.txt:2: a prompt of 20001 characters"),
    "a line without end": ("p.txt", b"x" * (1 << 21), r"p\.txt:1: a line of more than 1048576"),
    "only spaces": ("p.txt", b" \n\n", "holds no prompts"),
    "no object": ("p.jsonl", b'{"prompt": "a"}\n[1]\n', r"p\.jsonl:2: expected an object"),
    "no string": ("p.jsonl", b'{"prompt": {"a": [1]}}\n', r"p\.jsonl:1: prompt must be a string, got \{'a'"),
    "nested": ("p.jsonl", b'{"prompt": ' + b"[" * 50_000, r"p\.jsonl:1: expected an object"),
    "long integer": ("p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", r"p\.jsonl:1: expected an object"),
    "half a character": ("p.jsonl", b'{"prompt": "a\\ud800"}', r"p\.jsonl:1: half a character"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path) -> None:
    name, content, prompts = READ[case]
    (tmp_path / name).write_bytes(content)
    assert load_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message) as error:
        load_prompts(str(tmp_path / name), option="--prompts")
    assert str(error.value).startswith("--prompts: ")
    assert len(str(error.value)) < 600


def test_files_without_end_and_folders(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "folder.txt").mkdir()
    for name in ("pipe.txt", "zero.txt", "folder.txt"):
        with pytest.raises(PromptError, match="a folder, a pipe or a device"):
            load_prompts(str(tmp_path / name))


def test_corrupt_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(arrow.table({"prompt": [f"a dog {i}" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\xff" * 3800
    path.write_bytes(content)
    with pytest.raises(PromptError, match="cannot be read"):
        load_prompts(str(path))


def test_fewer_than_asked_for_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a\nb\na\n")
    assert len(load_prompts(str(tmp_path / "p.txt"), 5)) == 2
    assert "has 2 distinct prompts, not 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"a\xff\n", "stdin:1: not UTF-8"),
        (b"x\ny\0\n", "stdin:2: .* NUL"),
        (b"x" * 200_000, "stdin:1"),
    ],
)
def test_standard_input(given: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    with pytest.raises(UserError, match=message):
        read_prompts(["-"])
    with pytest.raises(UserError, match="half a character"):
        read_prompts(["a\udcff"])


def test_json_lines_cannot_steer_a_terminal() -> None:
    prompt = "a\x9b31m\u202e两只狗\x7f"
    picture = Picture(Path("p.png"), prompt, 0, 2, model="m", preview=None, made=True)
    text = picture.as_json()
    assert text.isprintable()
    assert "两只狗" in text
    assert json.loads(text)["prompt"] == prompt
