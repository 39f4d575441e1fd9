"""The examples for clusters load, and each command in them is one that the command line takes."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from twostep.cli import app
from twostep.recipe.schema import Recipe

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())


def kubernetes() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()))


def scripts() -> list[tuple[str, dict[str, str]]]:
    """Each script with the variables that it is given."""
    found = [(skypilot()["run"], skypilot()["envs"])]
    for job in kubernetes():
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["/bin/bash", "-c"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        found += [(text, {**variables, "JOB_COMPLETION_INDEX": "3"}) for text in container["args"]]
    return found


def commands() -> list[list[str]]:
    """What follows `twostep` in each line."""
    found = []
    for text, variables in scripts():
        filled = re.sub(r"\$\{?(\w+)\}?", lambda match, given=variables: given[match[1]], text)
        for line in filled.splitlines():
            words = shlex.split(line)
            if "twostep" in words:
                found.append(words[words.index("twostep") + 1 :])
    return found


def test_every_command_parses_and_its_recipe_is_valid() -> None:
    found = commands()
    assert [words[0] for words in found] == ["teach", "distill"] * 2
    group: Any = typer.main.get_command(app)
    for name, *arguments in found:
        command = group.commands[name]
        values = command.make_context(name, list(arguments)).params
        recipe = Recipe.load(values["recipe"], values["overrides"])
        assert str(recipe.data.cache).startswith("s3://my-bucket/")
    assert str(Recipe.load(values["recipe"], values["overrides"]).output) == "/runs"
    with pytest.raises(Exception, match="No such option"):
        group.commands["teach"].make_context("teach", ["zoo:emoji-demo", "--nonsense"])


def test_teach_and_distill_read_one_cache() -> None:
    for teach, distill in (commands()[:2], commands()[2:]):
        places = [
            next(w for w in words if w.startswith("data.cache=")) for words in (teach, distill)
        ]
        assert places[0] == places[1]


def test_kubernetes_objects_are_whole() -> None:
    teach, distill = kubernetes()
    assert {job["apiVersion"] for job in (teach, distill)} == {"batch/v1"}
    assert teach["spec"]["completions"] == teach["spec"]["parallelism"] == 4
    assert distill["spec"]["suspend"] is True
    for job in (teach, distill):
        pod = job["spec"]["template"]["spec"]
        mounts = {m["name"] for c in pod["containers"] for m in c["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}
        assert pod["restartPolicy"] == "OnFailure"
    (container,) = teach["spec"]["template"]["spec"]["containers"]
    assert {"name": "WORLD_SIZE", "value": "4"} in container["env"]


def test_skypilot_task_has_known_fields() -> None:
    task = skypilot()
    assert set(task) == {"name", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
    assert task["resources"]["use_spot"] is True
    # What is installed exists.
    extras = re.findall(r"\.\[([\w,]+)\]", task["setup"])
    project = (CLUSTER.parents[1] / "pyproject.toml").read_text()
    for extra in extras[0].split(","):
        assert re.search(rf"^{extra} = \[", project, flags=re.M)
    assert os.path.exists(CLUSTER.parents[1] / "constraints.txt")
