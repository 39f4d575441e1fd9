"""The study's rows: what each changes in `recipe.yaml`, and the tables they stand in."""

from __future__ import annotations

from dataclasses import dataclass

# Stands for the folder of rendered scenes, which the study draws when a row needs it.
EXTERNAL = "EXTERNAL"
# The scores that the study fits to the teacher's images before it trains any row, and how.
FITS: dict[str, tuple[str, ...]] = {
    "fitted": (),
    "fitted_base": ("score.model=zoo:emoji-base", "score.caption_dropout=0.1"),
}


@dataclass(frozen=True)
class Row:
    """A setting of the study.

    Attributes:
        changes: recipe overrides, `key=value`.
        turns: as a multiple of the study's: what makes its network evaluations the full method's.
        regression: the whole run is the regression of a warm-up.
        score: the fitted score that distribution matching trusts; None: a model as it is.
        paper: where the method comes from, for other methods.
    """

    changes: tuple[str, ...] = ()
    turns: float = 1.0
    regression: bool = False
    score: str | None = "fitted"
    paper: str = ""


_SHARED = ("student.steps=shared",)
_CUT = ("student.gradient=cut",)
_EXTERNAL = (f"data.reals={EXTERNAL}",)
_NO_CRITIC = ("losses.final.adversarial=0", "losses.step1.adversarial=0")
_NO_STEP1 = ("losses.step1.weight=0",)
_NO_MATCHING = (
    "losses.final.distribution_matching=0",
    "losses.step1.distribution_matching=0",
)
_GUIDED_BASE = ("score.model=zoo:emoji-base", "score.guidance_scale=2")
_BASE_WITH_GUIDANCE_BELOW = (
    "score.model=zoo:emoji-base",
    "losses.final.guidance_augmentation=1",
    "losses.step1.guidance_augmentation=1",
)

ROWS: dict[str, Row] = {
    "full": Row(),
    # The ladder trusts the teacher's own field, as the paper does; its last rung is `full`.
    "dmd": Row((*_SHARED, *_CUT, *_NO_CRITIC), score=None),
    "dmd2_like": Row((*_SHARED, *_CUT, *_EXTERNAL), score=None),
    "teacher_images": Row((*_SHARED, *_CUT), score=None),
    "decoupled": Row(_CUT, score=None),
    "end_to_end": Row(_NO_STEP1, score=None),
    "paper": Row(score=None),
    "no_critic": Row(_NO_CRITIC),
    "external": Row(_EXTERNAL),
    "shared": Row(_SHARED),
    "cut": Row(_CUT),
    "no_step1": Row(_NO_STEP1),
    "no_matching": Row(_NO_MATCHING),
    "one_fake": Row(("fake.models=one",)),
    "cold_fakes": Row(("training.critic_warmup_turns=0",)),
    "unpaired": Row(("critic.paired=false",)),
    "weak_critic": Row(("losses.final.adversarial=0.03", "losses.step1.adversarial=0")),
    "final_critic": Row(("losses.step1.adversarial=0",)),
    "regression": Row(("losses.final.regression=0.3", "losses.step1.regression=0.3")),
    "renoise": Row(("student.transition=renoise",)),
    "fitted_base": Row(("score.guidance_scale=0.25",), score="fitted_base"),
    "guided_base": Row(_GUIDED_BASE, score=None),
    "decoupled_guidance": Row(_BASE_WITH_GUIDANCE_BELOW, score=None),
    # Other methods in the same trainer: our implementations of those papers.
    "trajectory": Row(
        ("losses.warmup_step1_target=trajectory",),
        4.4,
        regression=True,
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
        5.3,
        paper="latent consistency distillation, arXiv 2310.04378",
    ),
    "ladd": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_MATCHING,
            "losses.step1.weight=0",
        ),
        1.84,
        paper="arXiv 2403.12015",
    ),
    "dmd2": Row(
        (
            *_SHARED,
            *_CUT,
            *_EXTERNAL,
            "student.transition=renoise",
            "losses.step1.weight=1",
            "training.critic_turns=5",
            "fake.models=one",
        ),
        0.33,
        score=None,
        paper="arXiv 2405.14867",
    ),
    "decoupled_dmd": Row(
        (
            *_SHARED,
            *_CUT,
            *_NO_CRITIC,
            *_BASE_WITH_GUIDANCE_BELOW,
            "student.transition=renoise",
            "losses.step1.weight=1",
            "fake.models=one",
        ),
        1.06,
        score=None,
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
        "end_to_end": "+ end to end, no step-1 loss",
        "paper": "+ step-1 loss: the paper's method",
        "full": "+ score fitted to the teacher's images: ours",
    },
    "removal": {
        "full": "full method",
        "paper": "score: the teacher as it is, not fitted",
        "no_critic": "without the critic",
        "external": "critic with external images",
        "shared": "one set of weights",
        "cut": "gradient cut",
        "no_step1": "without the step-1 loss",
        "no_matching": "without distribution matching",
    },
    "choice": {
        "full": "full method",
        "weak_critic": "critic's weight 0.03, on the final image alone",
        "final_critic": "critic on the final image alone",
        "unpaired": "critic's fakes from fresh noise",
        "one_fake": "one fake for both steps",
        "cold_fakes": "no critic turns before the first",
        "regression": "regression on the teacher's pairs kept beside the rest",
        "renoise": "re-noised transition",
        "fitted_base": "score: base, fitted to the teacher's images, with guidance 0.25",
        "guided_base": "score: base with guidance 2",
        "decoupled_guidance": "score: base, guidance below the step's sigma",
    },
    "peer": {
        "full": "twostep",
        "trajectory": "trajectory regression",
        "lcd": "latent consistency distillation",
        "ladd": "LADD",
        "dmd2": "DMD2",
        "decoupled_dmd": "Decoupled DMD",
    },
}
