"""What the cases of `faults.py` are run on: a tiny teacher and everything that is made of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rehearsal_folder import write_random_folder

# Modules that every command needs, imported once.
import twostep.distill.trainer
import twostep.evaluation.evaluate
import twostep.exports.registry
import twostep.inference.compare
import twostep.planning.training  # noqa: F401
from twostep.cli import app

# What is the same in every recipe of a case: two turns in a second.
SMALL = [
    "zoo:emoji-demo", "name=run", "teacher.model=teacher", "teacher.steps=2",
    "data.prompt_count=8", "data.samples_per_prompt=1", "data.samples_per_file=4",
    "data.height=32", "data.width=32", "data.cache=cache", "output=.",
    "score.fit_turns=1", "losses.warmup_turns=1", "critic.layers=[0,1]", "critic.width=8",
    "training.turns=2", "training.minutes=null", "training.batch_size=2",
    "training.critic_warmup_turns=0", "training.validation_samples=4", "training.validate_every=1",
    "training.save_every=1", "training.sample_prompts=1", "training.log_every=1",
    "training.device=cpu", "training.autocast=false",
]  # fmt: skip
EVALUATE = [
    "evaluate", "--model", "run/student", "--reference", "teacher", "--out", "checked",
    "--images", "4", "--seeds", "2", "--size", "32", "--reference-steps", "2", "--halves", "2",
]  # fmt: skip


def make(world: Path) -> Path:
    """The folder with teacher/, cache/, run/ and its student, files/ (LoRA), checked/, prompts/."""
    torch.set_num_threads(1)
    if (world / "whole").exists():
        return world
    world.mkdir(parents=True, exist_ok=True)
    write_random_folder(world / "teacher", small=True)
    here = Path.cwd()
    os.chdir(world)
    try:
        for command in (
            ["distill", *SMALL],
            EVALUATE,
            ["export", "--model", "run/student", "--to", "lora", "--teacher", "teacher",
             "--rank", "4", "--out", "pair"],
            ["generate", "--model", "run/student", "--size", "32", "--out", "pictures",
             "--prompt-cache", "prompts", "--grid", "a dog", "two cats"],
        ):  # fmt: skip
            _run(command)
        shutil.copytree(world / "run", world / "resumed" / "run")
        _run(["distill", *SMALL, "output=resumed", "training.turns=3"])
        (world / "files").mkdir(exist_ok=True)
        (world / "files" / "captions.txt").write_text("a dog\ntwo cats\n")
        (world / "whole").touch()
    finally:
        os.chdir(here)
    return world


def _run(command: Sequence[str]) -> None:
    app(list(command), standalone_mode=False)
