from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from twostep.runtime import locks
from twostep.runtime.locks import Holder, InUseError, locked


def test_the_second_is_told_who_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked(folder, option="output and name", purpose="a"):
        assert Holder.of(folder).process == os.getpid()
        with (
            pytest.raises(
                InUseError, match=rf"^output and name: .*run is in use by process {os.getpid()} on"
            ),
            locked(folder, option="output and name", purpose="b"),
        ):
            pass
        with pytest.raises(InUseError), locked(folder, option="x", purpose="b", wait=True):
            pass
    with locked(folder, option="output and name"):
        pass
    assert InUseError.exit_code == 2


def test_the_same_work_waits_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, end = threading.Event(), threading.Event()

    def first() -> None:
        with locked(tmp_path, option="data.cache", purpose="same"):
            begun.set()
            end.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(30)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            end.set()
            thread.join()

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with locked(tmp_path, option="data.cache", purpose="same", wait=True):
        assert len(waited) == 2
    assert capsys.readouterr().err.count("this process waits for it") == 1


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib\n"
        "from twostep.runtime.locks import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r}), option='x'):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert (tmp_path / ".lock-holder.json").is_file()
    with locked(tmp_path, option="x"):
        assert Holder.of(tmp_path).process == os.getpid()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"host": 1, "process": "x"}'])
def test_a_torn_record_of_the_holder_is_no_fault(content: str, tmp_path: Path) -> None:
    (tmp_path / ".lock-holder.json").write_text(content)
    assert str(Holder.of(tmp_path)) == "process 0 on another host, since some time ago"
