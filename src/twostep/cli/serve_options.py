"""What the options of `twostep serve` ask for; a cluster's manifest says the same words."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twostep.cli.arguments import parse_size
from twostep.cli.console import strong
from twostep.cli.serve import parse_choice, with_loras
from twostep.errors import InputError
from twostep.runtime.devices import Placement
from twostep.serving.app import AppOptions
from twostep.serving.keys import Keys
from twostep.serving.requests import Limits
from twostep.serving.runs import RunReader
from twostep.serving.served_model import HoldingOptions, ModelChoice
from twostep.serving.server import ServerOptions

_DEMO = ("zoo:emoji-student", "zoo:emoji-teacher")


@dataclass(frozen=True)
class Replication:
    """Replicas on a cluster.

    Attributes:
        replicas: how many of each stage.
        autoscale: (least, most) in place of it.
        share: GPUs of each, or CPUs where the cluster has no GPU.
    """

    replicas: int = 1
    autoscale: tuple[int, int] | None = None
    share: float = 1.0
    two_stage: bool = False


@dataclass(frozen=True)
class Asked:
    """What is to be served, and how.

    Attributes:
        size: (height, width) where a request names none.
        device: as the user typed it.
        given: the options as typer has them.
    """

    server: ServerOptions
    choices: list[ModelChoice]
    size: tuple[int, int] | None
    device: str
    replication: Replication | None
    given: Mapping[str, Any]

    def holding(self, device: torch.device | str) -> HoldingOptions:
        """How models are held on `device`."""
        given = self.given
        return HoldingOptions(
            Placement.on(device, given["memory"]),
            tiny_decoder=given["decoder"],
            prompt_cache=given["prompt_cache"],
            compiled=given["compiled"],
            max_batch=given["max_batch"],
        )


def read(given: Mapping[str, Any]) -> Asked:
    """From the command's parameters by their names in Python.

    Raises:
        InputError, ModelError: for what cannot be used; no model is opened.
    """
    if given["demo"] and given["model"]:
        raise InputError("--demo: serves the embedded models, give it or --model")
    limits = Limits(
        prompt_characters=given["max_prompt"],
        pixels=given["max_pixels"],
        deadline=given["deadline"],
        body_bytes=max(64 * 1024, 16 * given["max_prompt"]),
    )
    server = ServerOptions(
        host=given["host"],
        port=given["port"],
        line=given["queue"],
        max_batch=given["max_batch"],
        batch_wait=given["batch_wait"] / 1000,
        app=AppOptions(
            limits=limits,
            keys=Keys.read(given["api_keys"], os.environ),
            log_prompts=given["log_prompts"],
            runs=check_runs(given["runs"]),
            drain_seconds=given["deadline"],
        ),
    )
    texts = _DEMO if given["demo"] else given["model"] or []
    return Asked(
        server=server,
        choices=with_loras([_found(parse_choice(text)) for text in texts], given["lora"] or ()),
        size=None if given["size"] is None else parse_size(given["size"]),
        device=given["device"],
        replication=_replication(given),
        given=given,
    )


def check_runs(folder: Path | None) -> Path | None:
    """Raises InputError, naming --runs, if it is no folder."""
    reader = RunReader.of(folder)
    return None if reader is None else reader.folder


def _replication(given: Mapping[str, Any]) -> Replication | None:
    values = {name: given[name] for name in ("replicas", "autoscale", "share")}
    values = {name: value for name, value in values.items() if value is not None}
    if not given["ray"]:
        names = [f"--{name}" for name in values] + ["--two-stage"] * given["two_stage"]
        if names:
            raise InputError(f"{names[0]}: is for a cluster, give --ray with it")
        return None
    if len(values.keys() & {"replicas", "autoscale"}) == 2:
        raise InputError("--replicas: give it or --autoscale")
    if "autoscale" in values:
        match = re.fullmatch(r"(\d+):(\d+)", values["autoscale"])
        least, most = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= least <= most:
            raise InputError(
                f"--autoscale: expected MIN:MAX with 1 <= MIN <= MAX, got {values['autoscale']!r}"
            )
        values["autoscale"] = least, most
    share = values.get("share", 1.0)
    if not 0 < share <= 64 or (share > 1 and share != int(share)):
        raise InputError(f"--share: expected a part of 1, or whole ones, got {share:g}")
    return Replication(**values, two_stage=given["two_stage"])


def _found(choice: ModelChoice) -> ModelChoice:
    """Replicas have other working directories."""
    path = Path(choice.model)
    if not path.is_dir():
        return choice
    return ModelChoice(choice.name, str(path.resolve()), choice.steps, choice.loras)


def say_ready(url: str) -> None:
    strong(f"ready at {url}; Ctrl-C ends")
