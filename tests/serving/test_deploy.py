"""Container and manifest: what they name is there. Nothing is built or started."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from twostep.cli import app
from twostep.cli.serve import parse_choice
from twostep.errors import InputError

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {
    "FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD",
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = [line.partition(" ") for line in whole.splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in found]


def options(words: list[str]) -> dict[str, str | None]:
    """The command's options in a list of words; each must be one that `twostep serve` has."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {name: each for each in command.params for name in each.opts}
    found: dict[str, str | None] = {}
    while words:
        name, *words = words
        assert name in known, name
        found[name] = None if known[name].is_flag else words.pop(0)
    return found


def test_dockerfile_copies_what_is_there_and_starts_the_server() -> None:
    found = instructions()
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    kept = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), flags=re.M))
    for name, rest in found:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
            assert set(sources) <= kept
    entry, arguments = (json.loads(dict(found)[name]) for name in ("ENTRYPOINT", "CMD"))
    assert entry[:2] == ["twostep", "serve"]
    given = options(entry[2:] + arguments)
    assert ("--demo" in given, given["--port"]) == (True, dict(found)["EXPOSE"])
    assert dict(found)["USER"] != "root"


def test_manifest_asks_what_the_server_answers_and_waits_for_its_end() -> None:
    text = (ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8")
    deployment, service = yaml.safe_load_all(text)
    assert (deployment["kind"], service["kind"]) == ("Deployment", "Service")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    paths = {
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"/ready", "/health"}
    assert container["env"][0]["name"] == "TWOSTEP_API_KEY"
    given = options(list(container["args"]))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert float(given["--deadline"] or 0) + pause < spec["terminationGracePeriodSeconds"]
    assert parse_choice(given["--model"] or "").model.startswith(
        container["volumeMounts"][0]["mountPath"]
    )


def test_ray_service_deploys_the_application_that_the_command_does() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text(encoding="utf-8"))
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    given = options(application["args"]["options"].split())
    (worker,) = cluster["workerGroupSpecs"]
    for group, key in ((cluster["headGroupSpec"], "ray-head"), (worker, "ray-worker")):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert container["name"] == key
        assert {each["name"]: each.get("value") for each in container["env"]} == {
            "RAY_USAGE_STATS_ENABLED": "0",
            "TWOSTEP_API_KEY": None,
        }
        mounted = container["volumeMounts"][0]
        assert mounted["name"] == spec["volumes"][0]["name"]
        assert parse_choice(given["--model"] or "").model.startswith(mounted["mountPath"])
    ports = {
        each["name"]: each["containerPort"]
        for each in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert ports["serve"] == config["http_options"]["port"]
    grace = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert float(given["--deadline"] or 0) < grace
    least, most = map(int, (given["--autoscale"] or "").split(":"))
    assert worker["minReplicas"] == worker["replicas"] == least
    assert worker["maxReplicas"] > most  # a rolling update starts a new one first
    schema = pytest.importorskip("ray.serve.schema", reason="the extra `ray` is not installed")
    schema.ServeDeploySchema.model_validate(config)


def test_a_manifests_options_make_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    from twostep.cli.serve_ray import application

    words = "--model zoo:emoji-student --two-stage --autoscale 2:3 --queue 20 --max-batch 4"
    with pytest.raises(InputError, match="TWOSTEP_API_KEY"):
        application({"options": words})
    monkeypatch.setenv("TWOSTEP_API_KEY", "a-key-of-this-test")
    made = application({"options": words, "gpus": False})
    front = made._bound_deployment
    catalogue, given, *stations = front.init_args
    assert list(catalogue()) == ["emoji-student"]
    assert (given.autoscale, given.line, given.gpus, given.cpus) == ((2, 3), 20, 0.0, 1.0)
    assert [each._bound_deployment.name for each in stations] == ["first_step", "second_step"]
    assert "a-key-of-this-test" not in repr(vars(given.app.keys))
