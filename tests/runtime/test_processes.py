from __future__ import annotations

from pathlib import Path

import pytest

from twostep.runtime import processes
from twostep.runtime.processes import ALONE, Share, WaitError, beat, end_beats, wait_for


def test_one_process_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.time, "sleep", lambda _: pytest.fail("it waited"))
    wait_for(lambda: True, ALONE, what=lambda: "nothing")
    with pytest.raises(WaitError, match="shard 3 is missing: another process"):
        wait_for(lambda: False, ALONE, what=lambda: "shard 3 is missing")


def test_several_say_for_whom_and_give_up_without_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, other = 0.0, Share(1, 2)

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now == 1000:  # alive once more
            beat(tmp_path, other)

    monkeypatch.setattr(processes.time, "sleep", sleep)
    monkeypatch.setattr(processes.time, "monotonic", lambda: now)
    with pytest.raises(WaitError, match=r"gave up on shard 3 is missing.*one of 2: no sign"):
        wait_for(lambda: False, Share(0, 2), what=lambda: "shard 3 is missing", folder=tmp_path)
    assert now == pytest.approx(1000 + 1200, abs=3)
    assert capsys.readouterr().err.count("shard 3 is missing, for which process 0 waits") == 1
    end_beats(tmp_path)
    assert list(tmp_path.iterdir()) == []
    beat(tmp_path, ALONE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "size"), [("1", "1"), ("x", "2"), ("-1", "2"), ("0", "0")])
def test_wrong_variables_are_named(rank: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(WaitError, match="RANK and WORLD_SIZE"):
        Share.here()
