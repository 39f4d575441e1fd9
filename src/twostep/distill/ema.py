"""Exponential moving average of parameters, in fp32 whatever the parameters' dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """bf16 averages round small increments to zero; these do not."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay, self.updates = list(parameters), decay, 0
        self.values = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """One step; early on the average is a plain mean, so that it forgets the start."""
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 1))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the average inside, and their own values again after."""
        kept = [p.detach().clone() for p in self.parameters]
        self._write(self.values)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
