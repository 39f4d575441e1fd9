"""No two uses of a seed, and no two seeds, draw the same numbers."""

from __future__ import annotations

from itertools import product

import numpy as np

from twostep.distill.objectives.draws import PURPOSES
from twostep.distill.order import Order
from twostep.runtime.randomness import Stream, rng, seeds_of, torch_seed


def test_every_stream_index_and_seed_has_numbers_of_its_own() -> None:
    places = [
        (s, stream, i, j) for s, stream in product(range(3), Stream) for i, j in np.ndindex(3, 3)
    ]
    seen = {torch_seed(*place) for place in places}
    assert len(seen) == len(places) == 3 * len(Stream) * 9
    assert max(seen) < 2**63
    assert rng(1, Stream.ORDER, 2, 3, 4).random() == rng(1, Stream.ORDER, 2, 3, 4).random()


def test_seeds_are_those_of_the_first_release() -> None:
    """Cached samples and held-out noise are what they were: figures measured on them stay true."""
    state = np.random.SeedSequence((5, 1, 7)).generate_state(1, np.uint64)
    assert torch_seed(5, Stream.CACHE_NOISE, 7) == int(state[0] >> np.uint64(1))
    held_out = np.random.SeedSequence((3, 6)).generate_state(4, np.uint32)
    assert seeds_of(3, Stream.EVALUATION_NOISE, 4) == held_out.tolist()


def test_no_purpose_of_one_seed_reads_in_the_order_of_another() -> None:
    lengths = np.ones(64, int)
    orders = [
        tuple(Order([range(64)], lengths, seed=seed).of_size(0, 0, 64, purpose=purpose))
        for seed in range(4)
        for purpose in PURPOSES
    ]
    assert len(set(orders)) == len(orders) == 4 * len(PURPOSES)
