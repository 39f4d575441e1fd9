"""What the votes come to: win rates, strengths, voters; as JSON, as CSV, in the report."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from twostep.evaluation.picture_index import PictureIndex
from twostep.evaluation.report.votes import put_votes
from twostep.runtime.files import write_json, write_text
from twostep.voting.ballot_box import BallotBox, Vote
from twostep.voting.tasks import Task
from twostep.voting.win_rates import bradley_terry, wilson

_COLUMNS = (
    "voter", "at", "seconds", "prompt", "seed", "picture", "left", "right", "answer", "better",
)  # fmt: skip


def summarise(
    votes: Sequence[Vote], labels: Mapping[str, str], *, earlier: int = 0
) -> dict[str, Any]:
    """The figures of `votes.json`.

    Several votes on the same two pictures count as one, their mean: voters who agree on a picture
    do not make it two pictures. A tie is half a win.

    Args:
        labels: names of the models by key, in the order of the report.
        earlier: votes on pictures that are no longer there, left out of `votes`.
    """
    counted = [vote for vote in votes if vote.answer != "skip"]
    scores = _scores(counted)
    keys = [key for key in labels if any(key in (t.first, t.second) for t in scores)]
    return {
        "votes": len(counted),
        "skipped": len(votes) - len(counted),
        "earlier": earlier,
        "pictures": len(scores),
        "models": {key: labels[key] for key in keys},
        "pairs": _pairs(keys, counted, scores),
        "strengths": _strengths(keys, scores),
        "left": _left(counted),
        "agreement": _agreement(counted),
        "voters": _voters(votes),
    }


def _scores(votes: Sequence[Vote]) -> dict[Task, float]:
    """How much better the first model's picture is, 0..1, by task."""
    found: dict[Task, list[float]] = defaultdict(list)
    for vote in votes:
        found[vote.task].append(_score(vote))
    return {task: sum(values) / len(values) for task, values in found.items()}


def _score(vote: Vote) -> float:
    if vote.answer == "same":
        return 0.5
    better = vote.left if vote.answer == "left" else vote.right
    return float(better == vote.task.first)


def _share(wins: float, count: float) -> dict[str, float]:
    low, high = wilson(wins, count)
    return {"share": wins / count, "low": low, "high": high, "count": count}


def _pairs(
    keys: Sequence[str], votes: Sequence[Vote], scores: Mapping[Task, float]
) -> list[dict[str, Any]]:
    """For each pair the later model's win rate over the earlier: a student's over its teacher."""
    rows = []
    for first, second in combinations(keys, 2):
        met = {first, second}
        own = [1 - score if task.first == first else score for task, score in scores.items()
               if {task.first, task.second} == met]  # fmt: skip
        if not own:
            continue
        answers = [_score(v) if v.task.first == second else 1 - _score(v) for v in votes
                   if {v.task.first, v.task.second} == met]  # fmt: skip
        rows.append(
            {
                "model": second,
                "against": first,
                "better": sum(a == 1 for a in answers),
                "same": sum(a == 0.5 for a in answers),
                "worse": sum(a == 0 for a in answers),
                **_share(sum(own), len(own)),
            }
        )
    return rows


def _strengths(keys: Sequence[str], scores: Mapping[Task, float]) -> dict[str, dict[str, float]]:
    """Bradley-Terry, where more than two models met."""
    if len(keys) < 3:
        return {}
    place = {key: number for number, key in enumerate(keys)}
    wins = np.zeros((len(keys), len(keys)))
    for task, score in scores.items():
        first, second = place[task.first], place[task.second]
        wins[first, second] += score
        wins[second, first] += 1 - score
    try:
        strengths, around = bradley_terry(wins)
    except ValueError:  # they never met: pairs are all that can be said
        return {}
    return {
        key: {"strength": float(strengths[i]), "around": float(around[i])}
        for key, i in place.items()
    }


def _left(votes: Sequence[Vote]) -> dict[str, float] | None:
    """How often the left picture was better: far from a half, voters did not look."""
    decided = [vote.answer for vote in votes if vote.answer != "same"]
    return _share(decided.count("left"), len(decided)) if decided else None


def _agreement(votes: Sequence[Vote]) -> dict[str, float] | None:
    """How often two voters gave the same answer to the same two pictures."""
    answers: dict[Task, list[float]] = defaultdict(list)
    for vote in votes:
        answers[vote.task].append(_score(vote))
    pairs = [a == b for found in answers.values() for a, b in combinations(found, 2)]
    return _share(sum(pairs), len(pairs)) if pairs else None


def _voters(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    rows = []
    for voter in dict.fromkeys(vote.voter for vote in votes):
        own = [vote for vote in votes if vote.voter == voter]
        times = [vote.seconds for vote in own if vote.seconds is not None]
        rows.append(
            {
                "voter": voter,
                "votes": sum(vote.answer != "skip" for vote in own),
                "skipped": sum(vote.answer == "skip" for vote in own),
                "seconds": round(median(times), 2) if times else None,
                "first": own[0].at,
                "last": own[-1].at,
            }
        )
    return rows


def as_csv(votes: Sequence[Vote], index: PictureIndex) -> str:
    """A vote a line; `better` is the model that won, empty for ties and what was skipped."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for vote in votes:
        better = {"left": vote.left, "right": vote.right}.get(vote.answer, "")
        row = vote.task.row
        writer.writerow(
            [_plain(vote.voter), vote.at, vote.seconds, _plain(index.prompt(row)),
             index.seeds[row], row, vote.left, vote.right, vote.answer, better]
        )  # fmt: skip
    return text.getvalue()


def _plain(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def write_results(run: Path, index: PictureIndex, box: BallotBox) -> dict[str, Any]:
    """Writes `votes.json`, `votes.csv` and the report's section into `run`; the figures."""
    votes = box.votes()
    labels = {key: each.label for key, each in index.sets.items()}
    summary = summarise(votes, labels, earlier=box.earlier())
    write_json(run / "votes.json", summary)
    write_text(run / "votes.csv", as_csv(votes, index))
    put_votes(run / "report.html", summary)
    return summary
