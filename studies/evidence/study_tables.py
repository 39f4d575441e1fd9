"""The study's tables, as Markdown.

python studies/evidence/study_tables.py runs/evidence/results.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

_COLUMNS = (
    ("second/log_likelihood", "log-likelihood", 2),
    ("second/right", "right, second judge", 3),
    ("inspector/right", "right, inspector", 3),
    ("frechet/efficientnet-lite0", "Fréchet, EfficientNet", 2),
    ("frechet/inspector", "Fréchet, inspector", 3),
    ("diversity/efficientnet-lite0", "diversity", 2),
    ("roughness", "roughness", 2),
    ("preview/log_likelihood", "log-likelihood of the preview", 2),
)


def rows_table(results: dict[str, Any], table: str) -> str:
    """One line per row: means over seeds, ± the standard error of each."""
    names = [name for _, name, _ in _COLUMNS]
    lines = [
        f"| | {' | '.join(names)} | evaluations | seeds |",
        "|---" * (len(names) + 3) + "|",
    ]
    baselines = {"teacher_8": "teacher, 8 steps", "naive_2": "its weights, 2 steps"}
    for key, label in baselines.items():
        cells = [_cell([results["baselines"][key].get(c)], digits) for c, _, digits in _COLUMNS]
        lines.append(f"| {label} | {' | '.join(cells)} | – | – |")
    full = _evaluations(results, "full")
    for name, label in results["tables"][table].items():
        runs = results["rows"].get(name)
        if not runs:
            continue
        sound = [run for run in runs if "second/log_likelihood" in run]
        cells = [_cell([run.get(c) for run in sound], digits) for c, _, digits in _COLUMNS]
        paper = results["papers"].get(name)
        spent = _evaluations(results, name)
        lines.append(
            f"| {label}{f' ({paper})' if paper else ''} | {' | '.join(cells)} | "
            f"{spent[0] / full[0]:.2f}, with the fit {spent[1] / full[1]:.2f} | {len(runs)}"
            f"{f', {len(runs) - len(sound)} diverged' if len(sound) < len(runs) else ''} |"
        )
    return "\n".join(lines)


def _evaluations(results: dict[str, Any], name: str) -> tuple[float, float]:
    """Network evaluations of a run, without and with the fit of the score it trusts."""
    runs = [r["evaluations"] for r in results["rows"].get(name, []) if "evaluations" in r]
    own = mean(runs) if runs else float("nan")
    fit = results["fit_evaluations"] if results["fitted"][name] else 0
    return own, own + fit


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    if len(known) == 1:
        return text
    return f"{text} ± {stdev(known) / len(known) ** 0.5:.{digits}f}"


def claims_table(results: dict[str, Any], section: str = "claims") -> str:
    """What was claimed beforehand, and what came of it."""
    lines = ["| claim | difference, 95% interval | seeds | p (Holm) | |", "|---|---|---|---|---|"]
    for c in results[section]:
        # Both must say so: the interval over prompts and seeds, and the test over seeds.
        holds = c["low"] > 0 and c["p_holm"] < 0.05
        word = "holds" if holds else "the reverse holds" if c["high"] < 0 else "not shown"
        lines.append(
            f"| {c['says']}: `{c['better']}` over `{c['worse']}` | {c['mean']:+.3f} "
            f"({c['low']:+.3f} to {c['high']:+.3f}) | {c['ahead']} of {c['seeds']} | "
            f"{c['p_holm']:.3f} | {word} |"
        )
    return "\n".join(lines)


def study_facts(results: dict[str, Any]) -> str:
    """Where the study's figures come from."""
    return (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}: {results['turns']} student turns of {results['batch_size']} from the "
        f"teacher's weights; each seed has its own prompts, teacher's images and a score fitted "
        f"for {results['fit_turns']} turns; {results['prompts']} held-out prompts, of a quarter a "
        "second picture for the diversity; ± one standard error over seeds. Fréchet distances are "
        "to the teacher's images from other noise; roughness is the logarithm of the power above a "
        "quarter cycle a pixel, less the teacher's."
    )


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(study_facts(found))
    for kind in ("claims", "peers"):
        print(f"\n## {kind}\n\n{claims_table(found, kind)}")
    for name in found["tables"]:
        print(f"\n## {name}\n\n{rows_table(found, name)}")
