"""The engine on a model without weights: who shares a batch, who leaves, who is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from serving_fakes import FakeModel, job, running, until
from twostep.serving.engine import Engine
from twostep.serving.jobs import Event, Finished, FullError, Left, NotReadyError, Observer, Preview

Events = list[tuple[int, Event]]


def kinds(events: Events) -> list[tuple[int, type]]:
    return [(seed, type(event)) for seed, event in events]


def finished(events: Events) -> list[int]:
    return sorted(seed for seed, event in events if isinstance(event, Finished))


def hold(model: FakeModel, engine: Engine, events: Events, seed: int = 99) -> None:
    """Has the model busy with step 1 of a picture of another size until its gate opens."""
    model.reached.clear()
    model.gate.clear()
    engine.submit([job(seed, events, size=(16, 16))])
    assert model.reached.wait(10)


def test_one_picture_alone_has_its_preview_before_step_2() -> None:
    model, events = FakeModel(), []
    with running({"a": model}) as engine:
        engine.submit([job(7, events, preview=True)])
        until(lambda: len(events) == 2)
    assert [stage for stage, _ in model.log] == ["first", "preview", "step 1", "finish"]
    assert kinds(events) == [(7, Preview), (7, Finished)]
    assert events[0][1].pixels[0, 0].tolist() == [7, 1, 0]
    assert events[1][1].pixels[0, 0].tolist() == [7, 2, 0]


def test_those_of_one_size_share_batches_up_to_the_largest() -> None:
    model, events = FakeModel(), []
    with running({"a": model}, max_batch=3) as engine:
        hold(model, engine, events)
        for seed in range(5):
            engine.submit([job(seed, events, size=(8, 8) if seed != 1 else (8, 16))])
        model.gate.set()
        until(lambda: len(finished(events)) == 6)
    assert ("first", [0, 2, 3]) in model.log
    assert ("first", [1]) in model.log
    assert ("first", [4]) in model.log
    assert max(len(seeds) for _, seeds in model.log) == 3


def test_who_comes_between_the_steps_catches_up_and_all_go_on_together() -> None:
    model, events = FakeModel(), []
    with running({"a": model}, max_batch=4) as engine:
        model.gate.clear()
        engine.submit([job(0, events)])
        assert model.reached.wait(10)
        engine.submit([job(seed, events) for seed in range(1, 6)])
        model.gate.set()
        until(lambda: len(finished(events)) == 6)
    assert model.log[:4] == [
        ("first", [0]), ("first", [1, 2, 3]), ("step 1", [0, 1, 2, 3]), ("finish", [0, 1, 2, 3]),
    ]  # fmt: skip


def test_a_batch_waits_for_more_only_where_the_last_had_more_than_one() -> None:
    model, events = FakeModel(), []
    with running({"a": model}, batch_wait=0.3) as engine:
        engine.submit([job(0, events)])
        until(lambda: len(finished(events)) == 1, seconds=0.25)
        engine.submit([job(seed, events) for seed in (1, 2)])
        until(lambda: len(finished(events)) == 3, seconds=0.25)
        engine.submit([job(3, events)])
        engine.submit([job(4, events)])
        until(lambda: len(finished(events)) == 5)
    assert [seeds for stage, seeds in model.log if stage == "first"] == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_who_is_gone_leaves_before_step_1(how: str) -> None:
    model, events = FakeModel(), []
    with running({"a": model}) as engine:
        hold(model, engine, events)
        gone = job(1, events, seconds=60 if how == "cancelled" else 0.05)
        engine.submit([gone, job(2, events)])
        if how == "cancelled":
            gone.cancel()
        else:
            until(lambda: gone.gone(time.monotonic()))
        model.gate.set()
        until(lambda: finished(events) == [2, 99])
    assert all(1 not in seeds for _, seeds in model.log)
    assert all(seed != 1 for seed, _ in events)


def test_who_is_cancelled_leaves_between_the_steps() -> None:
    model, events = FakeModel(), []
    counted: list[tuple[str, int]] = []

    class Counting(Observer):
        def left(self, reason: str, pictures: int) -> None:
            counted.append((reason, pictures))

    with running({"a": model}, observer=Counting()) as engine:
        model.gate.clear()
        jobs = [job(1, events), job(2, events)]
        engine.submit(jobs)
        assert model.reached.wait(10)  # in step 1
        jobs[0].cancel()
        model.gate.set()
        until(lambda: finished(events) == [2])
    assert model.log == [("first", [1, 2]), ("step 1", [2]), ("finish", [2])]
    assert counted == [("gone_between_steps", 1)]


def test_all_or_none_of_a_request_are_taken_and_a_full_line_says_when_to_come() -> None:
    model, events = FakeModel(), []
    with running({"a": model}, line=4) as engine:
        hold(model, engine, events)
        engine.submit([job(seed, events) for seed in (1, 2, 3)])
        with pytest.raises(FullError) as caught:
            engine.submit([job(seed, events) for seed in (4, 5)])
        assert caught.value.retry_after >= 1
        assert engine.waiting == 3
        fourth = job(4, events)
        engine.submit([fourth])
        fourth.cancel()  # who is gone makes room at once
        engine.submit([job(5, events)])
        model.gate.set()
        until(lambda: finished(events) == [1, 2, 3, 5, 99])
        with pytest.raises(KeyError):
            engine.submit([job(6, events, model="b")])


def test_one_bad_picture_spoils_no_other_of_its_batch() -> None:
    model, events = FakeModel(), []
    model.bad = {2}
    with running({"a": model}) as engine:
        engine.submit([job(seed, events) for seed in (1, 2, 3)])
        until(lambda: len(events) == 3)
        assert finished(events) == [1, 3]
        assert (2, Left("failed")) in events
        engine.submit([job(4, events)])  # it works on
        until(lambda: 4 in finished(events))


def test_models_take_turns_step_by_step() -> None:
    short, long, events = FakeModel(2), FakeModel(8), []
    with running({"a": short, "b": long}) as engine:
        long.gate.clear()
        engine.submit([job(50, events, model="b")])
        assert long.reached.wait(10)
        engine.submit([job(1, events)])
        long.gate.set()
        until(lambda: len(finished(events)) == 2)
    # Two steps in turn with the long one's, not after all of them.
    assert [seed for seed, _ in events] == [1, 50]


def test_one_step_is_enough() -> None:
    model, events = FakeModel(1), []
    with running({"a": model}) as engine:
        engine.submit([job(1, events)])
        until(lambda: finished(events) == [1])
    assert model.log == [("first", [1]), ("finish", [1])]


def test_closing_finishes_what_is_there_and_takes_no_more() -> None:
    model, events = FakeModel(), []
    with running({"a": model}) as engine:
        hold(model, engine, events)
        engine.submit([job(1, events)])
        closing = threading.Thread(target=engine.close)
        closing.start()
        until(lambda: engine.state == "draining")
        with pytest.raises(NotReadyError, match="draining"):
            engine.submit([job(2, events)])
        model.gate.set()
        closing.join(10)
        assert finished(events) == [1, 99]
        assert engine.state == "closed"


def test_who_cannot_be_finished_in_time_is_told() -> None:
    model, events = FakeModel(), []
    with running({"a": model}) as engine:
        hold(model, engine, events)
        engine.submit([job(1, events)])
        closing = threading.Thread(target=engine.close, args=(0.05,))
        closing.start()
        closing.join(0.3)
        model.gate.set()
        closing.join(10)
    assert sorted(events, key=lambda each: each[0]) == [(1, Left("closed")), (99, Left("closed"))]


def test_models_that_cannot_be_loaded() -> None:
    with running({}, no_load=RuntimeError("no weights")) as engine:
        assert not engine.wait_ready(5)
        assert engine.state == "failed"
        assert str(engine.error) == "no weights"
        with pytest.raises(NotReadyError, match="failed"):
            engine.submit([job(1, [])])


def test_engine_knows_no_web_and_application_no_torch() -> None:
    code = (
        "import sys, twostep.serving.engine as e; print('fastapi' in sys.modules, 'torch' in sys.modules);"
        "import twostep.serving.app, twostep.serving.server; print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "False"]
