"""Container and manifest: what they name is there. Nothing is built or started."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import typer
import yaml

from twostep.cli import app
from twostep.cli.serve import parse_choice

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
