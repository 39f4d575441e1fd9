"""The critic: heads on hidden states that a frozen network has of re-noised latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.func import functional_call

from twostep.families.family import Prediction, PromptBatch
from twostep.method.critic import CriticHeads
from twostep.method.flow import add_noise
from twostep.models.velocity import Velocity


@dataclass(frozen=True)
class Level:
    """At what samples are looked at alike: tau (B,), and noise (B, C, H, W)."""

    tau: Tensor
    noise: Tensor

    def add_to(self, clean: Tensor) -> Tensor:
        """`clean` re-noised."""
        return add_noise(clean, self.noise, self.tau)

    def repeat(self, copies: int) -> Level:
        """The same for `copies` batches one after another."""
        return Level(self.tau.repeat(copies), self.noise.repeat(copies, 1, 1, 1))


@dataclass(frozen=True)
class Look:
    """What the critic's network makes of one re-noised batch.

    Attributes:
        noisy: (B, C, H, W), what it was given.
    """

    level: Level
    noisy: Tensor
    prediction: Prediction

    def detach(self) -> Look:
        """Without the way back to what was looked at."""
        hidden = tuple(h.detach() for h in self.prediction.hidden)
        prediction = Prediction(self.prediction.velocity.detach(), hidden)
        return Look(self.level, self.noisy.detach(), prediction)


@dataclass(frozen=True)
class Critic:
    """A network's taps and the heads on them.

    Attributes:
        network: frozen; gradients go through it to the latents.
        heads: what is trained.
        taps: layers of the network, one for each head.
        patch: latents per token, along each side.
    """

    network: Velocity
    heads: CriticHeads
    taps: Sequence[int]
    patch: int

    def look(self, clean: Tensor, level: Level, prompts: PromptBatch) -> Look:
        """At latents (B, C, H, W), re-noised."""
        noisy = level.add_to(clean)
        return Look(level, noisy, self.network(noisy, level.tau, prompts, tuple(self.taps)))

    def logits(self, look: Look, *, learning: bool) -> Tensor:
        """(B, K), fp32.

        Args:
            learning: whether the heads' weights get a gradient of what is made of them.
        """
        height, width = look.noisy.shape[2:]
        inputs = (look.prediction.hidden, height // self.patch, width // self.patch)
        if learning:
            logits: Tensor = self.heads(*inputs)
            return logits
        weights = {name: weight.detach() for name, weight in self.heads.named_parameters()}
        frozen: Tensor = functional_call(self.heads, weights, inputs)
        return frozen


def looks_apart(look: Look, parts: int) -> list[Look]:
    """A look at several batches one after another, as looks at each."""
    levels = zip(look.level.tau.chunk(parts), look.level.noise.chunk(parts), strict=True)
    hidden = zip(*(h.chunk(parts) for h in look.prediction.hidden), strict=True)
    velocity = look.prediction.velocity.chunk(parts)
    predictions = [Prediction(v, tuple(h)) for v, h in zip(velocity, hidden, strict=True)]
    pairs = zip(levels, look.noisy.chunk(parts), predictions, strict=True)
    return [Look(Level(*level), noisy, seen) for level, noisy, seen in pairs]
