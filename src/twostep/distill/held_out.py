"""The prompts that validation keeps to itself: a student chosen by them was not trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twostep.data.cache.spec import CacheSpec
from twostep.recipe.schema import Recipe
from twostep.runtime.randomness import Stream, rng


@dataclass(frozen=True)
class HeldOut:
    """Samples of a cache that validation uses, all of the first size.

    Attributes:
        samples: one of each prompt that no turn learns from.
        reference: of other prompts, as different ones as there are; the teacher's images that a
            student's are compared with.
    """

    spec: CacheSpec
    samples: Sequence[int]
    reference: Sequence[int]

    @staticmethod
    def of(recipe: Recipe, spec: CacheSpec) -> HeldOut:
        """Half as many prompts as `training.validation_samples`, at most a quarter of the cache's.

        The same for every training seed. With fewer than four prompts nothing is held out, and
        validation sees what the turns see.
        """
        prompts = _first_of_each(spec)
        shuffled = rng(spec.seed, Stream.HELD_OUT).permutation(len(prompts))
        firsts = [prompts[i] for i in shuffled]
        wanted = recipe.training.validation_samples // 2
        count = min(wanted, len(firsts) // 4) or min(wanted, len(firsts))
        others = firsts[count:] or firsts
        reference = [first + k for k in range(spec.samples_per_prompt) for first in others]
        return HeldOut(spec, firsts[:count], reference[: 2 * count])

    def training_samples(self) -> list[list[int]]:
        """The ids that turns learn from, for each size; no prompt's words are among the held."""
        sizes = [self.spec.samples_of(place) for place in range(len(self.spec.sizes))]
        held = {self._prompt(sample) for sample in self.samples}
        kept = [[s for s in size if self._prompt(s) not in held] for size in sizes]
        return [some or list(size) for some, size in zip(kept, sizes, strict=True)]

    def _prompt(self, sample: int) -> str:
        return self.spec.prompts[sample // self.spec.samples_per_prompt]


def _first_of_each(spec: CacheSpec) -> list[int]:
    """The first sample of each distinct prompt of the first size."""
    firsts: dict[str, int] = {}
    for sample in spec.samples_of(0)[:: spec.samples_per_prompt]:
        firsts.setdefault(spec.prompts[sample // spec.samples_per_prompt], sample)
    return list(firsts.values())
