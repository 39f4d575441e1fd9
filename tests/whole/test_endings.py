"""How commands end: 0, 1 with a reason, 2, 130 or 143; never with a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twostep import cli
from twostep.cli.endings import ended_by_signals


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/full/x"), 1, "stopped: /full/x: No space left"),
        (PermissionError(13, "Permission denied", "/root"), 1, "stopped: /root: Permission denied"),
        (MemoryError(), 1, "stopped: out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 1, "stopped, out of memory: CUDA"),
    ],
)
def test_what_the_machine_refuses(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith(f"twostep: {said}")


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        cli.main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_outside_the_loop(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    put_away = []
    with pytest.raises(SystemExit) as stopped, ended_by_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        finally:
            put_away.append(True)
    assert (stopped.value.code, put_away) == (code, [True])
    assert capsys.readouterr().err == f"twostep: ended by {number.name}; run it again to go on\n"
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_a_command_that_is_stopped_says_so_in_one_line(
    tmp_path: Path,
) -> None:
    """While it generates, far more than there is time for."""
    command = [sys.executable, "-m", "twostep", "generate", "--model", "zoo:emoji-student", "a dog"]
    command += ["--count", "100000", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("out/*.png")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors.splitlines()[-1] == "twostep: ended by SIGTERM; run it again to go on"
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("out/.*"))


def test_control_characters_of_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twostep", "distill", "zoo:\x1b[2Jx"])
    with pytest.raises(SystemExit):
        cli.main()
    errors = capsys.readouterr().err
    assert "\x1b" not in errors
    assert r"\x1b[2Jx" in errors
