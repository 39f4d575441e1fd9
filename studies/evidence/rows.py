"""The study's rows: what each changes in `recipe.yaml`, how it is tuned, and its table."""

from __future__ import annotations

from dataclasses import dataclass

# Stands for the folder of the world's rendered scenes.
EXTERNAL = "EXTERNAL"
# Seeds of the rows that carry a claim, and of the others.
SEEDS, FEWER_SEEDS = 8, 4

# Every row is tuned by four trials: half, once and twice its rate, and one of another setting.
_LESS_CRITIC = ("losses.final.adversarial=0.3", "losses.step1.adversarial=0.3")
_SLOWER_FAKES = ("fake.learning_rate=2.0e-4",)
_STILL_FASTER = ("training.learning_rate=8.0e-4",)


@dataclass(frozen=True)
class Row:
    """A setting of the study.

    Attributes:
        changes: recipe overrides, `key=value`.
        turns: as a multiple of the study's: what makes its network evaluations the full method's.
        regression: the whole run is the regression of a warm-up.
        score: the fitted score that distribution matching trusts; None: a model as it is.
        last_trial: what the fourth trial changes.
        seeds: how many.
        paper: where the method comes from, for other methods.
    """

    changes: tuple[str, ...] = ()
    turns: float = 1.0
    regression: bool = False
    score: str | None = "fitted"
    last_trial: tuple[str, ...] = _LESS_CRITIC
    seeds: int = SEEDS
    paper: str = ""

    @property
    def trials(self) -> tuple[tuple[str, ...], ...]:
        """What each of the four changes."""
        rates = (f"training.learning_rate={rate}" for rate in ("1.0e-4", "2.0e-4", "4.0e-4"))
        return (*((rate,) for rate in rates), self.last_trial)


_SHARED = ("student.steps=shared",)
_CUT = ("student.gradient=cut",)
_APART = ("training.joint_turns=false", "critic.one_look=false", "critic.network=teacher")
_EXTERNAL = (f"data.reals={EXTERNAL}",)
_UNPAIRED = ("critic.paired=false",)
_NO_CRITIC = ("losses.final.adversarial=0", "losses.step1.adversarial=0")
_NO_STEP1 = ("losses.step1.weight=0",)
_NO_MATCHING = ("losses.final.distribution_matching=0", "losses.step1.distribution_matching=0")
_GUIDED_BELOW = (
    "score.model=zoo:emoji-base",
    "losses.final.guidance_augmentation=1",
    "losses.step1.guidance_augmentation=1",
)
_LORA = (
    "student.weights=lora",
    "student.backbone_dtype=float32",
    "training.learning_rate=1.0e-3",
    "fake.learning_rate=2.0e-3",
)

