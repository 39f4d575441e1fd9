"""Prints the study's tables, as Markdown.

python studies/ablation/study_tables.py runs/ablation/results.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def study_table(results: dict[str, Any], table: str) -> str:
    """One row per setting of the ablation, mean and spread over its seeds."""
    ahead = "ahead of the row above" if table == "ladder" else "the full method is ahead"
    lines = [
        "| | Fréchet | validation | accuracy | diversity | of the preview: Fréchet | accuracy "
        f"| turns to reach | evaluations | {ahead}: accuracy, Fréchet |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = results["rows"]
    whole = mean(run["evaluations"] for run in rows.get("full") or next(iter(rows.values())))
    shown: dict[str, str] = results["tables"][table]
    if table == "ladder":
        for key, name in (("teacher_8", "teacher, 8 steps"), ("naive_2", "its weights, 2 steps")):
            found = results["baselines"][key]
            lines.append(
                f"| {name} | {found['frechet_to_teacher']:.3f} | – | "
                f"{found['accuracy']['overall']:.3f} | {found['diversity']:.2f} |" + " – |" * 5
            )
    other: list[dict[str, Any]] | None = None
    for name, label in shown.items():
        runs = rows.get(name)
        if runs is None:
            continue
        paper = results["papers"].get(name)
        cells = [
            _spread([run["frechet_to_teacher"] for run in runs], 3),
            _spread([run["validation_distance"] for run in runs], 3),
            _spread([run["accuracy"]["overall"] for run in runs], 3),
            _spread([run["diversity"] for run in runs], 2),
            _spread([run["preview_frechet"] for run in runs], 2),
            _spread([run["preview_accuracy"] for run in runs], 3),
            _turns([run.get("turns_to_reach") for run in runs]),
            f"{mean(run['evaluations'] for run in runs) / whole:.2f}",
            _ahead(runs, other) if table == "ladder" else _ahead(other, runs),
        ]
        if table == "ladder" or other is None:
            other = runs
        lines.append(f"| {label}{f' ({paper})' if paper else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ahead(ours: list[dict[str, Any]] | None, theirs: list[dict[str, Any]] | None) -> str:
    """Of the seeds that both have, in how many `ours` is better: accuracy, Fréchet."""
    if ours is None or theirs is None:
        return "–"
    by_seed = {run["seed"]: run for run in theirs}
    pairs = [(run, by_seed[run["seed"]]) for run in ours if run["seed"] in by_seed]
    accuracy = sum(a["accuracy"]["overall"] > b["accuracy"]["overall"] for a, b in pairs)
    distance = sum(a["frechet_to_teacher"] < b["frechet_to_teacher"] for a, b in pairs)
    return f"{accuracy}, {distance} of {len(pairs)}"


def _spread(values: list[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def _turns(values: list[int | None]) -> str:
    arrived = [v for v in values if v is not None]
    if not arrived:
        return "not reached"
    text = f"{mean(arrived):.0f}"
    return text if len(arrived) == len(values) else f"{text} ({len(arrived)} of {len(values)})"


def study_facts(results: dict[str, Any]) -> str:
    """Where the ablation's figures come from."""
    seeds = sorted({len(runs) for runs in results["rows"].values()})
    return (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}: {results['turns']} student turns of {results['batch_size']} from the "
        f"teacher's weights, a score fitted for {results['fit_turns']} turns, "
        f"{' or '.join(map(str, seeds))} seeds; {results['images']} images of "
        f"{results['prompts']} held-out prompts; Fréchet on {results['extractor']}, floor "
        f"{results['floor']:.3f}."
    )


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(study_facts(found))
    for name in found["tables"]:
        print(f"\n## {name}\n\n{study_table(found, name)}")
