"""The recipe: everything a distillation depends on, as frozen pydantic models read from YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twostep.errors import RecipeError

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# (height, width) in pixels
Size = tuple[Count, Count]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(_Section):
    """The few-step model whose images the student must match."""

    model: str = Field(description="a diffusers folder, or zoo:NAME for one inside the package")
    steps: Count = 8
    guidance_scale: NonNegative = 0.0
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="the frozen weights' type, of the score too"
    )


class Score(_Section):
    """The flow model that distribution matching trusts at every noise level."""

    model: str | None = Field(
        None, description="a diffusers folder or zoo:NAME; empty: the teacher"
    )
    guidance_scale: NonNegative = 0.0
    fit_turns: Annotated[int, Field(ge=0)] = Field(
        0,
        description="turns of flow matching on the teacher's cached images before the student's "
        "first: a few-step teacher's own field is not the score of the images it makes",
    )
    learning_rate: Positive = Field(2e-4, description="while it is fitted")
    caption_dropout: Fraction = Field(
        0.0,
        description="while it is fitted, the share of samples with the empty prompt in place of "
        "their own; guidance with a fitted score needs it",
    )


class Data(_Section):
    """Prompts and cached teacher samples."""

    prompts: str = Field(
        "emoji",
        description="a .txt, .jsonl or .parquet file, hf:OWNER/NAME for a dataset of the hub, "
        "parti for PartiPrompts, or emoji for the embedded world",
    )
    prompt_count: Count = Field(1024, description="how many prompts to use; a file may have more")
    prompt_column: str = Field("prompt", description="of a .jsonl or .parquet file or a dataset")
    prompt_split: str = Field("train", description="of a dataset of the hub")
    samples_per_prompt: Count = 1
    height: Count = 64
    width: Count = 64
    other_sizes: tuple[Size, ...] = Field(
        (),
        description="further (height, width); prompts take turns, every batch is of one size; "
        "validation keeps to height and width",
    )
    caption_window: Count = Field(
        1,
        description="batches whose samples are sorted by caption length together, so that less is "
        "padded; 1: not sorted",
    )
    seed: int = 0
    cache: Path = Path("runs/cache")
    shard_size: Count = 256
    reals: str = Field(
        "teacher",
        description="teacher, or a folder of images for the critic's reals; captions from its "
        "metadata.jsonl (file_name, text)",
    )

    @model_validator(mode="after")
    def _different_sizes(self) -> Data:
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"other_sizes must differ from each other and from height and width "
                f"({self.height}, {self.width}), got {[list(s) for s in self.other_sizes]}"
            )
        return self

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every (height, width), the first one height and width."""
        return ((self.height, self.width), *self.other_sizes)


class Student(_Section):
    """How the two steps are parameterised and joined."""

    parameters: Literal["decoupled", "shared", "lora"] = Field(
        "decoupled",
        description="two full sets, one full set for both steps, or two LoRA sets on the frozen "
        "teacher, whose weights then serve every role",
    )
    init: str | None = Field(
        None,
        description="a two-step student to start from, a folder or zoo:NAME; empty: the teacher",
    )
    rank: Count = Field(64, description="for lora; alpha equals it")
    target_modules: str = Field(
        r"(layers|noise_refiner|context_refiner)\.\d+\."
        r"(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)",
        description="for lora: a regular expression that whole module names must match",
    )
    backbone_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "bfloat16",
        description="for lora: the frozen weights' type; int8: the blocks' matrices in 8 bits with "
        "a scale for each output, the rest in bfloat16",
    )
    gradient: Literal["end_to_end", "cut"] = "end_to_end"
    transition: Literal["euler", "renoise"] = "euler"

    @property
    def sharing(self) -> Literal["shared", "decoupled"]:
        """Whether both steps have the same parameters."""
        return "shared" if self.parameters == "shared" else "decoupled"


class StepLosses(_Section):
    """Weights of the loss on one clean prediction (docs/method.md)."""

    weight: NonNegative = 1.0
    distribution_matching: NonNegative = 1.0
    guidance_augmentation: NonNegative = 0.0
    adversarial: NonNegative = 1.0
    regression: NonNegative = Field(0.0, description="on cached pairs, kept up after the warm-up")


