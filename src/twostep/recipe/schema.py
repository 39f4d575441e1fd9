"""The recipe: everything a distillation depends on, as frozen pydantic models read from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from twostep.recipe import rules
from twostep.recipe.loras import Lora

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
# A folder; a URL stays as it was typed.
Place = Annotated[Path | str, AfterValidator(lambda v: v if "://" in str(v) else Path(v))]
# (height, width) in pixels
Size = tuple[Count, Count]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Teacher(_Section):
    """The few-step model whose images the student must match."""

    model: str = Field(description="a diffusers folder, or zoo:NAME for one inside the package")
    steps: Count = Field(8, description="Euler steps from noise to the cached image")
    guidance_scale: NonNegative = Field(
        0.0, description="guidance g of the cached images, `c + g (c - u)`; 0: none"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="the frozen weights' type, of the score too"
    )
    loras: tuple[Lora, ...] = Field(
        (),
        description="LoRA files, FILE or FILE:SCALE, that are added to the teacher's weights, and "
        "so to all that starts from them: a fine-tune of the teacher is distilled",
    )


class Score(_Section):
    """The flow model that distribution matching trusts at every noise level."""

    model: str | None = Field(
        None, description="a diffusers folder or zoo:NAME; empty: the teacher"
    )
    guidance_scale: NonNegative = Field(
        0.0, description="guidance of the score's prediction; 0: none, 0.25 sharpens a fitted one"
    )
    fit_turns: Annotated[int, Field(ge=0)] = Field(
        0,
        description="turns of flow matching on the teacher's cached images before the student's "
        "first: a few-step teacher's own field is not the score of the images it makes",
    )
    learning_rate: Positive = Field(
        2e-4, description="while it is fitted; falls linearly over the second half"
    )
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="AdamW's, while it is fitted")
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
    samples_per_prompt: Count = Field(
        1, description="cached images of each prompt, each from noise of its own"
    )
    height: Count = Field(64, description="of the images, in pixels")
    width: Count = Field(64, description="of the images, in pixels")
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
    seed: int = Field(
        0, description="of the embedded scenes, the cached images' noise and the validation's"
    )
    cache: Place = Field(
        Path("runs/cache"),
        description="folder of the teacher's images, or a URL (s3://, gs://, hf://); runs of the "
        "same teacher and data share it",
    )
    cache_copies: Path = Field(
        Path("runs/cache-copies"), description="for a URL: the folder of copies of its files"
    )
    cache_copies_gib: Positive = Field(
        64.0,
        description="for a URL: GiB of files that are kept there; where the cache is larger, "
        "samples are shuffled within groups of files that fit",
    )
    samples_per_file: Count = Field(256, description="images in each file of the cache")
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

    steps: Literal["decoupled", "shared"] = Field(
        "decoupled", description="a set of weights for each step, or one for both"
    )
    weights: Literal["full", "lora"] = Field(
        "full",
        description="what a set is: all weights, or a LoRA on the frozen teacher, whose weights "
        "then serve every role",
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
    gradient: Literal["end_to_end", "cut"] = Field(
        "end_to_end",
        description="end_to_end: the final image's loss reaches step 1 too; cut: it stops between "
        "the steps",
    )
    transition: Literal["euler", "renoise"] = Field(
        "euler",
        description="euler: step 2 goes on where step 1's velocity leads; renoise: at step 1's "
        "image with fresh noise",
    )


class StepLosses(_Section):
    """Weights of the loss on one clean prediction (docs/method.md)."""

    weight: NonNegative = Field(1.0, description="multiplies every term on the final image")
    distribution_matching: NonNegative = Field(
        1.0, description="weight of the move by which score and fake differ (eq. 6)"
    )
    guidance_augmentation: NonNegative = Field(
        0.0,
        description="weight of the move along the score's guidance, which needs a score.model or a "
        "fitted score (eq. 7)",
    )
    adversarial: NonNegative = Field(1.0, description="weight of the critic's verdict (eq. 8)")
    regression: NonNegative = Field(
        0.0, description="weight of the distance to the cached image, after the warm-up (eq. 9)"
    )


class Step1Losses(StepLosses):
    """The same for what step 1 points to."""

    weight: NonNegative = Field(
        0.5, description="multiplies every term on step 1's image, in the warm-up too; 0: off"
    )


class Losses(_Section):
    """What the student learns by."""

    final: StepLosses = StepLosses()
    step1: Step1Losses = Step1Losses()
    consistency: NonNegative = Field(
        0.0,
        description="weight of latent consistency distillation along the teacher's steps; for one "
        "set of weights (student.steps: shared)",
    )
    tau_range: tuple[Fraction, Fraction] = Field(
        (0.02, 0.98), description="noise levels at which clean predictions are judged"
    )
    warmup_turns: Annotated[int, Field(ge=0)] = Field(
        200, description="student turns of regression on cached teacher pairs before the rest"
    )
    warmup_step1_target: Literal["final", "trajectory"] = Field(
        "final",
        description="what step 1 regresses on: the teacher's image, or its latents where step 2 "
        "begins (step 2's noise level must be one of the teacher's)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Losses:
        if self.tau_range[0] >= self.tau_range[1]:
            raise ValueError(f"tau_range must ascend, got {self.tau_range}")
        return self


class Fake(_Section):
    """The flow model that follows the student's own distribution."""

    models: Literal["per_step", "one"] = Field(
        "per_step", description="a fake for each step's images, or one for both"
    )
    learning_rate: Positive = Field(2e-4, description="of the fakes; decays with the student's")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.99), description="AdamW's, of the fakes, which learn by regression"
    )


