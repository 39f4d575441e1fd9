"""Who teaches whom, on what: the sections of teacher, score, data and student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from twostep.recipe.fields import Count, Fraction, NonNegative, Place, Positive, Section, Size
from twostep.recipe.loras import Lora


class Teacher(Section):
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


class Score(Section):
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


class Data(Section):
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


class Student(Section):
    """How the two steps are parameterised and joined."""

    steps: Literal["decoupled", "shared"] = Field(
        "decoupled", description="a set of weights for each step, or one for both"
    )
    weights: Literal["full", "lora"] = Field(
        "full",
        description="what a set is: all weights, or a LoRA on the frozen teacher, whose weights "
        "then serve every role",
    )
    trained: Literal["all", "linear"] = Field(
        "all",
        description="of full sets; linear: the linear layers' matrices alone, biases and norms "
        "stay the teacher's, so that two LoRA files of enough rank hold the student exactly",
    )
    init: str | None = Field(
        None,
        description="a two-step student to start from, a folder or zoo:NAME; empty: the teacher. "
        "For lora the two LoRA files of an earlier run, of no higher rank",
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
