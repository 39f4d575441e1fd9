"""The rows of the study: what each changes in `recipe.yaml`."""

from __future__ import annotations

from dataclasses import dataclass

# Stands for the folder of rendered scenes, which the study draws when a row needs it.
EXTERNAL = "EXTERNAL"


@dataclass(frozen=True)
class Row:
    """A setting of the study.

    Attributes:
        label: as in the table.
        changes: recipe overrides, `key=value`.
        group: the table it belongs to.
        paper: where the method comes from, for peers.
        only_warmup: the whole run is the warm-up's regression.
    """

    label: str
    changes: tuple[str, ...]
    group: str
    paper: str = ""
    only_warmup: bool = False


_SHARED = ("student.parameters=shared",)
_CUT = ("student.gradient=cut",)
_NO_CRITIC = ("losses.final.adversarial=0",)
_NO_MATCHING = (
    "losses.final.distribution_matching=0",
    "losses.step1.distribution_matching=0",
)

ROWS: dict[str, Row] = {
    # From nothing to the method, one idea at a time.
    "dmd": Row("DMD only", (*_SHARED, *_CUT, *_NO_CRITIC), "ladder"),
    "dmd2_like": Row(
        "DMD2-like: critic with external images",
        (*_SHARED, *_CUT, f"data.reals={EXTERNAL}"),
        "ladder",
    ),
    "teacher_images": Row("+ teacher images", (*_SHARED, *_CUT), "ladder"),
    "decoupled": Row("+ decoupled steps", _CUT, "ladder"),
    "end_to_end": Row("+ end to end", ("losses.step1.weight=0",), "ladder"),
    "full": Row("full: + step-1 loss", (), "ladder"),
    # The method less one idea.
    "no_critic": Row("no critic", _NO_CRITIC, "removal"),
    "external": Row("critic with external images", (f"data.reals={EXTERNAL}",), "removal"),
    "shared": Row("shared parameters", _SHARED, "removal"),
    "cut": Row("gradient cut", _CUT, "removal"),
    "no_matching": Row("no distribution matching", _NO_MATCHING, "removal"),
    # What the abstract leaves open.
    "one_fake": Row("one fake for both steps", ("fake.models=one",), "choice"),
    "renoise": Row("re-noised transition", ("student.transition=renoise",), "choice"),
    "guided_base": Row(
        "score: base with guidance 2",
        ("score.model=zoo:emoji-base", "score.guidance_scale=2"),
        "choice",
    ),
    "decoupled_guidance": Row(
        "score: base, guidance below the step's sigma",
        (
            "score.model=zoo:emoji-base",
            "losses.final.guidance_augmentation=2",
            "losses.step1.guidance_augmentation=2",
        ),
        "choice",
    ),
    "critic_2": Row("2 critic turns per student turn", ("training.critic_turns=2",), "choice"),
    "critic_4": Row("4 critic turns per student turn", ("training.critic_turns=4",), "choice"),
    "keep_regression": Row(
        "regression kept after the warm-up",
        ("losses.final.regression=0.3", "losses.step1.regression=0.3"),
        "choice",
    ),
    # Other methods in the same trainer: our implementations of those papers.
    "regression": Row(
        "trajectory regression",
        ("losses.warmup_step1_target=trajectory",),
        "peer",
        "progressive distillation, arXiv 2202.00512",
        only_warmup=True,
    ),
    "ladd": Row(
        "LADD",
        (*_SHARED, *_CUT, *_NO_MATCHING, "losses.final.adversarial=1", "losses.step1.weight=0"),
        "peer",
        "arXiv 2403.12015",
    ),
    "dmd2": Row(
        "DMD2",
        (
            *_SHARED, *_CUT, "student.transition=renoise", f"data.reals={EXTERNAL}",
            "losses.step1.weight=1", "losses.step1.adversarial=0.03", "training.critic_turns=5",
            "fake.models=one",
        ),
        "peer",
        "arXiv 2405.14867",
    ),
    "decoupled_dmd": Row(
        "Decoupled DMD",
        (
            *_SHARED, *_CUT, *_NO_CRITIC, "student.transition=renoise", "losses.step1.weight=1",
            "score.model=zoo:emoji-base", "losses.final.guidance_augmentation=2",
            "losses.step1.guidance_augmentation=2", "fake.models=one",
        ),
        "peer",
        "arXiv 2511.22677",
    ),
}  # fmt: skip