class Step1Losses(StepLosses):
    """The same for what step 1 points to."""

    weight: NonNegative = 0.5


class Losses(_Section):
    final: StepLosses = StepLosses()
    step1: Step1Losses = Step1Losses()
    consistency: NonNegative = Field(
        0.0,
        description="weight of latent consistency distillation along the teacher's steps; for one "
        "set of weights (student.parameters: shared)",
    )
    tau_range: tuple[Fraction, Fraction] = Field(
        (0.02, 0.98), description="noise levels at which clean predictions are judged"
    )
    warmup_turns: Annotated[int, Field(ge=0)] = Field(
        200, description="student turns of regression on cached teacher pairs before the rest"
    )
    warmup_step1_target: Literal["final", "trajectory"] = "final"

    @model_validator(mode="after")
    def _ordered(self) -> Losses:
        if self.tau_range[0] >= self.tau_range[1]:
            raise ValueError(f"tau_range must ascend, got {self.tau_range}")
        return self


class Fake(_Section):
    """The flow model that follows the student's own distribution."""

    models: Literal["per_step", "one"] = "per_step"
    learning_rate: Positive = 2e-4


class Critic(_Section):
    """The discriminator's heads on hidden states of the frozen teacher."""

    layers: tuple[Annotated[int, Field(ge=0)], ...] = (2, 4)
    width: Count = 64
    learning_rate: Positive = 1e-3
    paired: bool = Field(
        True,
        description="real and fake samples come from the same noise; with data.reals: teacher only",
    )
    r1: NonNegative = Field(0.0, description="weight of the approximate R1 penalty")
    r1_noise: Positive = 0.05
    tau_range: tuple[Fraction, Fraction] = (0.02, 0.98)


class Training(_Section):
    """Optimisation, cadence and bookkeeping."""

    turns: Count = Field(1000, description="student turns, the warm-up included")
    minutes: Positive | None = Field(None, description="stop after this time, whatever the turns")
    batch_size: Count = 24
    micro_batch: Count | None = Field(
        None,
        description="samples at a time on each process, their gradients added up; empty: all",
    )
    critic_turns: Count = Field(1, description="fake and critic turns for each student turn")
    critic_warmup_turns: Annotated[int, Field(ge=0)] = Field(
        20,
        description="fake and critic turns between the student's warm-up and its first turn with "
        "them: until the fakes know the student, their gradient is noise",
    )
    optimizer: Literal["adamw", "adafactor"] = Field(
        "adamw",
        description="adafactor keeps a row and a column of states for each matrix instead of two "
        "numbers for each weight; its rates are relative to the weights' size",
    )
    learning_rate: Positive = 1e-4
    warmup_learning_rate: Positive | None = Field(
        None,
        description="the student's rate when its warm-up begins, falling linearly to "
        "learning_rate at its end; empty: learning_rate throughout",
    )
    betas: tuple[Fraction, Fraction] = (0.0, 0.99)
    weight_decay: NonNegative = 0.0
    max_gradient_norm: Positive = 1.0
    learning_rate_decay: Fraction = Field(
        0.3, description="share of the run over which the rates fall linearly to a tenth"
    )
    ema_decay: Fraction = 0.98
    autocast: bool = True
    compile: bool = False
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, a third more time"
    )
    checkpoint_share: Fraction = Field(
        1.0, description="with checkpoint_activations: of the blocks, evenly spread"
    )
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Count = 10
    sample_every: Count = 200
    sample_prompts: Count = 8
    validate_every: Count = 100
    validation_samples: Count = 128
    save_every: Count = 200
    keep_checkpoints: Count = 2
    async_saves: bool = Field(
        False, description="train on while a checkpoint is written; takes memory for a copy of it"
    )
    max_non_finite: Count = Field(10, description="stop after this many skipped turns in a row")
    tensorboard: bool = False


