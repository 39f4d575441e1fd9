"""Learning rates: a warm-up of the student's, and a fall of all of them at the end of a run."""

from __future__ import annotations

from twostep.recipe.schema import Recipe


def rates(recipe: Recipe, *, turn: int, share_done: float) -> dict[str, float]:
    """By optimizer (`student`, `fake`, `critic`).

    Args:
        turn: the student's turns so far.
        share_done: of the run, 0 to 1.
    """
    decay = recipe.training.learning_rate_decay
    factor = min(1.0, 0.1 + 0.9 * (1 - share_done) / decay) if decay else 1.0
    return {
        "student": _student_rate(recipe, turn) * factor,
        "fake": recipe.fake.learning_rate * factor,
        "critic": recipe.critic.learning_rate * factor,
    }


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
