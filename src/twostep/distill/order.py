"""Which samples a turn is given: a function of seed, purpose and turn, whatever the processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twostep.distill.objectives.draws import PURPOSES
from twostep.runtime.randomness import Stream, rng


class Order:
    """Batches of one size, each size taking its turn, in a new order each epoch.

    Turns of another purpose (`draws.PURPOSES`) read in another order.

    Args:
        sizes: the ids of the samples of each picture size, about equally many.
        lengths: tokens of each sample's caption, by id.
        window: batches that are sorted by caption length together, so that their captions pad to
            much the same; 1 leaves them as they are drawn. A window drops what is left of an epoch.
        files: each sample's file, by id, and how many of them are drawn from at a time; None: all.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        lengths: np.ndarray,
        *,
        seed: int,
        window: int = 1,
        files: tuple[np.ndarray, int] | None = None,
    ) -> None:
        self.sizes, self.lengths, self.seed, self.window = sizes, lengths, seed, window
        self.files = files
        # The last epoch of each purpose and size is enough.
        self._drawn: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def batch(self, turn: int, batch_size: int, *, purpose: str) -> list[int]:
        """The sample ids of a turn."""
        block, place = divmod(turn, len(self.sizes))
        generator = rng(self.seed, Stream.SIZE_TURNS, PURPOSES.index(purpose), block)
        turns_of_sizes = generator.permutation(len(self.sizes))
        return self.of_size(int(turns_of_sizes[place]), block, batch_size, purpose=purpose)

    def of_size(self, size: int, number: int, batch_size: int, *, purpose: str) -> list[int]:
        """Batch `number` among those of one size."""
        samples, which = self.sizes[size], PURPOSES.index(purpose)
        if self.window > 1 and len(samples) >= batch_size:
            epoch, place = divmod(number, len(samples) // batch_size)
            sorted_ids = self._sorted(which, epoch, size, batch_size)
            return sorted_ids[place * batch_size : (place + 1) * batch_size].tolist()
        ids = []
        for position in range(number * batch_size, (number + 1) * batch_size):
            epoch, place = divmod(position, len(samples))
            ids.append(int(self._shuffled(which, epoch, size)[place]))
        return ids

    def _shuffled(self, purpose: int, epoch: int, size: int) -> np.ndarray:
        drawn, shuffled = self._drawn.get((purpose, size), (-1, np.empty(0)))
        if drawn != epoch:
            samples = self.sizes[size]
            generator = rng(self.seed, Stream.ORDER, purpose, epoch, size)
            shuffled = self._permuted(np.asarray(samples), generator)
            self._drawn[purpose, size] = epoch, shuffled
        return shuffled

    def _permuted(self, ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self.files is None:
            return ids[generator.permutation(len(ids))]
        file_of, at_once = self.files
        files = generator.permutation(np.unique(file_of[ids]))
        groups = [files[i : i + at_once] for i in range(0, len(files), at_once)]
        return np.concatenate(
            [generator.permutation(ids[np.isin(file_of[ids], group)]) for group in groups]
        )

    def _sorted(self, purpose: int, epoch: int, size: int, batch_size: int) -> np.ndarray:
        """An epoch's ids, window by window in order of caption length, batches shuffled again."""
        shuffled = self._shuffled(purpose, epoch, size)
        batches = len(shuffled) // batch_size
        windows = np.array_split(
            shuffled[: batches * batch_size].reshape(batches, batch_size),
            range(self.window, batches, self.window),
        )
        rows = [
            w.ravel()[np.argsort(self.lengths[w.ravel()], kind="stable")].reshape(w.shape)
            for w in windows
        ]
        generator = rng(self.seed, Stream.CAPTION_WINDOWS, purpose, epoch, size)
        if self.files is not None:  # batches of one window stay together
            return np.concatenate([generator.permutation(window) for window in rows]).ravel()
        order = generator.permutation(batches)
        return np.concatenate(rows)[order].ravel()
