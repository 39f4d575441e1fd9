"""Learning rates: how they rise at the beginning of a run and fall at its end."""

from __future__ import annotations

from twostep.recipe.schema import Recipe


def rates(recipe: Recipe, *, turn: int, critic_turn: int, share_done: float) -> dict[str, float]:
    """By optimizer (`student`, `fake`, `critic`).

    Args:
        turn: the student's turns so far.
        critic_turn: the critic's, which begin before the student's.
        share_done: of the run, 0 to 1.
    """
    rise = recipe.training.rate_warmup_turns
    decay = recipe.training.learning_rate_decay
    factor = min(1.0, 0.1 + 0.9 * (1 - share_done) / decay) if decay else 1.0
    return {
        "student": _student_rate(recipe, turn) * factor * _risen(turn, rise),
        "fake": recipe.fake.learning_rate * factor * _risen(critic_turn, rise),
        "critic": recipe.critic.learning_rate * factor * _risen(critic_turn, rise),
    }


def _risen(turn: int, turns: int) -> float:
    """How much of its rate an optimizer has that has stepped `turn` times, 0 to 1."""
    return min(1.0, (turn + 1) / turns) if turns else 1.0


def _student_rate(recipe: Recipe, turn: int) -> float:
    """Before the decay at the end of the run."""
    settings, turns = recipe.training, recipe.losses.warmup_turns
    left = max(0.0, 1 - turn / turns) if turns else 0.0
    first = settings.warmup_learning_rate or settings.learning_rate
    return settings.learning_rate + left * (first - settings.learning_rate)


def score_rate(recipe: Recipe, *, turn: int) -> float:
    """The score's while it is fitted, after `turn` turns of it: it falls over the second half."""
    left = 1 - turn / recipe.score.fit_turns
    return recipe.score.learning_rate * min(1.0, 2 * left)
