"""What is uploaded, to a hub on this machine that speaks as the real one does."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from typer.testing import CliRunner

from tiny import lora_matrices, random_transformer
from twostep.cli import app
from twostep.errors import ExportError
from twostep.exports import hub
from twostep.exports.registry import ExportOptions, export
from twostep.method.schedule import Schedule
from twostep.models.student import save_student, write_lora_pair

FIGURES = {
    "models": {
        "teacher_8": {"accuracy": {"overall": 0.9}, "frechet_to_teacher": 0.01},
        "student_2": {"accuracy": {"overall": 0.8}, "gap_closed": 0.93, "diversity": float("nan")},
    },
    "gap_closed": {"student_2": 0.93}, "images": 512, "prompts": 256,
}  # fmt: skip


class FakeHub(BaseHTTPRequestHandler):
    """The four calls of an upload; keeps what it is given."""

    files: dict[str, bytes]
    calls: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.calls.append((self.path, lines[0]["value"]["summary"]))
            url = f"http://{self.headers['Host']}/me/model/commit/abc"
            return self.answer({"commitUrl": url, "commitOid": "abc"})
        asked = json.loads(body)
        self.calls.append((self.path, asked))
        if "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in asked["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        return self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model"})

    def answer(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.files, FakeHub.calls = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in (huggingface_hub.constants, huggingface_hub.hf_api):
        monkeypatch.setattr(module, "ENDPOINT", address, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "__init__", _with(address))
    yield FakeHub
    server.shutdown()


def _with(address: str) -> Any:
    begin = huggingface_hub.hf_api.HfApi.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{"endpoint": address, "token": "hf_secret", **kwargs})

    return init


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's, of a teacher whose card names a licence."""
    home = tmp_path_factory.mktemp("hub")
    teacher = home / "teacher"
    shutil.copytree(tiny_folder, teacher)
    (teacher / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    run = home / "run"
    models = random_transformer(1), random_transformer(2)
    save_student(teacher, *models, schedule=Schedule(3.0, 0.75), folder=run / "student")
    (run / "recipe.yaml").write_text(
        f"name: fox\nteacher:\n  model: {teacher}\ndata:\n  prompts: hf:owner/captions\n"
        "  height: 32\n  width: 32\n"
    )
    (run / "report.json").write_text(json.dumps(FIGURES))
    (run / "samples").mkdir()
    for turn in (5, 10):
        Image.new("RGB", (4, 4)).save(run / "samples" / f"turn-{turn:07d}.png")
    return run / "student"


def test_an_export_goes_to_the_hub_with_a_whole_card(
    student: Path, tmp_path: Path, fake_hub: type[FakeHub]
) -> None:
    arguments = [
        "export", "--model", str(student), "--to", "diffusers", "--out", str(tmp_path / "out"),
        "--base-model", "owner/z-image", "--push", "me/model", "--private",
    ]  # fmt: skip
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ExportError)  # a student keeps no card of its teacher's
    assert "license: the teacher's card names none" in str(refused.exception)
    assert fake_hub.calls == []
    pushed = ["push", str(tmp_path / "out"), "me/model", "--private", "--license", "apache-2.0"]
    result = CliRunner().invoke(app, pushed)
    assert result.exit_code == 0, result.exception
    assert "/me/model/commit/abc" in result.output
    checked, created, *_, committed = fake_hub.calls
    assert checked[0] == "/api/validate-yaml"  # before anything is made there
    assert created[0] == "/api/repos/create"
    assert created[1]["visibility"] == "private"
    assert committed[0] == "/api/models/me/model/commit/main"
    assert {"model_index.json", "pipeline.py", "README.md", "checksums.json"} <= set(fake_hub.files)
    card = ModelCard(fake_hub.files["README.md"].decode())
    assert checked[1]["content"] == str(card)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert (data["base_model"], data["base_model_relation"]) == ("owner/z-image", "finetune")
    assert data["datasets"] == ["owner/captions"]
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {
        "gap_closed": 0.93, "accuracy": 0.8,
    }  # fmt: skip
    assert 'DiffusionPipeline.from_pretrained("me/model", trust_remote_code=True)' in card.content
    assert 'TwoStepPipeline.from_pretrained("me/model")' in card.content
    assert "images/turn-0000010.png" in set(fake_hub.files)
    assert "](images/turn-0000010.png)" in card.content
    for name, content in fake_hub.files.items():
        assert str(student.parents[1]).encode() not in content, name
        assert b"hf_secret" not in content


def test_two_lora_files_name_their_teacher_as_the_hub_has_it(
    student: Path, tmp_path: Path, fake_hub: type[FakeHub]
) -> None:
    teacher = student.parents[1] / "teacher"
    pair = tmp_path / "run" / "student"
    weights = {
        f"{name}.lora_{side}.weight": matrix
        for name, matrices in lora_matrices().items()
        for side, matrix in zip("AB", matrices, strict=True)
    }
    schedule = Schedule(3.0, 0.75)
    write_lora_pair(pair, [weights, weights], teacher=(str(teacher), None), schedule=schedule)
    export(str(pair), "lora", tmp_path / "local")
    with pytest.raises(ExportError, match=r"push: twostep.json names .*teacher, which nobody else"):
        hub.prepare(tmp_path / "local", "me/model")
    export(str(pair), "lora", tmp_path / "out", ExportOptions(base_model="owner/z-image"))
    hub.prepare(tmp_path / "out", "me/model")
    hub.push(tmp_path / "out", "me/model")
    card = ModelCard(fake_hub.files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "mit"
    assert (data["base_model"], data["base_model_relation"]) == ("owner/z-image", "adapter")
    assert "lora" in data["tags"]
    assert 'ZImagePipeline.from_pretrained("owner/z-image")' in card.content
    assert 'load_lora_weights("me/model", weight_name' in card.content
    assert json.loads(fake_hub.files["twostep.json"])["teacher"] == "owner/z-image"
    assert set(fake_hub.files) == {
        "README.md", "checksums.json", "first.safetensors", "second.safetensors", "twostep.json",
    }  # fmt: skip


def test_mistakes_are_found_before_anything_is_sent(student: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="push: expected OWNER/NAME, got 'model'"):
        hub.prepare(student, "model")
    with pytest.raises(ExportError, match=r"push: .*has no card"):
        hub.prepare(student, "me/model", licence="mit")
    with pytest.raises(ExportError, match="base_model: expected a model of the hub, OWNER/NAME"):
        export(str(student), "server", tmp_path / "x", ExportOptions(base_model="/there/teacher"))
    arguments = ["export", "--model", str(student), "--to", "comfyui", "--out", str(tmp_path / "x")]
    refused = CliRunner().invoke(app, [*arguments, "--push", "me/model"])
    assert "push: comfyui is written without a card" in str(refused.exception)
    assert not (tmp_path / "x").exists()


def test_a_hub_that_refuses_is_quoted(
    student: Path, tmp_path: Path, fake_hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(str(student), "server", tmp_path / "out")
    hub.prepare(tmp_path / "out", "me/model", licence="mit")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "vllm serve me/model --omni" in card
    assert "--model-path me/model --backend diffusers" in card

    def refuse(self: Any, **_: Any) -> None:
        raise ValueError("license is not one of ours")

    monkeypatch.setattr(ModelCard, "validate", refuse)
    with pytest.raises(ExportError, match="did not take me/model: license is not one of ours"):
        hub.push(tmp_path / "out", "me/model")
