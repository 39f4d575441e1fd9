"""The report's section on what people voted, put in when there are votes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from twostep.evaluation.report.words import percent
from twostep.runtime.files import write_text

_TEMPLATE = Path(__file__).with_name("votes.html")
_PLACE = re.compile(r"<!-- votes -->.*?<!-- /votes -->", re.S)


def votes_section(summary: Mapping[str, Any] | None) -> str:
    """The section as HTML between its two comments; empty but for them without votes.

    Args:
        summary: as in `votes.json`.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    if not summary or not summary["votes"]:
        return template.render(votes=0).strip()
    labels = summary["models"]
    return template.render(
        votes=summary["votes"],
        lead=_lead(summary),
        pairs=[
            {
                **row,
                "model": _capital(labels[row["model"]]),
                "against": labels[row["against"]],
                "share": percent(row["share"]),
                "interval": f"{percent(row['low'])} to {percent(row['high'])}",
            }
            for row in summary["pairs"]
        ],
        strengths="; ".join(
            f"{labels[key]} {_signed(value['strength'])} ± {value['around']:.2f}"
            for key, value in summary["strengths"].items()
        ),
        checks=_checks(summary),
    ).strip()


def votes_text(summary: Mapping[str, Any]) -> str:
    """The win rates in lines, for a terminal."""
    labels = summary["models"]
    lines = [f"{_count(summary['votes'], 'vote')} of {_count(len(summary['voters']), 'voter')}"]
    lines += [
        f"{labels[row['model']]} against {labels[row['against']]}: {_with_interval(row)}; "
        f"{row['better']} better, {row['same']} same, {row['worse']} worse"
        for row in summary["pairs"]
    ]
    lines += [
        f"{labels[key]}: strength {_signed(value['strength'])} ± {value['around']:.2f}"
        for key, value in summary["strengths"].items()
    ]
    return "\n".join(lines)


def read_votes(report: Path) -> dict[str, Any] | None:
    """The figures of the votes beside a report, if somebody voted."""
    path = report.with_name("votes.json")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def put_votes(report: Path, summary: Mapping[str, Any]) -> None:
    """Puts the section into a written report; one of an older version has no place for it."""
    if not report.exists():
        return
    page = report.read_text(encoding="utf-8")
    section = votes_section(summary)
    write_text(report, _PLACE.sub(lambda _: section, page, count=1))


def _lead(summary: Mapping[str, Any]) -> str:
    voters, votes, pictures = len(summary["voters"]), summary["votes"], summary["pictures"]
    return (
        f"{_count(votes, 'vote')} of {_count(voters, 'voter')} on {_count(pictures, 'pair')} of "
        "pictures of one prompt; sides by chance, names hidden. A tie is half a win; several votes "
        "on the same two pictures count as one, their mean. Wilson’s interval."
    )


def _checks(summary: Mapping[str, Any]) -> str:
    found = []
    if summary["left"]:
        found.append(f"The left picture was preferred in {_with_interval(summary['left'])}")
    if summary["agreement"]:
        found.append(f"two voters agreed in {_with_interval(summary['agreement'])}")
    if summary["skipped"]:
        found.append(f"{summary['skipped']} skipped")
    if summary["earlier"]:
        found.append(f"{_count(summary['earlier'], 'vote')} on earlier pictures left out")
    return "; ".join(found) + "." if found else ""


def _with_interval(share: Mapping[str, float]) -> str:
    low, high = percent(share["low"]), percent(share["high"])
    return f"{percent(share['share'])} ({low} to {high}, n = {share['count']:g})"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
