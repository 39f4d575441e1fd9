"""What is shown to whom: pairs of pictures in an order of each voter's own, sides by chance."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

# Every so many tasks a voter gets one that somebody else judged, so that agreement is measured.
_SHARED_EVERY = 8


@dataclass(frozen=True, order=True)
class Task:
    """Two models' pictures of one row; `first` and `second` are keys in the index's order."""

    row: int
    first: str
    second: str


@dataclass(frozen=True)
class Shown:
    """A task as a voter sees it.

    Attributes:
        name: says neither row nor models.
        left, right: keys, hidden from the page.
    """

    name: str
    task: Task
    left: str
    right: str


class Tasks:
    """All pairs of some models' pictures.

    Args:
        keys: of the models, two or more.
        rows: pictures of each.
        secret: of this collection of votes; names and sides follow from it.
    """

    def __init__(self, keys: Sequence[str], rows: int, secret: bytes) -> None:
        self._secret = secret
        self._all = [Task(row, *pair) for row in range(rows) for pair in combinations(keys, 2)]
        self._orders: dict[str, list[Task]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def show(self, voter: str, task: Task) -> Shown:
        """The same each time for a voter and a task."""
        digest = self._digest("show", voter, str(task.row), task.first, task.second)
        sides = (task.first, task.second)
        left, right = sides if digest[0] % 2 else sides[::-1]
        return Shown(digest[1:17].hex(), task, left, right)

    def find(self, voter: str, name: str) -> Shown | None:
        """What is shown to the voter under a name."""
        shown = (self.show(voter, task) for task in self._all)
        return next((each for each in shown if each.name == name), None)

    def next(
        self,
        voter: str,
        *,
        own: Collection[Task],
        counts: Mapping[Task, int],
        number: int = 2,
    ) -> list[Task]:
        """What the voter is to see next, `number` tasks at most.

        Tasks that nobody judged come first; every eighth is one that somebody else did.

        Args:
            own: what the voter judged or skipped.
            counts: votes of all voters by task.
        """
        left = [task for task in self._order(voter) if task not in own]
        fresh = sorted(left, key=lambda task: counts.get(task, 0))  # stable: the voter's own order
        shared = [task for task in left if counts.get(task, 0)]
        found: list[Task] = []
        while len(found) < min(number, len(left)):
            due = (len(own) + len(found) + 1) % _SHARED_EVERY == 0
            source = [task for task in shared if task not in found] if due else []
            source = source or [task for task in fresh if task not in found]
            found.append(source[0])
        return found

    def _order(self, voter: str) -> list[Task]:
        if voter not in self._orders:

            def place(task: Task) -> bytes:
                return self._digest("order", voter, str(task.row), task.first, task.second)

            self._orders[voter] = sorted(self._all, key=place)
        return self._orders[voter]

    def _digest(self, *parts: str) -> bytes:
        return hmac.digest(self._secret, "\0".join(parts).encode(), hashlib.sha256)
