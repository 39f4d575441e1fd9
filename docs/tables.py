"""Writes the tables that are generated from JSON into README.md and the pages of docs/.

python docs/tables.py          rewrites them
python docs/tables.py --check  exits with 1 if one is out of date
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

DOCS = Path(__file__).parent
CATEGORIES = ("overall", "single", "two", "counting", "position", "background")
NAMES = {
    "rendered": "rendered scenes",
    "teacher_8": "teacher, 8 steps",
    "teacher_4": "same weights, 4 steps",
    "teacher_2": "same weights, 2 steps",
    "base_30_guided": "undistilled base, 30 steps, guidance 2",
    "naive_2": "same weights, 2 steps",
    "student_2": "fresh student (`make demo`), 2 steps",
    "shipped_2": "shipped student, 2 steps",
}


def demo_table(report: dict[str, Any]) -> str:
    """One row per model of a demo's `report.json`."""
    slowest = report["models"]["teacher_8"]["seconds_per_image"]
    lines = [
        "| | Fréchet to teacher | gap closed | accuracy | of the preview | diversity | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, model in report["models"].items():
        closed, around = report["gap_closed"].get(key), model["interval"]
        share = "–" if closed is None else f"{100 * closed:.0f}% ± {100 * around['gap_closed']:.0f}"
        ratio = model["seconds_per_image"] / slowest
        preview = model.get("preview", {}).get("accuracy", {}).get("overall")
        lines.append(
            f"| {NAMES[key]} | {model['frechet_to_teacher']:.2f} | {share} | "
            f"{model['accuracy']['overall']:.3f} ± {around['accuracy']['overall']:.3f} | "
            f"{'–' if preview is None else f'{preview:.3f}'} | "
            f"{model['diversity']:.2f} | {ratio:.2f} |"
        )
    note = (
        f"`{report['command']}`, commit {report['commit']}, {report['machine']}, {report['date']}; "
        f"{report['images']} images of {report['prompts']} held-out prompts, features "
        f"{report['extractor']}. The floor, two disjoint teacher sets, is {report['floor']:.2f}; "
        f"± is half of a 95% interval, from {report['halves']} random halves of the prompts; time "
        "is per image, relative to the teacher's."
    )
    return "\n".join([*lines, "", note])


def teacher_table(figures: dict[str, Any]) -> str:
    """One row per sampler of the teacher's own figures."""
    lines = [
        "| | Fréchet to rendered | " + " | ".join(CATEGORIES) + " | English | Chinese |",
        "|---|---|" + "---|" * (len(CATEGORIES) + 2),
    ]
    for key, model in figures["models"].items():
        values = [model["accuracy"][c] for c in (*CATEGORIES, "en", "zh")]
        cells = " | ".join(f"{v:.3f}" for v in values)
        lines.append(f"| {NAMES[key]} | {model['frechet_to_rendered']:.2f} | {cells} |")
    return "\n".join(lines)


def study_table(results: dict[str, Any], table: str) -> str:
    """One row per setting of the ablation, mean and spread over its seeds."""
    lines = [
        "| | Fréchet | validation | accuracy | diversity | of the preview: Fréchet | accuracy "
        "| turns to reach | evaluations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = results["rows"]
    whole = mean(run["evaluations"] for run in rows["full"])
    shown: dict[str, str] = results["tables"][table]
    if table == "ladder":
        shown = {"warm_two": "warm start, two sets", "warm_one": "warm start, one set"} | shown
        for key, name in (("teacher_8", "teacher, 8 steps"), ("naive_2", "its weights, 2 steps")):
            found = results["baselines"][key]
            lines.append(
                f"| {name} | {found['frechet_to_teacher']:.3f} | – | "
                f"{found['accuracy']['overall']:.3f} | {found['diversity']:.2f} | – | – | – | – |"
            )
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
        ]
        lines.append(f"| {label}{f' ({paper})' if paper else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    seeds = sorted({len(runs) for n, runs in results["rows"].items() if not n.startswith("warm")})
    return (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}: {results['turns']} student turns of {results['batch_size']} after a "
        f"warm start of {results['warm_turns']} turns, {' or '.join(map(str, seeds))} seeds; "
        f"{results['images']} images of {results['prompts']} held-out prompts; Fréchet on "
        f"{results['extractor']}, floor {results['floor']:.3f}."
    )


def generate_table(results: dict[str, Any]) -> str:
    """One row per case of benchmarks/generate.py."""
    lines = [
        "| batch | options | steps | ms an image | text | steps | decoding | peak MiB | of the "
        "teacher's time |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        steps = case["steps_taken"]
        times = (case["total"], case["text"], sum(case["steps"]), case["decode"])
        memory = case["peak_memory_bytes"]
        lines.append(
            f"| {case['batch']} | {case['option']} | {steps} | "
            + " | ".join(f"{1e3 * t:.1f}" for t in times)
            + f" | {'–' if memory is None else round(memory / 2**20)} | {case['ratio']:.2f} |"
        )
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}, {results['dtype']}; the best of {results['rounds']} rounds."
    )
    return "\n".join([*lines, "", note])


ABLATION = DOCS / "results" / "ablation.json"
RESULTS = DOCS / "results.md"
TABLES = {
    "demo": (DOCS.parent / "README.md", DOCS / "results" / "demo.json", demo_table),
    "teacher": (DOCS / "teacher.md", DOCS / "results" / "emoji-teacher.json", teacher_table),
    "generate": (DOCS / "inference.md", DOCS / "results" / "generate.json", generate_table),
    "study": (RESULTS, ABLATION, study_facts),
    **{
        name: (RESULTS, ABLATION, partial(study_table, table=name))
        for name in ("ladder", "removal", "choice", "peer")
    },
}


def main() -> int:
    stale = []
    for name, (page, source, table) in TABLES.items():
        text = page.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: generated by docs/tables.py -->", f"<!-- {name}: end -->"
        body = f"{begin}\n{table(json.loads(source.read_text(encoding='utf-8')))}\n{end}"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        fresh, found = re.subn(pattern, lambda _, body=body: body, text, flags=re.S)
        if not found:
            raise SystemExit(f"{page} has no place for the table {name!r}")
        if fresh != text:
            stale.append(str(page))
            if "--check" not in sys.argv:
                page.write_text(fresh, encoding="utf-8")
    print(f"out of date: {', '.join(stale)}" if stale else "tables are up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
