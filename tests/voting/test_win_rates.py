from __future__ import annotations

import math

import numpy as np
import pytest

from twostep.voting.win_rates import Z, bradley_terry, wilson


def test_wilson_by_hand() -> None:
    low, high = wilson(15, 20, z=2.0)
    # (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 3/4, n = 20.
    half = 2 * math.sqrt(0.75 * 0.25 / 20 + 4 / 1600)
    assert (low, high) == pytest.approx(((0.85 - half) / 1.2, (0.85 + half) / 1.2), abs=1e-12)
    # Its ends are where the share is z standard errors away from what was seen.
    for end in wilson(15, 20):
        assert abs(0.75 - end) / math.sqrt(end * (1 - end) / 20) == pytest.approx(Z, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(2.5, 5)[0] == pytest.approx(1 - wilson(2.5, 5)[1])
    with pytest.raises(ValueError, match=r"within 0\.\.5"):
        wilson(6, 5)


def test_two_models_have_the_odds_of_their_wins() -> None:
    strengths, around = bradley_terry(np.array([[0.0, 30.0], [10.0, 0.0]]))
    # With the tie that is added, 30.5 to 10.5: log-odds and their standard error in closed form.
    assert strengths[0] - strengths[1] == pytest.approx(math.log(30.5 / 10.5), abs=1e-8)
    assert around.sum() == pytest.approx(Z * math.sqrt(1 / 30.5 + 1 / 10.5), abs=1e-6)
    assert strengths.sum() == pytest.approx(0, abs=1e-9)


def test_strengths_that_made_the_votes_are_found_again() -> None:
    true = np.array([0.9, 0.1, -0.2, -0.8])
    chance = 1 / (1 + np.exp(true[None] - true[:, None]))
    wins = 1e6 * chance
    np.fill_diagonal(wins, 0)
    wins[0, 3] = wins[3, 0] = 0  # these two never met; the others connect them
    strengths, around = bradley_terry(wins)
    assert strengths == pytest.approx(true, abs=1e-5)
    assert (around < 0.01).all()
    # At the maximum every model has won as often as its strength expects.
    always, _ = bradley_terry(np.array([[0.0, 5.0, 5.0], [0.0, 0.0, 5.0], [0.0, 0.0, 0.0]]))
    assert np.isfinite(always).all()
    assert list(np.argsort(-always)) == [0, 1, 2]
    with pytest.raises(ValueError, match="never met"):
        bradley_terry(np.array([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
