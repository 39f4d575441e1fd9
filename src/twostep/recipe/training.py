"""How a run goes: the sections of optimisation and of processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from twostep.recipe.fields import Count, Fraction, NonNegative, Positive, Section


class Training(Section):
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
    rate_warmup_turns: Annotated[int, Field(ge=0)] = Field(
        0,
        description="turns over which the rates rise from zero: the student's in its own turns, "
        "the fakes' and the critic's in theirs",
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
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|(cuda|mps)(:\d{1,3})?)$",
        description="auto (a GPU where there is one), cpu, cuda, cuda:NUMBER or mps",
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
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="trackers that get recipe, scalars and sample sheets beside metrics.jsonl: "
        "tensorboard (files in RUN/tensorboard), wandb, trackio; each needs its package",
    )


class Distributed(Section):
    """What several processes share, as torchrun starts them; nothing for one alone."""

    sharding: Literal["replicate", "shard"] = Field(
        "replicate", description="whole weights in every process, or FSDP2: a part in each"
    )
    shard_size: Count | None = Field(
        None,
        description="processes that share one set of weights (HSDP); empty: those of one machine",
    )
    cpu_offload: bool = Field(
        False, description="with shard: weights, gradients and optimizer states in CPU memory"
    )
