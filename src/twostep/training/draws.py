"""Randomness as a function of (seed, turn, purpose): nothing to save, nothing to restore."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from twostep.flow import sample_sigma

PURPOSES = ("student", "critic", "validation")


class Draws:
    """The random numbers of one turn, in the order they are asked for; drawn on CPU."""

    def __init__(self, seed: int, turn: int, purpose: str, device: torch.device) -> None:
        state = np.random.SeedSequence((seed, 3, PURPOSES.index(purpose), turn))
        number = int(state.generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.generator, self.device = torch.Generator().manual_seed(number), device

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal, fp32, shaped like `tensor`."""
        return torch.randn(tensor.shape, generator=self.generator).to(self.device)

    def sigma(self, count: int, shift: float, bounds: tuple[float, float]) -> Tensor:
        """Noise levels (count,), uniform before the time shift."""
        return sample_sigma(count, shift, self.generator, *bounds, device=self.device)

    def integers(self, count: int, end: int) -> list[int]:
        """`count` whole numbers in 0 .. end - 1."""
        return torch.randint(end, (count,), generator=self.generator).tolist()