class Distributed(_Section):
    """What several processes share, as torchrun starts them; nothing for one alone."""

    sharding: Literal["replicate", "shard"] = Field(
        "replicate", description="whole weights in every process, or FSDP2: a part in each"
    )
    shard_size: Count | None = Field(
        None, description="processes that share one set of weights; empty: all (fewer is HSDP)"
    )
    cpu_offload: bool = Field(
        False, description="with shard: weights, gradients and optimizer states in CPU memory"
    )


class Recipe(_Section):
    """One distillation. `Recipe.load` reads YAML and dotted overrides."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
    output: Path = Path("runs")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        augmented = (
            self.losses.final.guidance_augmentation + self.losses.step1.guidance_augmentation
        )
        if augmented and self.score.model is None and not self.score.fit_turns:
            raise ValueError(
                "losses.*.guidance_augmentation needs score.model or a fitted score: guidance "
                "makes no sense for a guidance-free teacher (Z-Image issue 110)"
            )
        unprompted = self.score.fit_turns == 0 or self.score.caption_dropout > 0
        if (self.score.guidance_scale or augmented) and not unprompted:
            raise ValueError(
                "score.fit_turns fits the score to captioned images alone: score.guidance_scale "
                "and losses.*.guidance_augmentation must be 0, or score.caption_dropout above 0"
            )
        if self.score.fit_turns and self.score.model and self.student.parameters == "lora":
            raise ValueError(
                "score.fit_turns with student.parameters: lora fits an adapter on the teacher; "
                "leave score.model empty"
            )
        if self.losses.consistency and self.student.parameters != "shared":
            raise ValueError(
                "losses.consistency needs student.parameters: shared, since one network must "
                f"answer at every noise level; got {self.student.parameters}"
            )
        if self.student.parameters == "lora" and self.student.init is not None:
            raise ValueError(
                "student.init is not available with student.parameters: lora, whose adapters "
                "start at zero"
            )
        sharding = self.distributed
        if sharding.sharding == "replicate" and (sharding.shard_size or sharding.cpu_offload):
            raise ValueError(
                "distributed.shard_size and cpu_offload need distributed.sharding: shard"
            )
        if sharding.sharding == "shard" and self.training.optimizer == "adafactor":
            raise ValueError(
                "training.optimizer: adafactor needs whole matrices; with distributed.sharding: "
                "shard use adamw, whose states are sharded too"
            )
        if sharding.sharding == "shard" and self.student.parameters == "lora":
            raise ValueError(
                "distributed.sharding: shard is for full sets of weights; with "
                "student.parameters: lora every process holds the one backbone"
            )
        if self.losses.warmup_turns > self.training.turns:
            raise ValueError(
                f"losses.warmup_turns ({self.losses.warmup_turns}) exceeds "
                f"training.turns ({self.training.turns})"
            )
        return self

    @property
    def run_folder(self) -> Path:
        return self.output / self.name

    @property
    def uses_critic(self) -> bool:
        return any(s.adversarial * s.weight > 0 for s in (self.losses.final, self.losses.step1))

    @staticmethod
    def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
        """Reads a YAML recipe; `overrides` are `key.path=value`, the value parsed as YAML.

        Raises:
            RecipeError: unreadable file, unknown key, or a value out of range.
        """
        if not path.is_file():
            raise RecipeError(f"no recipe at {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"{path} must hold a mapping, found {type(values).__name__}")
        for override in overrides:
            _apply(values, override)
        return Recipe.parse(values)

    @staticmethod
    def parse(values: Mapping[str, Any]) -> Recipe:
        """Validates a nested mapping.

        Raises:
            RecipeError: with one line per mistake.
        """
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            raise RecipeError("\n".join(_explain(e) for e in error.errors())) from error

    def to_yaml(self) -> str:
        """The resolved recipe; `Recipe.load` of it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"override {override!r}: expected key=value, e.g. training.turns=500")
    *parents, leaf = key.split(".")
    for parent in parents:
        section = values.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"override {override!r}: {parent} is not a section")
        values = section
    try:
        values[leaf] = yaml.load(text, Loader=_OverrideLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is not valid YAML: {error}") from error


class _OverrideLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people who type it mean a number."""


_OverrideLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _keys_of_section(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, got {error['input']!r}" if key else message


def _keys_of_section(path: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    return list(section.model_fields)
