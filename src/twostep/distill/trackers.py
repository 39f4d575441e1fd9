"""Trackers that a run reports to beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio.

By accelerate's classes. Nothing is reported anywhere unless `training.report_to` names it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twostep.recipe.rules import flatten
from twostep.recipe.schema import Recipe

# Of Weights & Biases and Trackio; the run's name is the recipe's.
_PROJECT = "twostep"


class Trackers:
    """Reports a run; of the first process alone.

    Args:
        folder: the run's; TensorBoard's files go to its `tensorboard`.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        _own_logger()
        self._each = [_STARTED[name](recipe, folder) for name in recipe.training.report_to]
        for tracker in self._each:
            tracker.main_process_only = False  # whoever is here is the first process
            tracker.start()
        settings = {key: _plain(value) for key, value in _settings(recipe).items()}
        for tracker in self._each:
            tracker.store_init_configuration(settings)

    def log(self, turn: int, values: Mapping[str, float]) -> None:
        """Scalars of a record; below 0 is a turn of the score's fit, which not all can number."""
        for tracker in self._each:
            if tracker.name == "tensorboard" or turn >= 0:
                tracker.log(dict(values), step=turn)
            else:
                tracker.log({**values, "turn": float(turn)})

    def sheet(self, turn: int, path: Path) -> None:
        """A sample sheet."""
        if not self._each:
            return
        with Image.open(path) as image:
            picture = image.convert("RGB")
        for tracker in self._each:
            _SHEETS[tracker.name](tracker, turn, picture)

    def close(self) -> None:
        for tracker in self._each:
            tracker.finish()


def _own_logger() -> None:
    """accelerate's trackers log through its process state, which is not set up here."""
    from accelerate import tracking

    tracking.logger = logging.getLogger("accelerate.tracking")


def _settings(recipe: Recipe) -> dict[str, Any]:
    return flatten(recipe.model_dump(mode="json"))


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _tensorboard(recipe: Recipe, folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker("tensorboard", logging_dir=folder)


def _wandb(recipe: Recipe, folder: Path) -> Any:
    from accelerate.tracking import WandBTracker

    # A run that goes on is the same run there.
    return WandBTracker(
        _PROJECT, name=recipe.name, id=_identity(recipe, folder), resume="allow", dir=str(folder)
    )


def _trackio(recipe: Recipe, folder: Path) -> Any:
    from accelerate.tracking import TrackioTracker

    return TrackioTracker(_PROJECT, name=recipe.name, resume="allow")


def _identity(recipe: Recipe, folder: Path) -> str:
    """Of this run folder, and kept in it."""
    import uuid

    from twostep.runtime.files import write_text

    path = folder / "wandb-id.txt"
    if not path.is_file():
        write_text(path, f"{recipe.name}-{uuid.uuid4().hex[:8]}\n")
    return path.read_text(encoding="utf-8").strip()


def _sheet_tensorboard(tracker: Any, turn: int, picture: Image.Image) -> None:
    values = {"samples": np.asarray(picture)[None]}
    tracker.log_images(values, step=turn, dataformats="NHWC")


def _sheet_wandb(tracker: Any, turn: int, picture: Image.Image) -> None:
    tracker.log_images({"samples": [picture]}, step=turn)


def _sheet_trackio(tracker: Any, turn: int, picture: Image.Image) -> None:
    import trackio

    tracker.log({"samples": trackio.Image(picture)}, step=turn)


_STARTED: dict[str, Callable[[Recipe, Path], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
_SHEETS: dict[str, Callable[[Any, int, Image.Image], None]] = {
    "tensorboard": _sheet_tensorboard,
    "wandb": _sheet_wandb,
    "trackio": _sheet_trackio,
}
