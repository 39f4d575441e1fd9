"""`twostep serve` as a process: the demo with OpenAI's client, the documented lines, the end."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from serving_fakes import until
from serving_process import Served
from twostep.cli import app
from twostep.cli.serve import parse_choice
from twostep.errors import UserError
from twostep.inference.sampler import Sampler
from twostep.method.rollout import seeded_noise
from twostep.runtime.images import to_bytes

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    server = Served("--demo")
    yield server
    server.process.kill()
    server.process.wait()


def pixels(picture: str | None) -> np.ndarray:
    assert picture is not None
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def test_the_demo_streams_a_preview_and_the_samplers_picture(demo: Served) -> None:
    client, prompt = demo.client(), "two cats on a red background"
    assert [model.id for model in client.models.list()] == ["emoji-student", "emoji-teacher"]
    started, found = time.monotonic(), []
    for event in client.images.generate(
        prompt=prompt, stream=True, partial_images=1, extra_body={"seed": 3}
    ):
        found.append((event.type, time.monotonic() - started, pixels(event.b64_json)))
    assert [kind.split(".")[1] for kind, _, _ in found] == ["partial_image", "completed"]
    sampler = Sampler.load("zoo:emoji-student")
    sample = sampler.sample([prompt], seeded_noise([3], sampler.noise_shape(64, 64)))
    assert sample.preview is not None
    for (_, _, shown), latents in zip(found, (sample.preview, sample.latents), strict=True):
        expected = to_bytes(sampler.decoder.decode(latents))[0].permute(1, 2, 0).int().numpy()
        assert np.abs(shown - expected).max() <= 1


def test_teacher_and_student_begin_with_equal_noise_and_agree(demo: Served) -> None:
    pictures = {}
    for model in ("emoji-student", "emoji-teacher"):
        answer = demo.client().images.generate(
            prompt="a dog on a blue background", model=model, n=4, extra_body={"seed": 5}
        )
        pictures[model] = np.stack([pixels(each.b64_json) for each in answer.data or []])
    student, teacher = pictures["emoji-student"], pictures["emoji-teacher"]
    same = np.abs(student - teacher).mean()
    other = np.abs(student - np.roll(teacher, 1, axis=0)).mean()
    assert same < other


def documented(kind: str) -> list[str]:
    blocks = re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)
    return [block for block in blocks if "127.0.0.1" in block]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on PATH")
@pytest.mark.parametrize("line", documented("bash"))
def test_documented_curl_lines_work(demo: Served, line: str) -> None:
    words = shlex.split(line.replace("http://127.0.0.1:8000", demo.url).replace("\\\n", " "))
    assert words[0] == "curl"
    answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    if "stream" in line:
        events = re.findall(r"^event: (.*)$", answer, flags=re.M)
        assert events == ["image_generation.partial_image", "image_generation.completed"]
    elif "generations" in line:
        assert [each["seed"] for each in json.loads(answer)["data"]] == [1, 2]
    else:
        assert len(json.loads(answer)["data"]) == 2


def test_documented_python_works(demo: Served, tmp_path: Path) -> None:
    (code,) = documented("python")
    code = code.replace("http://127.0.0.1:8000", demo.url)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)
    for name in ("partial_image.png", "completed.png"):
        with Image.open(tmp_path / name) as image:
            assert image.info["seed"] == "1"


def test_sigterm_finishes_what_is_in_line_and_ends(demo: Served) -> None:
    """The last test of this process."""
    answers: list[int] = []

    def ask(number: int) -> None:
        answer = demo.client().images.generate(
            prompt="a cat", model="emoji-teacher", n=10, extra_body={"seed": number}
        )
        answers.append(len(answer.data or []))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: demo.waiting() >= 19)  # all thirty are in, some of them between their steps
    assert demo.end() == 0
    for thread in threads:
        thread.join(30)
    assert answers == [10, 10, 10]
    assert demo.lines[-1]["event"] == "ended"
    requests = [line for line in demo.lines if line["event"] == "request"]
    assert {"request_id", "ms", "status", "model", "size", "n"} <= set(requests[-1])
    assert "cats" not in json.dumps(demo.lines)


def refused(*options: str) -> str:
    result = CliRunner().invoke(app, ["serve", *options])
    assert isinstance(result.exception, UserError)
    return str(result.exception)


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    assert "--host: ::" in refused("--demo", "--host", "::")
    assert "at least one model" in refused()
    assert "--demo" in refused("--demo", "--model", "zoo:emoji-student")
    assert "two models are called" in refused(
        "--model", "zoo:emoji-student", "--model", "zoo:emoji-student"
    )
    keys = tmp_path / "keys"
    keys.write_text("# mine\nshort\n")
    assert "at least 16" in refused("--demo", "--api-keys", str(keys))
    assert "cannot be read" in refused("--demo", "--api-keys", str(tmp_path / "none"))
    keys.write_text("# none\n")
    assert "holds no key" in refused("--demo", "--api-keys", str(keys))
    assert "--port" in refused("--demo", "--host", "192.0.2.1", "--api-keys", str(good(keys)))


def good(keys: Path) -> Path:
    keys.write_text("a-key-that-is-long-enough\n")
    return keys


@pytest.mark.parametrize(
    ("text", "name", "model", "steps"),
    [
        ("zoo:emoji-student", "emoji-student", "zoo:emoji-student", None),
        ("runs/x/student", "student", "runs/x/student", None),
        ("slow=zoo:emoji-teacher@4", "slow", "zoo:emoji-teacher", 4),
        ("zoo:emoji-teacher@4", "emoji-teacher@4", "zoo:emoji-teacher", 4),
        ("a=b=c", "a", "b=c", None),
    ],
)  # fmt: skip
def test_models_are_named(text: str, name: str, model: str, steps: int | None) -> None:
    found = parse_choice(text)
    assert (found.name, found.model, found.steps) == (name, model, steps)


def test_without_the_extra_one_sentence_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "twostep.serving.server", None)
    message = refused("--demo")
    assert 'serve needs this package\'s extra "serve"' in message


def test_what_a_cluster_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--replicas: is for a cluster" in refused("--demo", "--replicas", "2")
    assert "--two-stage: is for a cluster" in refused("--demo", "--two-stage")
    assert "--replicas" in refused("--demo", "--ray", "--replicas", "2", "--autoscale", "1:2")
    for wrong in ("2", "3:2", "0:4", "a:b"):
        assert f"MIN <= MAX, got '{wrong}'" in refused("--demo", "--ray", "--autoscale", wrong)
    assert "--share" in refused("--demo", "--ray", "--share", "1.5")
    assert "--two-stage: emoji-teacher has no second step" in refused(
        "--demo", "--ray", "--two-stage"
    )
    monkeypatch.setitem(sys.modules, "ray", None)
    message = refused("--model", "zoo:emoji-student", "--ray")
    assert '--ray needs this package\'s extra "ray"' in message
