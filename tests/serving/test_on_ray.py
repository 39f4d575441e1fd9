"""The application on a Ray of this machine: kills, updates and load, with a model without weights.

About 25 s on an idle core; skipped where Ray is not installed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest
from PIL import Image

from serving_fakes import FakeModel, HandingModel, MortalModel, offer, until
from twostep.serving.app import AppOptions
from twostep.serving.requests import Limits

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SECONDS = 0.05  # of a stage of the fake model


def fakes(steps: int) -> dict[str, FakeModel]:
    return {"a": FakeModel(steps=steps, seconds=SECONDS)}


def offers(steps: int) -> dict[str, Any]:
    return {"a": offer("a", steps)}


def options(**changes: Any) -> Any:
    from twostep.serving.on_ray import ClusterOptions

    app = AppOptions(limits=Limits(deadline=60), drain_seconds=20)
    return replace(ClusterOptions(cpus=0.1, max_batch=4, app=app, health_seconds=1.0), **changes)


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mortal") / "sentence"


@pytest.fixture(scope="module")
def found() -> list[Any]:
    """What whole replicas streamed."""
    return []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from twostep.serving.cluster import Cluster

    with pytest.MonkeyPatch.context() as patch:
        tests = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, *sys.path]))
        patch.setenv("RAY_ADDRESS", "local")
        found = Cluster("127.0.0.1", 0)
        yield found
        found.end()


def deploy(cluster: Any, stages: dict[str, Any], *, steps: int = 2, **changes: Any) -> None:
    from twostep.serving.on_ray import build

    cluster.deploy(build(stages, partial(offers, steps), options(**changes)))


def replicas(cluster: Any) -> int:
    """Those that take requests."""
    about = cluster.serve.status().applications["twostep"].deployments["models"]
    return int(about.replica_states.get("RUNNING", 0))


def streamed(cluster: Any) -> list[Any]:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="x", max_retries=0)
    events = client.images.generate(
        prompt="a cat", stream=True, partial_images=1, extra_body={"seed": 5}
    )
    return [(event.type.rpartition(".")[2], event.b64_json) for event in events]


def colour(picture: str) -> tuple[int, int]:
    """A fake picture's seed and steps."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        red, green, _ = image.convert("RGB").getpixel((0, 0))  # type: ignore[misc]
    return red, green


class Clients:
    """Clients that ask again as soon as they are answered, and do not try again."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.statuses: Counter[str] = Counter()
        self.pictures: set[tuple[int, int]] = set()
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=60)
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(i,)) for i in range(count)]

    def _work(self, first: int) -> None:
        seed = first
        while not self._end.is_set():
            seed += 10
            try:
                answer = self._client.images.generate(prompt="a cat", extra_body={"seed": seed})
                assert answer.data is not None
                self.pictures.add(colour(answer.data[0].b64_json or ""))
                self.statuses["200"] += 1
            except openai.APIStatusError as error:
                self.statuses[str(error.status_code)] += 1
            except openai.APIError as error:
                self.statuses[type(error).__name__] += 1

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def wait(self, count: int) -> None:
        """Until so many more were answered."""
        before = self.statuses.total()
        until(lambda: self.statuses.total() >= before + count, seconds=60)


def test_a_killed_replica_costs_no_request(cluster: Any, sentence: Path, found: list[Any]) -> None:
    deploy(cluster, {"models": partial(MortalModel.load, sentence, SECONDS)}, replicas=2)
    found += streamed(cluster)
    assert [kind for kind, _ in found] == ["partial_image", "completed"]
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="multiples of 8"):
        client.images.generate(prompt="a cat", size="9x9")  # type: ignore[call-overload]
    with urlopen(f"{cluster.url}/ready", timeout=10) as answer:
        assert json.load(answer) == {"status": "ready"}
    with Clients(cluster.url) as clients:
        clients.wait(8)
        sentence.touch()
        until(lambda: not sentence.exists(), seconds=30)
        clients.wait(12)
    assert set(clients.statuses) == {"200"}
    until(lambda: replicas(cluster) == 2, seconds=60)  # another one took its place


def test_a_new_student_takes_over_and_a_long_queue_brings_replicas(cluster: Any) -> None:
    """Not one of the requests is lost or tried again by its client."""
    with Clients(cluster.url, count=8) as clients:
        clients.wait(8)
        deploy(
            cluster, {"models": partial(fakes, 3)}, steps=3,
            autoscale=(1, 3), max_batch=1, upscale_seconds=0.5,
        )  # fmt: skip
        with urlopen(f"{cluster.url}/v1/models", timeout=10) as answer:
            assert json.load(answer)["data"][0]["twostep"]["steps"] == 3
        until(lambda: replicas(cluster) >= 2, seconds=60)
        clients.wait(8)
    assert set(clients.statuses) == {"200"}
    # Both students' pictures were sent: the fake ones say how many steps they took.
    assert {steps for _, steps in clients.pictures} == {2, 3}


def test_a_line_of_two_stages_makes_the_same_picture(cluster: Any, found: list[Any]) -> None:
    stages = {
        "first_step": partial(HandingModel.stage, 1, SECONDS),
        "second_step": partial(HandingModel.stage, 2, SECONDS),
    }
    deploy(cluster, stages)
    assert streamed(cluster) == found
