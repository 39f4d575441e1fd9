"""Which samples a turn is given: a function of seed and turn, whatever the processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Order:
    """Batches of one size, each size taking its turn, in a new order each epoch.

    Args:
        sizes: the ids of the samples of each picture size, about equally many.
        lengths: tokens of each sample's caption, by id.
        window: batches that are sorted by caption length together, so that their captions pad to
            much the same; 1 leaves them as they are drawn. A window drops what is left of an epoch.
    """

    def __init__(self, sizes: Sequence[range], lengths: np.ndarray, window: int = 1) -> None:
        self.sizes, self.lengths, self.window = sizes, lengths, window
        self._drawn: dict[tuple[int, int, int], np.ndarray] = {}

    def batch(self, turn: int, batch_size: int, seed: int) -> list[int]:
        """The sample ids of a turn."""
        block, place = divmod(turn, len(self.sizes))
        turns_of_sizes = np.random.default_rng((seed, 6, block)).permutation(len(self.sizes))
        return self.of_size(int(turns_of_sizes[place]), block, batch_size, seed)

    def of_size(self, size: int, number: int, batch_size: int, seed: int) -> list[int]:
        """Batch `number` among those of one size."""
        samples = self.sizes[size]
        if self.window > 1 and len(samples) >= batch_size:
            epoch, place = divmod(number, len(samples) // batch_size)
            sorted_ids = self._sorted(size, epoch, batch_size, seed)
            return sorted_ids[place * batch_size : (place + 1) * batch_size].tolist()
        ids = []
        for position in range(number * batch_size, (number + 1) * batch_size):
            epoch, place = divmod(position, len(samples))
            ids.append(int(self._shuffled(size, epoch, seed)[place]))
        return ids

    def _shuffled(self, size: int, epoch: int, seed: int) -> np.ndarray:
        key = (seed, epoch, size)
        if key not in self._drawn:
            # The last epoch of each size and seed is enough.
            for old in [k for k in self._drawn if k[0] == seed and k[2] == size]:
                del self._drawn[old]
            state = (seed, 2, epoch, size) if size else (seed, 2, epoch)
            samples = self.sizes[size]
            shuffled = np.random.default_rng(state).permutation(len(samples)) + samples.start
            self._drawn[key] = shuffled
        return self._drawn[key]

    def _sorted(self, size: int, epoch: int, batch_size: int, seed: int) -> np.ndarray:
        """An epoch's ids, window by window in order of caption length, batches shuffled again."""
        shuffled = self._shuffled(size, epoch, seed)
        batches = len(shuffled) // batch_size
        windows = np.array_split(
            shuffled[: batches * batch_size].reshape(batches, batch_size),
            range(self.window, batches, self.window),
        )
        rows = [
            w.ravel()[np.argsort(self.lengths[w.ravel()], kind="stable")].reshape(w.shape)
            for w in windows
        ]
        order = np.random.default_rng((seed, 7, epoch, size)).permutation(batches)
        return np.concatenate(rows)[order].ravel()
