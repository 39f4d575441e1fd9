"""The critic: heads on the frozen teacher's hidden states of re-noised latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from twostep.families.family import PromptBatch
from twostep.method.critic import CriticHeads
from twostep.models.velocity import Velocity


@dataclass(frozen=True)
class Critic:
    """The teacher's taps and the heads, in one call.

    Attributes:
        teacher: frozen; gradients go through it to the latents.
        heads: what is trained.
        taps: layers of the teacher, one for each head.
        patch: latents per token, along each side.
    """

    teacher: Velocity
    heads: CriticHeads
    taps: Sequence[int]
    patch: int

    def __call__(self, noisy: Tensor, tau: Tensor, prompts: PromptBatch) -> Tensor:
        """Logits (B, K) for latents (B, C, H, W) at noise levels tau (B,)."""
        hidden = self.teacher(noisy, tau, prompts, tuple(self.taps)).hidden
        logits: Tensor = self.heads(
            hidden, noisy.shape[2] // self.patch, noisy.shape[3] // self.patch
        )
        return logits
