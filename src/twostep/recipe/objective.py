"""What the student learns by: the sections of losses, fakes and critic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twostep.recipe.fields import Count, Fraction, NonNegative, Positive, Section


class StepLosses(Section):
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
    tau_range: tuple[Fraction, Fraction] | None = Field(
        None,
        description="noise levels of this step's distribution matching and of its fake; empty: "
        "losses.tau_range",
    )


class Step1Losses(StepLosses):
    """The same for what step 1 points to."""

    weight: NonNegative = Field(
        0.5, description="multiplies every term on step 1's image, in the warm-up too; 0: off"
    )
    trajectory: NonNegative = Field(
        0.0,
        description="weight of the distance between where step 1 leads and the teacher's latents "
        "there, from cached noise (step 2's noise level must be one of the teacher's)",
    )


class Losses(Section):
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
        200,
        description="student turns of regression on cached teacher pairs before the rest; unless "
        "it is given, of a run of fewer than 400 turns half of them",
    )
    warmup_step1_target: Literal["final", "trajectory"] = Field(
        "final",
        description="what step 1 regresses on: the teacher's image, or its latents where step 2 "
        "begins (step 2's noise level must be one of the teacher's)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Losses:
        own = {"final.": self.final.tau_range, "step1.": self.step1.tau_range}
        for name, found in {"": self.tau_range, **own}.items():
            if found is not None and found[0] >= found[1]:
                raise ValueError(f"{name}tau_range must ascend, got {found}")
        return self

    def tau_range_of(self, step: StepLosses) -> tuple[float, float]:
        """At which noise levels the images of `step` are judged by score and fake."""
        return step.tau_range or self.tau_range


class Fake(Section):
    """The flow model that follows the student's own distribution."""

    models: Literal["per_step", "one"] = Field(
        "per_step", description="a fake for each step's images, or one for both"
    )
    learning_rate: Positive = Field(2e-4, description="of the fakes; decays with the student's")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.99), description="AdamW's, of the fakes, which learn by regression"
    )


class Critic(Section):
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
        description="real and fake samples come from the same noise; where data.reals is a folder, "
        "they show the same prompt if a caption there is that prompt",
    )
    weight_over_run: tuple[NonNegative, NonNegative] = Field(
        (1.0, 1.0),
        description="factor of both adversarial weights when the run begins and when it ends, "
        "linear between",
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
