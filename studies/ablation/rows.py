"""The study's rows: what each changes in `recipe.yaml`, and the tables they stand in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Stands for the folder of rendered scenes, which the study draws when a row needs it.
EXTERNAL = "EXTERNAL"


@dataclass(frozen=True)
class Row:
    """A setting of the study.

    Attributes:
        changes: recipe overrides, `key=value`.
        start: the warm start it goes on from, with two sets of weights or one; or the teacher's
            own weights, so that the warm start's cost is its to spend.
        turns: as a multiple of the study's: what makes its network evaluations the full method's.
        only_warmup: the whole run is the regression of a warm-up.
        paper: where the method comes from, for other methods.
    """

    changes: tuple[str, ...] = ()
    start: Literal["two", "one", "teacher"] = "two"
    turns: float = 1.0
    only_warmup: bool = False
    paper: str = ""


_SHARED = ("student.parameters=shared",)
_CUT = ("student.gradient=cut",)
_NO_CRITIC = ("losses.final.adversarial=0",)
_NO_MATCHING = (
    "losses.final.distribution_matching=0",
    "losses.step1.distribution_matching=0",
)
_NO_REGRESSION = ("losses.final.regression=0", "losses.step1.regression=0")
_BASE_WITH_GUIDANCE_BELOW = (
    "score.model=zoo:emoji-base",
    "losses.final.guidance_augmentation=2",
    "losses.step1.guidance_augmentation=2",
)

ROWS: dict[str, Row] = {
    "full": Row(),
    "dmd": Row((*_SHARED, *_CUT, *_NO_CRITIC), "one"),
    "dmd2_like": Row((*_SHARED, *_CUT, f"data.reals={EXTERNAL}"), "one"),
    "teacher_images": Row((*_SHARED, *_CUT), "one"),
    "decoupled": Row(_CUT),
    "no_step1": Row(("losses.step1.weight=0",)),
    "no_critic": Row(_NO_CRITIC),
    "external": Row((f"data.reals={EXTERNAL}",)),
    "shared": Row(_SHARED, "one"),
    "no_matching": Row(_NO_MATCHING),
    "no_regression": Row(_NO_REGRESSION),
    "one_critic_turn": Row(("training.critic_turns=1",), turns=1.43),
    "cold_fakes": Row(("training.critic_warmup_turns=0",)),
    "one_fake": Row(("fake.models=one",)),
    "renoise": Row(("student.transition=renoise",)),
    "guided_base": Row(("score.model=zoo:emoji-base", "score.guidance_scale=2")),
    "decoupled_guidance": Row(_BASE_WITH_GUIDANCE_BELOW),
    "no_warmup": Row(start="teacher", turns=2.8),
    # Other methods in the same trainer: our implementations of those papers.
    "more_regression": Row(turns=6.3, only_warmup=True),
    "trajectory": Row(
        ("losses.warmup_step1_target=trajectory",),
        "teacher",
        16.3,
        only_warmup=True,
        paper="progressive distillation, arXiv 2202.00512",
    ),
    "lcd": Row(
        (
            *_SHARED,
            "student.transition=renoise",
            "losses.consistency=1",
            "losses.final.weight=0",
            "losses.step1.weight=0",
        ),
        "teacher",
        19.6,
        paper="latent consistency distillation, arXiv 2310.04378",
    ),
    "ladd": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_MATCHING,
            *_NO_REGRESSION,
            "losses.final.adversarial=1",
            "losses.step1.weight=0",
        ),
        "one",
        2.1,
        paper="arXiv 2403.12015",
    ),
    "dmd2": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_REGRESSION,
            f"data.reals={EXTERNAL}",
            "student.transition=renoise",
            "losses.step1.weight=1",
            "losses.step1.adversarial=0.03",
            "training.critic_turns=5",
            "fake.models=one",
        ),
        "one",
        0.42,
        paper="arXiv 2405.14867",
    ),
    "decoupled_dmd": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_CRITIC,
            *_NO_REGRESSION,
            *_BASE_WITH_GUIDANCE_BELOW,
            "student.transition=renoise",
            "losses.step1.weight=1",
            "fake.models=one",
        ),
        "one",
        1.13,
        paper="arXiv 2511.22677",
    ),
}

# Table by table, the rows in their order and what they are called there.
TABLES: dict[str, dict[str, str]] = {
    "ladder": {
        "dmd": "DMD only: no critic, one set of weights, gradient cut",
        "dmd2_like": "DMD2-like: critic with external images",
        "teacher_images": "+ teacher images",
        "decoupled": "+ decoupled steps",
        "no_step1": "+ end to end, no step-1 loss",
        "full": "full: + step-1 loss",
    },
    "removal": {
        "full": "full method",
        "no_critic": "without the critic",
        "external": "critic with external images",
        "shared": "one set of weights",
        "decoupled": "gradient cut",
        "no_step1": "without the step-1 loss",
        "no_matching": "without distribution matching",
    },
    "choice": {
        "full": "full method",
        "no_regression": "no regression beside matching",
        "one_critic_turn": "one critic turn per student turn",
        "cold_fakes": "no critic turns before the first",
        "one_fake": "one fake for both steps",
        "renoise": "re-noised transition",
        "guided_base": "score: base with guidance 2",
        "decoupled_guidance": "score: base, guidance below the step's sigma",
        "no_warmup": "no warm start",
    },
    "peer": {
        "full": "twostep",
        "more_regression": "regression alone, the warm start continued",
        "trajectory": "trajectory regression",
        "lcd": "latent consistency distillation",
        "ladd": "LADD",
        "dmd2": "DMD2",
        "decoupled_dmd": "Decoupled DMD",
    },
}