class Critic(_Section):
    """The discriminator's heads on hidden states of a frozen network."""

    network: Literal["teacher", "score"] = Field(
        "teacher",
        description="whose hidden states; with score and one_look, distribution matching and the "
        "critic see a sample in one forward",
    )
    one_look: bool = Field(
        False,
        description="one noise level and one forward of the network for each sample serve both "
        "steps and all who judge them; false: each draws its own",
    )

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (2, 4), description="the network's blocks that a head looks at, from 0, ascending"
    )
    width: Count = Field(64, description="channels of each head")
    learning_rate: Positive = Field(1e-3, description="of the heads; decays with the student's")
    paired: bool = Field(
        True,
        description="real and fake samples come from the same noise; with data.reals: teacher only",
    )
    r1: NonNegative = Field(
        0.0, description="weight of the approximate R1 penalty; 0: off (eq. 12)"
    )
    r1_noise: Positive = Field(
        0.05, description="standard deviation, in latents, of the penalty's finite difference"
    )
    tau_range: tuple[Fraction, Fraction] = Field(
        (0.02, 0.98), description="noise levels at which the critic sees real and fake images"
    )


class Training(_Section):
    """Optimisation, cadence and bookkeeping."""

    turns: Count = Field(1000, description="student turns, the warm-up included")
    minutes: Positive | None = Field(None, description="stop after this time, whatever the turns")
    batch_size: Count = Field(24, description="samples of a turn, of all processes together")
    micro_batch: Count | None = Field(
        None,
        description="samples at a time on each process, their gradients added up; empty: all",
    )
    critic_turns: Count = Field(1, description="fake and critic turns for each student turn")
    joint_turns: bool = Field(
        False,
        description="the student's turn and the critic turn beside it are one, on one rollout; "
        "with critic.paired half of it begins with cached noise, for the critic",
    )
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
    learning_rate: Positive = Field(1e-4, description="of the student")
    warmup_learning_rate: Positive | None = Field(
        None,
        description="the student's rate when its warm-up begins, falling linearly to "
        "learning_rate at its end; empty: learning_rate throughout",
    )
    betas: tuple[Fraction, Fraction] | None = Field(
        None,
        description="AdamW's, of the student and the critic's heads; empty: 0 and 0.99 where a "
        "critic judges, 0.9 and 0.99 where none does",
    )
    weight_decay: NonNegative = Field(0.0, description="of every trained role")
    max_gradient_norm: Positive = Field(
        1.0, description="gradients of student, fakes, critic and score are clipped to it, each"
    )
    learning_rate_decay: Fraction = Field(
        0.3, description="share of the run over which the rates fall linearly to a tenth"
    )
    ema_decay: Fraction = Field(
        0.98,
        description="of the averaged weights, which are validated and exported: the mean of about "
        "1 / (1 - decay) turns",
    )
    autocast: bool = Field(True, description="forwards in bfloat16, weights as they are")
    compile: bool = Field(
        False, description="torch.compile: slow to begin, then faster; with lora block by block"
    )
    checkpoint_activations: bool = Field(
        False, description="recompute blocks in the backward pass: less memory, a third more time"
    )
    checkpoint_share: Fraction = Field(
        1.0, description="with checkpoint_activations: of the blocks, evenly spread"
    )
    seed: int = Field(
        0,
        description="of the data's order, all noise of the turns, adapters and the critic's heads",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU where there is one"
    )
    log_every: Count = Field(10, description="turns between lines of metrics.jsonl")
    sample_every: Count = Field(
        200,
        description="turns between sample sheets; drawn at validations, so a multiple of "
        "validate_every",
    )
    sample_prompts: Count = Field(8, description="columns of a sample sheet")
    validate_every: Count = Field(
        100, description="turns between validations; the best of them is the exported student"
    )
    validation_samples: Count = Field(
        128,
        description="images of a validation, two a prompt, from prompts that no turn learns from "
        "(a quarter of the cache's at most); fewer than 64 tell little",
    )
    validation_scores: tuple[str, ...] = Field(
        (),
        description="scores of the validation's images beside the distance: ocr, clip, or "
        "NAME=COMMAND of your own, as for evaluate --scores",
    )
    best_by: Literal["distance", "score"] = Field(
        "distance",
        description="which validation was the best: the one of the least distance to the teacher, "
        "or of the highest first score",
    )
    save_every: Count = Field(200, description="turns between checkpoints")
    keep_checkpoints: Count = Field(2, description="the newest checkpoints that stay on disk")
    async_saves: bool = Field(
        False, description="train on while a checkpoint is written; takes memory for a copy of it"
    )
    max_non_finite: Count = Field(10, description="stop after this many skipped turns in a row")
    tensorboard: bool = Field(
        False, description="scalars to RUN/tensorboard too; needs the package tensorboard"
    )


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
