from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twostep.runtime import files
from twostep.runtime.files import (
    WriteError,
    new_folder,
    replace_folder,
    sweep,
    temporary_beside,
    write_atomically,
    write_text,
)
from twostep.runtime.notices import printable


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    own = temporary_beside(tmp_path / "out").name
    dead = own.replace(f"-{os.getpid()}-", f"-{dead_process()}-")
    host = own.split(".")[2].split("-")[0]
    elsewhere, old = (dead.replace(host, h) for h in ("00000000", "11111111"))
    users = [".out.tmp", "out.tmp", ".out.old", ".x.123.tmp", f".{host}-1-1.tmp"]
    for name in (own, dead, elsewhere, old, *users):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    day = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / old, (day, day))
    assert sorted(p.name for p in sweep(tmp_path)) == sorted([dead, old])
    assert set(names(tmp_path)) == {own, elsewhere, *users}
    assert sweep(tmp_path / "nowhere") == []


def test_neighbours_of_a_new_folder_stay(tmp_path: Path) -> None:
    for name in ("out.tmp", ".out.old", ".out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("new")
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == [".out.old", ".out.tmp", "out", "out.tmp"]
    with pytest.raises(ValueError, match="stop"), new_folder(tmp_path / "out"):
        raise ValueError("stop")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == [".out.old", ".out.tmp", "out", "out.tmp"]


def test_files_of_a_new_folder_are_as_readable_as_the_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "weights").touch(0o600)
    assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == (
        (tmp_path / "out").stat().st_mode & 0o666
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_disk_that_refuses_ends_in_a_sentence_and_the_old_file_stays(
    error: OSError, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise error

    with pytest.raises(
        WriteError, match=rf"state.json cannot be written: {said} \(.* GiB are free"
    ):
        write_atomically(path, fail)
    assert names(tmp_path) == ["state.json"]
    assert path.read_text() == "old"
    assert WriteError.exit_code == 1


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="cannot be written: "):
        files.make_folder(tmp_path / "file" / "out")
    with (
        pytest.raises(WriteError, match="cannot be written: "),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass


def test_a_long_name_can_be_replaced(tmp_path: Path) -> None:
    folder = tmp_path / ("é" * 125)
    folder.mkdir()
    with new_folder(folder) as temporary:
        assert len(temporary.parent.name.encode()) < 120
    replace_folder(*_pair(folder))
    assert names(tmp_path) == [folder.name]


def _pair(folder: Path) -> tuple[Path, Path]:
    temporary = temporary_beside(folder)
    temporary.mkdir()
    return temporary, folder


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a dog\n两只狗", "a dog\n两只狗"),
        ("\x1b[2Ja\x9b31m\r\x07", r"\x1b[2Ja\x9b31m\r\x07"),
        ("\u202eright", r"\u202eright"),
        ("\ud800", r"\ud800"),
    ],
)
def test_control_characters_do_not_reach_the_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_is_said_is_short() -> None:
    assert len(printable("x" * 10**6)) <= 2000
