"""The noise levels of a teacher's steps and of the student's two, as one value.

The convention itself (sign, time, shift) is `flow.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from twostep.method.flow import shift_sigma, unshift_sigma

if TYPE_CHECKING:  # a schedule is read without torch
    import torch
    from torch import Tensor

# How step 2 gets its latents: an Euler step on from step 1, or fresh noise on what it points to.
Transition = Literal["euler", "renoise"]


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """The `steps + 1` sigmas of an Euler sampler, from 1 down to 0.

    Shift 3 gives 1, .75, 0 for two steps and 1, .9545, .9, .8333, .75, .6429, .5, .3, 0 for eight.

    Raises:
        ValueError: if `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [float(shift_sigma(1 - i / steps, shift)) for i in range(steps)] + [0.0]


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a model, or of a recipe, at one picture size.

    Attributes:
        shift: the teacher's time shift.
        step2_sigma: the student's second noise level, between 0 and 1; the first is 1.
        transition: what lies between the student's steps.
    """

    shift: float
    step2_sigma: float
    transition: Transition = "euler"

    def __post_init__(self) -> None:
        if not 0 < self.step2_sigma < 1:
            raise ValueError(f"step2_sigma must be between 0 and 1, got {self.step2_sigma}")
        if self.transition not in get_args(Transition):
            allowed = " or ".join(get_args(Transition))
            raise ValueError(f"transition must be {allowed}, got {self.transition!r}")

    @staticmethod
    def of(
        shift: float, step2_sigma: float | None = None, transition: Transition = "euler"
    ) -> Schedule:
        """With the second noise level of the teacher's own two-step schedule unless one is named.

        Raises:
            ValueError: for a value out of range.
        """
        if step2_sigma is None:
            step2_sigma = sigma_schedule(2, shift)[1]
        return Schedule(shift, step2_sigma, transition)

    def sigmas(self, steps: int) -> list[float]:
        """The `steps + 1` noise levels of the teacher, from 1 down to 0."""
        return sigma_schedule(steps, self.shift)

    def place_of_step2(self, steps: int) -> int | None:
        """Where the student's second noise level lies among `sigmas(steps)`; None if nowhere."""
        for place, sigma in enumerate(self.sigmas(steps)):
            if abs(sigma - self.step2_sigma) < 1e-6:
                return place
        return None

    def before_shift(self, sigmas: Sequence[float]) -> list[float]:
        """What a diffusers scheduler must be given so that, after its own shift, it uses these."""
        return [float(unshift_sigma(sigma, self.shift)) for sigma in sigmas if sigma > 0]

    def draw(
        self,
        count: int,
        generator: torch.Generator | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """`count` noise levels within `bounds`: uniform before the time shift. (count,), fp32."""
        import torch

        low, high = bounds
        start, end = (float(unshift_sigma(bound, self.shift)) for bound in bounds)
        uniform = torch.rand(count, generator=generator)
        shifted = shift_sigma(start + (end - start) * uniform, self.shift)
        assert isinstance(shifted, torch.Tensor)
        return shifted.clamp(low, high)