ROWS: dict[str, Row] = {
    "full": Row(),
    # Reals and pairs: what the images are, and what a real and a fake have in common.
    "unpaired": Row(_UNPAIRED),
    "external_paired": Row(_EXTERNAL),
    "external": Row((*_EXTERNAL, *_UNPAIRED)),
    "no_critic": Row(_NO_CRITIC, last_trial=_SLOWER_FAKES),
    # Gradient and the loss on step 1.
    "cut": Row(_CUT),
    "no_step1": Row(_NO_STEP1),
    "cut_no_step1": Row((*_CUT, *_NO_STEP1)),
    # Weights: one set, and adapters of which two have as many numbers as one of twice the rank.
    "shared": Row(_SHARED),
    "lora": Row((*_LORA, "student.rank=16")),
    "lora_shared": Row((*_LORA, *_SHARED, "student.rank=32")),
    # The score.
    "teacher_score": Row(score=None),
    "no_matching": Row(_NO_MATCHING, seeds=FEWER_SEEDS),
    # Other methods in the same trainer: our implementations of those papers.
    "trajectory": Row(
        ("losses.warmup_step1_target=trajectory", "training.joint_turns=false"),
        4.4,
        regression=True,
        last_trial=_STILL_FASTER,
        seeds=FEWER_SEEDS,
        paper="progressive distillation, arXiv 2202.00512",
    ),
    "lcd": Row(
        (
            *_SHARED,
            "student.transition=renoise",
            "losses.consistency=1",
            "losses.final.weight=0",
            "losses.step1.weight=0",
            *_APART,
        ),
        5.3,
        last_trial=_STILL_FASTER,
        seeds=FEWER_SEEDS,
        paper="latent consistency distillation, arXiv 2310.04378",
    ),
    "ladd": Row(
        (*_SHARED, *_CUT, *_NO_MATCHING, *_NO_STEP1),
        1.84,
        seeds=FEWER_SEEDS,
        paper="arXiv 2403.12015",
    ),
    "dmd2": Row(
        (
            *_SHARED,
            *_CUT,
            *_EXTERNAL,
            *_UNPAIRED,
            *_APART,
            "student.transition=renoise",
            "losses.step1.weight=1",
            "training.critic_turns=5",
            "fake.models=one",
        ),
        0.33,
        score=None,
        seeds=FEWER_SEEDS,
        paper="arXiv 2405.14867",
    ),
    "decoupled_dmd": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_CRITIC,
            *_GUIDED_BELOW,
            "student.transition=renoise",
            "losses.step1.weight=1",
            "fake.models=one",
        ),
        1.06,
        score=None,
        last_trial=_SLOWER_FAKES,
        seeds=FEWER_SEEDS,
        paper="arXiv 2511.22677",
    ),
    "step1_by_teacher": Row(
        (
            *_CUT,
            *_NO_CRITIC,
            "losses.step1.distribution_matching=0",
            "losses.step1.trajectory=1",
        ),
        seeds=FEWER_SEEDS,
        last_trial=_SLOWER_FAKES,
        paper="step 1 by the teacher's own latents, gradient cut: as DP-DMD",
    ),
    "phases": Row(
        (*_CUT, *_NO_CRITIC, "losses.step1.tau_range=[0.75,0.98]"),
        seeds=FEWER_SEEDS,
        last_trial=_SLOWER_FAKES,
        paper="each step matched within its own noise levels: as Phased DMD",
    ),
    # What may make the method better.
    "critic_late": Row(("critic.weight_over_run=[0.0,2.0]",), seeds=FEWER_SEEDS),
    "critic_early": Row(("critic.weight_over_run=[1.0,0.0]",), seeds=FEWER_SEEDS),
    "two_fake_turns": Row(("training.critic_turns=2",), 0.75, seeds=FEWER_SEEDS),
    "slow_average": Row(("training.ema_decay=0.99",), seeds=FEWER_SEEDS),
    "regression": Row(
        ("losses.final.regression=0.3", "losses.step1.regression=0.3"), seeds=FEWER_SEEDS
    ),
}

# Table by table, the rows in their order and what they are called there.
TABLES: dict[str, dict[str, str]] = {
    "reals": {
        "full": "teacher images, the same noise (full method)",
        "unpaired": "teacher images, other noise",
        "external_paired": "rendered images, the same prompt",
        "external": "rendered images, other prompts",
        "no_critic": "no critic",
    },
    "gradient": {
        "full": "end to end, step-1 loss (full method)",
        "cut": "gradient cut, step-1 loss",
        "no_step1": "end to end, no step-1 loss",
        "cut_no_step1": "gradient cut, no step-1 loss",
    },
    "weights": {
        "full": "two full sets (full method)",
        "shared": "one full set",
        "lora": "two adapters of rank 16",
        "lora_shared": "one adapter of rank 32",
    },
    "score": {
        "full": "fitted to the teacher's images (full method)",
        "teacher_score": "the teacher as it is: the paper's",
        "no_matching": "no distribution matching",
    },
    "peers": {
        "full": "twostep",
        "trajectory": "trajectory regression",
        "lcd": "latent consistency distillation",
        "ladd": "LADD",
        "dmd2": "DMD2",
        "decoupled_dmd": "Decoupled DMD",
        "step1_by_teacher": "DP-DMD-like",
        "phases": "Phased-DMD-like",
    },
    "better": {
        "full": "full method",
        "critic_late": "critic's weight from 0 to 2",
        "critic_early": "critic's weight from 1 to 0",
        "two_fake_turns": "two turns of fakes and critic a student turn",
        "slow_average": "averages over 100 turns",
        "regression": "regression on the teacher's pairs beside the rest",
    },
}
