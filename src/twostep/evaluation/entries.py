"""What is compared: the teacher, its own weights at two steps, and students; and their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from twostep.errors import InputError
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import LoraFile

Kind = Literal["teacher", "naive", "student", "baseline"]


@dataclass(frozen=True)
class Entry:
    """A model that is compared, or a student's step-1 preview.

    Attributes:
        kind: `naive` is the teacher's weights at two steps, `baseline` somebody else's model.
        name: short, of the figures: `teacher`, `naive`, `student`, a run's name.
        model: a folder, `zoo:NAME` or a hub id.
        steps: Euler steps; None for a two-step student.
        guidance_scale: 0 is none.
        reference: starts from the reference set's own noise.
        preview: stands for what the student's step 1 points to.
        loras: added to the model's weights.
        sigmas: noise levels of its steps, from 1 to above 0, in place of its own schedule's.
    """

    kind: Kind
    name: str
    model: str
    steps: int | None = None
    guidance_scale: float = 0.0
    reference: bool = False
    preview: bool = False
    loras: tuple[LoraFile, ...] = ()
    sigmas: tuple[float, ...] | None = None

    def open(self) -> ModelFolder:
        """Its folder, LoRA files among its weights; nothing is loaded.

        Raises:
            ModelError: if it is missing, or a LoRA does not fit.
        """
        folder = ModelFolder.open(self.model)
        return folder.with_loras(self.loras) if self.loras else folder

    @property
    def key(self) -> str:
        """Its name in the figures, such as `student_2` or `student_2/preview`."""
        if self.reference:
            return "reference"
        return f"{self.name}_{self.steps or 2}{'/preview' if self.preview else ''}"

    @property
    def label(self) -> str:
        """What stands above its pictures."""
        if self.preview:
            return f"{self.name}, step-1 preview"
        name = "same weights" if self.kind == "naive" else self.name
        return f"{name}, {self.steps or 2} steps"

    def as_reference(self) -> Entry:
        """The same model from other noise."""
        return replace(self, reference=True)

    def as_preview(self) -> Entry:
        """What its step 1 points to."""
        return replace(self, preview=True)


def list_entries(
    teacher: str,
    teacher_steps: int,
    students: Mapping[str, str],
    *,
    student_steps: int | None = None,
) -> list[Entry]:
    """The teacher, its weights at two steps, and the students.

    Args:
        students: models by name. A two-step student folder always runs in 2 steps.
        student_steps: for students that are ordinary folders; 8 if None.

    Raises:
        InputError: if two would have the same key.
        ModelError: if the teacher is a student.
    """
    ModelFolder.open(teacher).check_teacher("reference")
    result = [Entry("teacher", "teacher", teacher, teacher_steps)]
    if teacher_steps != 2:
        result.append(Entry("naive", "naive", teacher, 2))
    for name, model in students.items():
        two_step = ModelFolder.open(model).student is not None
        entry = Entry("student", name, model, None if two_step else student_steps or 8)
        if entry.key in {other.key for other in result}:
            raise InputError(f"model: {model!r} would be called {entry.key!r}, as another is")
        result.append(entry)
    return result


def usual_size(entries: Sequence[Entry]) -> tuple[int, int]:
    """(height, width) that the first student was made for; the teacher's, where there is none."""
    students = [entry for entry in entries if entry.kind == "student"]
    return ModelFolder.open((students or list(entries))[0].model).sizes[0]


def check_size(entries: Sequence[Entry], size: tuple[int, int]) -> None:
    """Raises InputError for a model that does not take (height, width) or its number of steps."""
    for entry in entries:
        folder = ModelFolder.open(entry.model)
        folder.latent_shape(size)
        folder.count_steps(entry.steps)


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Models by name: `student` for a single one, its folder's name among several.

    Raises:
        InputError: if two models would have the same name.
    """
    if len(models) == 1:
        return {"student": models[0]}
    names: dict[str, str] = {}
    for model in models:
        path = Path(model.removeprefix("zoo:"))
        # A run's folder says more than the `student` inside it.
        name = path.parent.name if path.name == "student" and path.parent.name else path.name
        if name in names:
            raise InputError(f"model: {model!r} and {names[name]!r} are both called {name!r}")
        names[name] = model
    return names


def read_key(key: str, figures: Mapping[str, Any]) -> tuple[Kind, str, str]:
    """(kind, name, steps) of a model in `metrics.json`; older files have no `kind`."""
    name, _, steps = key.rpartition("_")
    said = figures.get("kind", name)
    kind: Kind = next((kind for kind in get_args(Kind) if kind == said), "student")
    return kind, name, steps
