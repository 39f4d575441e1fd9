"""What a turn is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from twostep.families.family import PromptBatch


@dataclass(frozen=True)
class Batch:
    """What one turn is given; latents are (B, C, H, W), fp32.

    Attributes:
        noise: the cached samples' initial noise.
        latents: the teacher's results from that noise.
        trajectory: the teacher's latents at the student's second noise level, if cached.
        reals, real_prompts: the critic's real samples and their captions.
        prompts, empty: the captions, and the empty prompt B times.
    """

    noise: Tensor
    latents: Tensor
    trajectory: Tensor | None
    reals: Tensor
    real_prompts: PromptBatch
    prompts: PromptBatch
    empty: PromptBatch


@dataclass(frozen=True)
class Turn:
    """A scalar to minimise, and what to log; `terms` are detached. No terms: nothing to learn.

    Attributes:
        then: what is to be minimised beside it, worked out once the loss's graph is let go.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    then: Callable[[], Turn] | None = None

    def backward(
        self,
        share: float = 1.0,
        computing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> dict[str, Tensor]:
        """Adds up the gradients of `share` times its loss, and of what follows; all the terms.

        Args:
            computing: the context of forwards.
        """
        terms, turn = self.terms, self
        while turn.terms:
            (turn.loss * share).backward()
            if turn.then is None:
                break
            with computing():
                turn = turn.then()
            terms = terms | turn.terms
        return terms
