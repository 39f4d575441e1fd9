"""Votes on disk: SQLite, a row for each with who and when, also for those taken back."""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast, get_args

from twostep.errors import InputError
from twostep.voting.tasks import Shown, Task

Answer = Literal["left", "right", "same", "skip"]
ANSWERS: tuple[str, ...] = get_args(Answer)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS votes (
  id INTEGER PRIMARY KEY,
  voter TEXT NOT NULL,
  picture INTEGER NOT NULL,
  first TEXT NOT NULL,
  second TEXT NOT NULL,
  left_model TEXT NOT NULL,
  right_model TEXT NOT NULL,
  left_pictures TEXT NOT NULL,
  right_pictures TEXT NOT NULL,
  answer TEXT NOT NULL CHECK (answer IN ('left', 'right', 'same', 'skip')),
  at TEXT NOT NULL,
  seconds REAL,
  taken_back TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_vote ON votes
  (voter, picture, first, second, left_pictures, right_pictures) WHERE taken_back IS NULL;
"""


@dataclass(frozen=True)
class Vote:
    """One voter's answer to two pictures.

    Attributes:
        left, right: keys of the models.
        at: UTC, ISO 8601.
        seconds: between the pictures' appearance and the answer.
    """

    voter: str
    task: Task
    left: str
    right: str
    answer: Answer
    at: str
    seconds: float | None


class BallotBox:
    """The votes of one evaluation.

    Args:
        pictures: fingerprints of the models' pictures by key: votes on other pictures, made before
            a model was exchanged, stay in the file and do not count.

    Raises:
        InputError: if the file is not one of these.
    """

    def __init__(self, path: Path, pictures: Mapping[str, str]) -> None:
        self._pictures, self._lock = dict(pictures), threading.Lock()
        try:
            self._base = sqlite3.connect(path, check_same_thread=False, timeout=30)
            with self._lock, self._base as base:
                base.execute("PRAGMA journal_mode=WAL")
                base.executescript(_SCHEMA)
                base.execute(
                    "INSERT OR IGNORE INTO facts VALUES ('secret', ?), ('invitation', ?)",
                    (secrets.token_hex(32), secrets.token_urlsafe(12)),
                )
                facts = dict(base.execute("SELECT name, value FROM facts"))
        except sqlite3.DatabaseError as error:
            raise InputError(f"RUN: {path} holds no votes of `twostep vote`: {error}") from error
        self.secret, self.invitation = bytes.fromhex(facts["secret"]), facts["invitation"]

    def close(self) -> None:
        with self._lock:
            self._base.close()

    def add(self, voter: str, shown: Shown, answer: Answer, *, seconds: float | None) -> None:
        """Keeps a vote; a second one of the same voter on the same pictures changes nothing."""
        values = (
            voter, shown.task.row, shown.task.first, shown.task.second, shown.left, shown.right,
            self._pictures[shown.left], self._pictures[shown.right], answer, _now(), seconds,
        )  # fmt: skip
        with self._writing() as base:
            base.execute(
                "INSERT OR IGNORE INTO votes (voter, picture, first, second, left_model,"
                " right_model, left_pictures, right_pictures, answer, at, seconds)"
                f" VALUES ({', '.join('?' * len(values))})",
                values,
            )

    def take_back(self, voter: str) -> Task | None:
        """Takes the voter's last vote back; what it was on, None if there is none."""
        with self._writing() as base:
            last = None
            for number, vote in self._read(base, voter):
                last = number, vote.task
            if last is None:
                return None
            base.execute("UPDATE votes SET taken_back = ? WHERE id = ?", (_now(), last[0]))
            return last[1]

    def votes(self, voter: str | None = None) -> list[Vote]:
        """What counts, in the order in which it came; of one voter or of all."""
        with self._lock:
            return [vote for _, vote in self._read(self._base, voter)]

    def counts(self) -> dict[Task, int]:
        """Votes of all by task, without what was skipped."""
        return Counter(vote.task for vote in self.votes() if vote.answer != "skip")

    def earlier(self) -> int:
        """Votes on pictures that are no longer there."""
        with self._lock:
            (number,) = self._base.execute(
                "SELECT count(*) FROM votes WHERE taken_back IS NULL"
            ).fetchone()
        return int(number) - len(self.votes())

    def _read(self, base: sqlite3.Connection, voter: str | None) -> Iterator[tuple[int, Vote]]:
        rows = base.execute(
            "SELECT id, voter, picture, first, second, left_model, right_model, left_pictures,"
            " right_pictures, answer, at, seconds FROM votes"
            " WHERE taken_back IS NULL AND (? IS NULL OR voter = ?) ORDER BY id",
            (voter, voter),
        )
        for number, who, row, first, second, left, right, *made, answer, at, seconds in rows:
            if made != [self._pictures.get(left), self._pictures.get(right)]:
                continue
            task = Task(row, first, second)
            yield (
                number,
                Vote(who, task, left, right, answer=cast(Answer, answer), at=at, seconds=seconds),
            )

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._base as base:
            yield base


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
