"""`twostep serve --ray` as a process, over a cluster that only writes down what it is told."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from serving_fakes import until
from twostep.errors import InputError
from twostep.runtime.ray_cluster import prepare_environment
from twostep.serving.cluster import Cluster, ClusterError, serve_on_cluster


class Written:
    """Deploys what it is given; `bad` is what it cannot."""

    url, bad = "http://127.0.0.1:1", "bad"

    def __init__(self, *, is_own: bool) -> None:
        self.is_own = is_own
        self.log: list[str] = []

    def deploy(self, application: str) -> None:
        self.log.append(application)
        if application == self.bad:
            raise ClusterError("no replica starts")

    def end(self) -> None:
        self.log.append("ended")


def signals(cluster: Written, *steps: tuple[int, int]) -> None:
    """Sends each signal once so much was written."""
    for length, number in steps:
        until(lambda length=length: len(cluster.log) >= length)  # type: ignore[misc]
        os.kill(os.getpid(), number)


def test_a_hangup_deploys_anew_and_sigterm_ends() -> None:
    cluster: Any = Written(is_own=True)
    builds = iter(["old", "bad", "new"])
    ready: list[str] = []
    steps = [(1, signal.SIGHUP), (2, signal.SIGHUP), (3, signal.SIGTERM)]
    sender = threading.Thread(target=signals, args=(cluster, *steps))
    sender.start()
    serve_on_cluster(cluster, lambda: next(builds), on_ready=ready.append)
    sender.join(10)
    # What cannot be deployed later leaves the old application where it is.
    assert cluster.log == ["old", "bad", "new", "ended"]
    assert ready == [cluster.url]


def test_another_cluster_is_left_running() -> None:
    cluster: Any = Written(is_own=False)
    serve_on_cluster(cluster, lambda: "new")
    assert cluster.log == ["new"]


def test_what_cannot_be_deployed_at_first_is_said() -> None:
    with pytest.raises(ClusterError, match="no replica starts"):
        serve_on_cluster(Written(is_own=True), lambda: "bad")  # type: ignore[arg-type]


def test_a_machine_without_room_is_told_before_replicas_wait_for_it() -> None:
    cluster = object.__new__(Cluster)
    cluster.is_own = True
    cluster.ray = type("Ray", (), {"cluster_resources": staticmethod(lambda: {"CPU": 2.0})})
    cluster.check_room({"CPU": 2.0})
    with pytest.raises(InputError, match="3 CPUs are needed for all replicas, this machine has 2"):
        cluster.check_room({"CPU": 3.0})
    cluster.is_own = False  # machines may be added
    cluster.check_room({"CPU": 3.0})


@pytest.mark.parametrize(("address", "loopback"), [("local", "0"), ("10.0.0.1:6379", None)])
def test_nothing_is_sent_home_and_an_own_cluster_keeps_to_the_loopback(
    monkeypatch: pytest.MonkeyPatch, address: str, loopback: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": address})
    prepare_environment()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == loopback
