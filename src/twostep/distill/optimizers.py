"""The optimizer of each trained role, and its states without a step."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import Tensor, nn

from twostep.distill.objectives.roles import Roles
from twostep.recipe.schema import Recipe


def build_optimizers(recipe: Recipe, roles: Roles) -> dict[str, torch.optim.Optimizer]:
    """By purpose: student, fake, critic, and score where one is fitted."""

    settings = recipe.training

    def build(name: str, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        if settings.optimizer == "adafactor":
            return torch.optim.Adafactor(
                parameters, lr=rate, weight_decay=settings.weight_decay, foreach=False
            )
        return torch.optim.AdamW(
            parameters, lr=rate, betas=recipe.betas[name], weight_decay=settings.weight_decay
        )

    optimizers = {
        name: build(name, parameters, rate)
        for name, parameters, rate in (
            ("student", roles.student_parameters(), settings.learning_rate),
            ("fake", roles.fake_parameters(), recipe.fake.learning_rate),
            ("critic", list(roles.critic.heads.parameters()), recipe.critic.learning_rate),
        )
    }
    if recipe.score.fit_turns:
        rate = recipe.score.learning_rate
        optimizers["score"] = build("score", roles.score.parameters(), rate)
    return optimizers


def empty_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What `optimizer` keeps of `parameter` after a step, in zeros."""
    step = torch.zeros(())
    like = parameter.detach()
    if not isinstance(optimizer, torch.optim.Adafactor):
        return {
            "step": step,
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
        }
    if like.ndim < 2:
        return {"step": step, "variance": torch.zeros_like(like)}
    rows, columns = list(like.shape), list(like.shape)
    rows[-1] = columns[-2] = 1
    return {"step": step, "row_var": like.new_zeros(rows), "col_var": like.new_zeros(columns)}


def make_states(optimizer: torch.optim.Optimizer, prefix: str, names: Set[str]) -> None:
    """Gives an optimizer that has not stepped yet the states that `names` has for it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if f"{prefix}{index}/step" in names:
            optimizer.state[parameter] = empty_state(optimizer, parameter)


def state_numbers(parameter: Tensor, optimizer: str) -> int:
    """How many numbers the named optimizer keeps of `parameter`."""
    if optimizer == "adamw":
        return 2 * parameter.numel()
    if parameter.ndim < 2:
        return parameter.numel()
    return parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
