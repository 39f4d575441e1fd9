"""A run's folder: where everything lies that a distillation writes."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from twostep.distill.checkpoint import list_checkpoints, read_facts
from twostep.distill.monitor import read_metrics
from twostep.errors import RecipeError
from twostep.recipe.rules import differences
from twostep.recipe.schema import Recipe
from twostep.runtime.files import make_folder, sweep, write_json, write_text
from twostep.runtime.locks import locked
from twostep.runtime.provenance import stamp

# Folders of a run that a save did not finish.
_HALF = re.compile(r"\.((fit|turn)-\d{7}|best|score)\.tmp")


@dataclass(frozen=True)
class RunFolder:
    """One run's files, by name."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def frozen(self) -> Path:
        """What has learnt before the student and does not change any more: the fitted score."""
        return self.path / "frozen"

    @property
    def best(self) -> Path:
        """The averaged weights of the best validation."""
        return self.path / "best"

    @property
    def student(self) -> Path:
        """The student, once the run is finished."""
        return self.path / "student"

    @property
    def report(self) -> Path:
        """Of `twostep demo`; its page lies beside it."""
        return self.path / "report.json"

    def sample_sheet(self, turn: int) -> Path:
        """The pictures drawn after `turn` turns; its folder is made."""
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        return folder / f"turn-{turn:07d}.png"

    def last_checkpoint(self) -> Path | None:
        """None before the first."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the run, oldest first."""
        return read_metrics(self.path)

    def check_same_recipe(self, recipe: Recipe, data: str | None = None) -> None:
        """Raises RecipeError if the folder holds a run that another recipe began.

        The last checkpoint says which; in those of earlier versions, recipe.yaml. Folders may have
        moved since: of teacher and cache what they hold is compared.

        Args:
            data: the cache's fingerprint, of the teacher's weights, prompts and noise.
        """
        checkpoint = self.last_checkpoint()
        if checkpoint is None:
            return
        facts = read_facts(checkpoint)
        if "recipe" in facts:
            facts["recipe"].get("training", {}).pop("tensorboard", None)  # is now report_to
            begun = Recipe.parse(facts["recipe"])
        elif self.recipe.exists():
            begun = Recipe.load(self.recipe)
        else:
            return
        known = data is not None and "data" in facts
        differing = differences(begun, recipe, same_data=known)
        if known and facts["data"] != data:
            differing.append("the teacher's weights or what is cached of it are others")
        if differing:
            raise RecipeError(
                f"{self.path} holds a run of another recipe ({'; '.join(differing)}). "
                "Choose another name or output, or go on with the recipe that began it"
            )

    def describe(self, recipe: Recipe, device: str) -> None:
        """Writes the recipe, and what the run computes with and on."""
        make_folder(self.path)
        packages = ("twostep", "torch", "diffusers", "transformers", "safetensors")
        description = {
            "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
            "device": device,
            **stamp(),
        }
        write_text(self.recipe, recipe.to_yaml())
        write_json(self.path / "run.json", description)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, this process alone works here; what killed ones left is gone.

        Raises:
            InUseError: if another process does.
        """
        with locked(self.path, option="output and name"):
            for folder in (self.path, self.checkpoints, self.path / "samples"):
                sweep(folder)
                for path in folder.glob(".*.tmp") if folder.is_dir() else ():
                    if _HALF.fullmatch(path.name):  # shared by the processes of one run
                        shutil.rmtree(path, ignore_errors=True)
            yield

    def check_free(self) -> None:
        """Raises InUseError if another process works here."""
        if self.path.is_dir():
            with locked(self.path, option="output and name"):
                pass

    def end(self, outcome: dict[str, Any]) -> None:
        """Adds how the run ended to run.json."""
        path = self.path / "run.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, said | {"outcome": outcome})

    def is_ours(self) -> bool:
        """Whether `describe` wrote here."""
        if not (self.path / "run.json").is_file():
            return False
        try:
            said = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            return "twostep" in said["versions"] and self.recipe.is_file()
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def clear(self) -> None:
        """Removes a finished run, so that the next one begins anew; a cache beside it stays.

        Raises:
            RecipeError: if no run of this package made the folder.
        """
        if not self.is_ours():
            raise RecipeError(
                f"{self.path} holds a report, but no run.json and recipe.yaml of a distillation: "
                "nothing in it is removed. Choose another folder"
            )
        for name in ("checkpoints", "samples", "student", "images", "best", "frozen"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("report.json", "report.html", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)
