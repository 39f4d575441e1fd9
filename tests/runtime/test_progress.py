"""Bars and lines: what stands where nobody looks at a terminal, and in 80 columns."""

from __future__ import annotations

import re

import pytest

from twostep.distill.progress import TurnProgress
from twostep.runtime import progress
from twostep.runtime.progress import clock, progress_bar, working

LOSSES = {
    "loss": 2.4912345, "final/distribution_matching": 0.61234, "critic/accuracy_final": 0.625,
    "score/flow_matching": 0.269, "validation/kernel_distance": -0.265,
    "validation/diversity": 0.7123,
}  # fmt: skip


def test_clock() -> None:
    assert [clock(s) for s in (0, 7.4, 754, 3723, -3)] == [
        "0:00",
        "0:07",
        "12:34",
        "1:02:03",
        "0:00",
    ]


def test_lines_are_whole_and_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with working("loading " + "a" * 100):
        assert capsys.readouterr().err == "loading " + "a" * 100 + "\n"
    with progress_bar("teach", 4, unit="samples") as advance:
        assert capsys.readouterr().err == "teach: 0 of 4\n"
        advance(1)
        advance(3)
    (last,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"teach: 4 of 4 \(100%\), [\d.]+ samples/s", last)
    with progress_bar("hidden", 4, hidden=True) as advance:
        advance(4)
    assert capsys.readouterr().err == ""


def test_silence_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    monkeypatch.setattr(progress, "_LINE", 0.05)
    lines = progress.Lines("loading", patience=0.02)
    deadline = time.monotonic() + 20
    said = ""
    while "(0:00)" not in said and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capsys.readouterr().err
    lines.close()
    assert said.startswith("loading\nloading (0:00)\n")


def test_a_record_is_one_full_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TurnProgress(100, None, others=20) as bar:
        bar.begin(0, 0.0)
        for done in range(10):
            bar.advance(
                10.0 * (done + 1), turn=0, phase=f"fakes and critic alone, {done + 1} of 10"
            )
        for turn in range(1, 51):
            bar.advance(100.0 + turn, turn=turn)
        bar.show(LOSSES)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "distil: turn 50 of 100, 50%, 2:30 left, 2:30 spent, loss 2.49, dm 0.612, "
        "critic 0.625, score 0.269, distance -0.265, diversity 0.712"
    )


def test_time_left_is_of_this_run_and_ends_with_the_minutes() -> None:
    bar = TurnProgress(100, None, hidden=True)
    bar.begin(50, 1000.0)  # a run that goes on, on another machine
    assert bar.left is None
    bar.advance(1002.0, turn=51)
    assert bar.left == pytest.approx(98.0)
    short = TurnProgress(100, 20.0, hidden=True)
    short.begin(50, 1000.0)
    short.advance(1190.0, turn=51)
    assert short.left == pytest.approx(10.0)
    assert short.share == pytest.approx(1190 / 1200)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_bar_fits(width: int) -> None:
    from rich.console import Console

    bar = TurnProgress(10_000, None, others=500, hidden=True)
    bar.begin(0, 0.0)
    bar.advance(3723.0, turn=9_999, phase="fakes and critic alone, 19 of 20")
    bar.show(LOSSES)
    bar._console = Console(width=width)
    lines = bar._drawn().splitlines()
    assert all(len(line) < width for line in lines)
    assert "turn 9999 of 10000" in lines[0]
    if width >= 80:
        assert "left" in lines[0]
        assert lines[0][0] in "━┈#."
        assert lines[1].startswith("fakes and critic alone, 19 of 20  loss 2.49")


def test_the_bar_is_drawn_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("twostep.distill.progress.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TurnProgress(10, None) as bar:
        bar.begin(0, 0.0)
        bar.print("alarm: [not markup]")
        for turn in range(1, 6):
            bar.advance(float(turn), turn=turn)
        bar.show({"loss": 0.5})
    said = capsys.readouterr().err
    assert "alarm: [not markup]" in said
    assert "turn 5 of 10  50%  0:05 left  0:05" in said
    assert "loss 0.5" in said
