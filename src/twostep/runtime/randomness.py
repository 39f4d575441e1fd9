"""Random numbers as a function of (seed, stream, index): nothing to save, nothing to restore.

Each use of a recipe's seeds has a stream of its own, so that no two uses, and no two seeds, ever
draw the same numbers. A stream always has the same number of indices: numpy takes missing ones
for zeros.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What is drawn; the indices that go with it. Numbers are never used again."""

    CACHE_NOISE = 1  # sample
    ORDER = 2  # purpose, epoch, size
    DRAWS = 3  # purpose, turn, row
    VALIDATION_NOISE = 4
    EXTERNAL_REALS = 5  # batch
    EVALUATION_NOISE = 6
    CAPTION_WINDOWS = 7  # purpose, epoch, size
    SIZE_TURNS = 8  # purpose, block
    ADAPTERS = 9  # place
    HEADS = 10
    HELD_OUT = 11


def rng(seed: int, stream: Stream, *index: int) -> np.random.Generator:
    """numpy's generator for one place of a stream."""
    return np.random.default_rng((seed, stream, *index))


def seeds_of(seed: int, stream: Stream, count: int) -> list[int]:
    """`count` seeds below 2**32, all of one stream."""
    return np.random.SeedSequence((seed, stream)).generate_state(count, np.uint32).tolist()


def torch_seed(seed: int, stream: Stream, *index: int) -> int:
    """A seed for torch's generators, below 2**63."""
    state = np.random.SeedSequence((seed, stream, *index)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
