"""Randomness as a function of (seed, turn, purpose): nothing to save, nothing to restore."""

from __future__ import annotations

import torch
from torch import Tensor

from twostep.method.schedule import Schedule
from twostep.runtime.randomness import Stream, torch_seed

PURPOSES = ("student", "critic", "validation", "score")


class Draws:
    """The random numbers of one turn, in the order they are asked for; drawn on CPU.

    Args:
        rows: the rows of the batch they are for. The whole batch's are drawn, so that a row's
            numbers do not depend on how the batch is divided; None for all of it.
        total: the batch's size, with `rows`.
    """

    def __init__(
        self,
        seed: int,
        turn: int,
        purpose: str,
        *,
        device: torch.device,
        rows: slice | None = None,
        total: int = 0,
    ) -> None:
        number = torch_seed(seed, Stream.DRAWS, PURPOSES.index(purpose), turn)
        self.generator, self.device = torch.Generator().manual_seed(number), device
        self.rows, self.total = rows or slice(None), total

    def _whole(self, count: int) -> int:
        return self.total or count

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn[self.rows]

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal, fp32, shaped like `tensor`."""
        shape = (self._whole(len(tensor)), *tensor.shape[1:])
        return self._own(torch.randn(shape, generator=self.generator)).to(self.device)

    def sigma(self, count: int, schedule: Schedule, bounds: tuple[float, float]) -> Tensor:
        """Noise levels (count,) within `bounds`, uniform before the time shift."""
        drawn = schedule.draw(self._whole(count), self.generator, bounds)
        return self._own(drawn).to(self.device)

    def chosen(self, count: int, share: float) -> Tensor:
        """(count,) bool, each true with probability `share`."""
        drawn = torch.rand(self._whole(count), generator=self.generator) < share
        return self._own(drawn).to(self.device)

    def integers(self, count: int, end: int) -> list[int]:
        """`count` whole numbers in 0 .. end - 1."""
        drawn = torch.randint(end, (self._whole(count),), generator=self.generator)
        return self._own(drawn).tolist()
