"""What the study claims, each with its metric, written down before any run was judged.

The metric of every claim is how likely the second judge finds what was asked for: the mean over
the held-out prompts of `second_judge.log_likelihood`. A continuous figure settles with fewer images
what a yes or no needs many for, and that judge took no part in training, tuning or choice.
Directions are fixed here, so that tests are one-sided: eight seeds give 1/256 at best, and Holm's
correction over the eight claims leaves .031.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """`better` is ahead of `worse` in `metric`.

    Attributes:
        metric: a key of a run's per-picture figures; the mean is compared.
    """

    says: str
    better: str
    worse: str
    metric: str = "second/log_likelihood"


CLAIMS: tuple[Claim, ...] = (
    Claim("teacher images for the critic, without pairs", "unpaired", "external"),
    Claim("pairs by noise", "full", "unpaired"),
    Claim("a set of weights for each step", "full", "shared"),
    Claim("the same at equal parameters", "lora", "lora_shared"),
    Claim("the final loss reaches step 1", "full", "cut"),
    Claim("a loss on step 1", "full", "no_step1"),
    Claim("a critic at all", "full", "no_critic"),
    Claim("a score fitted to the teacher's images", "full", "teacher_score"),
)
# Corrected for their number by themselves: the full method against each other method.
PEERS = ("trajectory", "lcd", "ladd", "dmd2", "decoupled_dmd", "step1_by_teacher", "phases")
