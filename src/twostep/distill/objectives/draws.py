"""Randomness as a function of (seed, turn, purpose): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from twostep.method.schedule import Schedule
from twostep.runtime.randomness import Stream, torch_seed

PURPOSES = ("student", "critic", "validation", "score")


class Draws:
    """The random numbers of one turn, in the order they are asked for; drawn on CPU.

    Each row of the batch has a generator of its own, so that its numbers do not depend on how the
    batch is divided, and no row's are drawn but where it is.

    Args:
        rows: the rows of the batch they are for; None for all of it.
    """

    def __init__(
        self,
        seed: int,
        turn: int,
        purpose: str,
        *,
        device: torch.device,
        rows: slice | None = None,
    ) -> None:
        self.device, self._first = device, 0 if rows is None else rows.start
        self._place = (seed, Stream.DRAWS, PURPOSES.index(purpose), turn)
        self._rows: list[torch.Generator] = []

    def _generators(self, count: int) -> list[torch.Generator]:
        """Of the first `count` rows at hand."""
        for row in range(self._first + len(self._rows), self._first + count):
            self._rows.append(torch.Generator().manual_seed(torch_seed(*self._place, row)))
        return self._rows[:count]

    def places(self, count: int) -> range:
        """Where the first `count` rows at hand stand in the batch."""
        return range(self._first, self._first + count)

    def only(self, rows: Sequence[int]) -> Draws:
        """Further numbers of some of the rows at hand."""
        chosen = copy(self)
        generators = self._generators(max(rows) + 1)
        chosen._rows = [generators[row] for row in rows]
        return chosen

    def _placed(self, drawn: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return drawn.to(self.device)
        # A copy from pageable memory would wait for all that the device still has to do.
        return drawn.pin_memory().to(self.device, non_blocking=True)

    def normal_like(self, tensor: Tensor) -> Tensor:
        """Standard normal, fp32, shaped like `tensor`."""
        drawn = torch.empty(tensor.shape)
        for row, generator in zip(drawn, self._generators(len(tensor)), strict=True):
            row.normal_(generator=generator)
        return self._placed(drawn)

    def sigma(self, count: int, schedule: Schedule, bounds: tuple[float, float]) -> Tensor:
        """Noise levels (count,) within `bounds`, uniform before the time shift."""
        return self._placed(
            torch.cat([schedule.draw(1, g, bounds) for g in self._generators(count)])
        )

    def chosen(self, count: int, share: float) -> Tensor:
        """(count,) bool, each true with probability `share`."""
        drawn = torch.cat([torch.rand(1, generator=g) for g in self._generators(count)])
        return self._placed(drawn < share)

    def integers(self, count: int, end: int) -> list[int]:
        """`count` whole numbers in 0 .. end - 1."""
        return [int(torch.randint(end, (), generator=g)) for g in self._generators(count)]
