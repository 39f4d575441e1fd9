"""The recipe: everything a distillation depends on, as frozen pydantic models read from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from twostep.recipe import rules
from twostep.recipe.fields import Positive, Section
from twostep.recipe.models import Data, Score, Student, Teacher
from twostep.recipe.objective import Critic, Fake, Losses
from twostep.recipe.training import Distributed, Training


class Recipe(Section):
    """One distillation. `Recipe.load` reads YAML and dotted overrides."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the run and of its folder"
    )
    shift: Positive | None = Field(None, description="time shift; empty: the teacher's scheduler's")
    step2_sigma: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="noise level of the second step; empty: the two-step schedule's own"
    )
    teacher: Teacher
    score: Score = Score()
    data: Data = Data()
    student: Student = Student()
    losses: Losses = Losses()
    fake: Fake = Fake()
    critic: Critic = Critic()
    training: Training = Training()
    distributed: Distributed = Distributed()
    output: Path = Field(Path("runs"), description="the folder in which the run's folder is")

    @model_validator(mode="before")
    @classmethod
    def _short_warmup(cls, values: Any) -> Any:
        """The default warm-up of a short run leaves turns for the rest."""
        try:
            turns, losses = values["training"]["turns"], values.get("losses") or {}
            if isinstance(turns, int) and 0 < turns < 400 and "warmup_turns" not in losses:
                return {**values, "losses": {**losses, "warmup_turns": turns // 2}}
        except (KeyError, TypeError, AttributeError):
            pass  # said where it is validated
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        rules.check(self)
        return self

    @property
    def run_folder(self) -> Path:
        return self.output / self.name

    def with_lora_checksums(self, found: Sequence[str]) -> Recipe:
        """The same, with the sha256 of each of `teacher.loras`: what a run keeps of itself."""
        loras = tuple(
            lora.model_copy(update={"sha256": sha256})
            for lora, sha256 in zip(self.teacher.loras, found, strict=True)
        )
        return self.model_copy(update={"teacher": self.teacher.model_copy(update={"loras": loras})})

    @property
    def uses_critic(self) -> bool:
        return any(s.adversarial * s.weight > 0 for s in (self.losses.final, self.losses.step1))

    @property
    def betas(self) -> dict[str, tuple[float, float]]:
        """AdamW's, by optimizer: no momentum where the other side of a game moves on."""
        game = self.training.betas or ((0.0 if self.uses_critic else 0.9), 0.99)
        return {
            "student": game, "critic": game, "fake": self.fake.betas, "score": self.score.betas,
        }  # fmt: skip

    @staticmethod
    def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """See `twostep.recipe.loading.load`."""
        from twostep.recipe import loading

        return loading.load(path, overrides)

    @staticmethod
    def parse(values: Mapping[str, Any]) -> Recipe:
        """See `twostep.recipe.loading.parse`."""
        from twostep.recipe import loading

        return loading.parse(values)

    def to_yaml(self) -> str:
        """The resolved recipe; `Recipe.load` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """What editors check a recipe by: keys, types and ranges, without the rules across sections."""
    dialect = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:twostep:recipe",
    }
    return {**dialect, **Recipe.model_json_schema(), "title": "twostep recipe"}
