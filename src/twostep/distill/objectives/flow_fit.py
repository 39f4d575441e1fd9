"""Flow matching of a network on given images: how fakes and the score learn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twostep.distill.objectives.draws import Draws
from twostep.families.family import PromptBatch
from twostep.method import losses
from twostep.method.flow import add_noise, velocity_target
from twostep.method.schedule import Schedule
from twostep.models.velocity import Velocity


@dataclass(frozen=True)
class FlowFit:
    """Flow matching of a network on clean latents, at the noise levels where it will be asked."""

    schedule: Schedule
    bounds: tuple[float, float]

    def __call__(
        self, velocity: Velocity, clean: Tensor, prompts: PromptBatch, draws: Draws
    ) -> Tensor:
        tau = draws.sigma(len(clean), self.schedule, self.bounds)
        noise = draws.normal_like(clean)
        predicted = velocity(add_noise(clean, noise, tau), tau, prompts).velocity
        return losses.flow_matching(predicted, velocity_target(clean, noise))
