from __future__ import annotations

from twostep.distill.objectives.terms import TERMS
from twostep.distill.progress import _SHOWN
from twostep.recipe.objective import Step1Losses


def test_every_weight_of_a_recipe_has_its_term() -> None:
    weights = set(Step1Losses.model_fields) - {"weight", "tau_range"}
    assert {term.name for term in TERMS} == weights


def test_the_progress_bar_calls_a_term_by_its_short_name() -> None:
    shown = {term.name: term.short for term in TERMS if term.short}
    assert {f"final/{name}": short for name, short in shown.items()}.items() <= _SHOWN.items()
