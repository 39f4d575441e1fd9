"""Writes the tables that are generated from JSON into README.md and the pages of docs/.

python tools/tables.py          rewrites them
python tools/tables.py --check  exits with 1 if one is out of date
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS.parent / "studies" / "ablation"))

from study_tables import study_facts, study_table  # noqa: E402

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


def student_table(report: dict[str, Any]) -> str:
    """One row per model of the `metrics.json` that `twostep evaluate` wrote of one student."""
    names = NAMES | {"student_2": NAMES["shipped_2"]}
    headings = ["Fréchet to teacher", "gap closed", "diversity", *CATEGORIES[:-1], "of the preview"]
    lines = [f"| | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    for key, model in report["models"].items():
        closed, accuracy = report["gap_closed"].get(key), model["accuracy"]
        preview = model.get("preview", {}).get("accuracy", {}).get("overall")
        overall = f"{accuracy['overall']:.3f} ± {model['interval']['accuracy']['overall']:.3f}"
        cells = [
            f"{model['frechet_to_teacher']:.3f}",
            "–" if closed is None else f"{100 * closed:.1f}%",
            f"{model['diversity']:.2f}",
            overall,
            *(f"{accuracy[c]:.3f}" for c in CATEGORIES[1:-1]),
            "–" if preview is None else f"{preview:.3f}",
        ]
        lines.append(f"| {names[key]} | {' | '.join(cells)} |")
    note = (
        f"`{report['command']}`, commit {report['commit']}, {report['machine']}, {report['date']}; "
        f"{report['images']} images of {report['prompts']} held-out prompts, features "
        f"{report['extractor']}, floor {report['floor']:.3f}."
    )
    return "\n".join([*lines, "", note])


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
            + f" | {memory / 2**20:.1f} | {case['ratio']:.2f} |"
        )
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}, {results['dtype']}; the best of {results['rounds']} rounds."
    )
    return "\n".join([*lines, "", note])


WAYS = {"two_sets": "two sets", "lora": "one set and two LoRAs"}


def memory_table(results: dict[str, Any]) -> str:
    """One row per way of benchmarks/memory.py: measured, and computed for the real model."""
    size = "x".join(map(str, results["real_size"]))
    lines = [
        "| steps | `--memory` | weights, MiB | peak, MiB | time | picture, dB | "
        f"{results['real'].split('/')[-1]}, {size}: weights, GiB | peak, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in results["ways"]:
        real, peak = way["real"], way["peak"]
        picture = "the same" if way["decibels"] >= 99 else f"{way['decibels']:.0f}"
        lines.append(
            f"| {WAYS[way['steps']]} | {way['memory']} | {way['weights'] / 2**20:.1f} | "
            f"{'–' if peak is None else f'{peak / 2**20:.1f}'} | {way['time']:.2f} | {picture} | "
            f"{real['transformers'] / 2**30:.1f} | {real['peak'] / 2**30:.1f} |"
        )
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; left half measured on the embedded student, fp32, batch "
        f"{results['batch']}, the best of {results['rounds']} rounds, time relative to the first "
        f"row's, pictures against the first row's ({results['images']} of them); right half "
        f"computed in bf16 at batch 1 with captions of {results['real_tokens']} tokens, LoRA rank "
        f"{results['real_rank']}. LoRA files: {'; '.join(results['lora'])}."
    )
    return "\n".join([*lines, "", note])


def kinds_table(results: dict[str, Any]) -> str:
    """What 8 bits in one kind of layer alone save and cost."""
    lines = ["| layers in 8 bits | share saved | picture, dB | in `int8` |", "|---|---|---|---|"]
    for found in sorted(results["kinds"], key=lambda k: -k["saved"]):
        lines.append(
            f"| {found['kind']} | {100 * found['saved']:.1f}% | {found['decibels']:.0f} | "
            f"{'yes' if found['packed'] else 'no'} |"
        )
    return "\n".join(lines)


STYLE = {
    "teacher_8": "teacher, 8 steps",
    "painted": "its pictures with a painted frame, through the VAE",
    "tuned_8": "teacher and LoRA, 8 steps",
    "tuned_2": "teacher and LoRA, 2 steps, untrained",
    "student_2": "student of teacher and LoRA, 2 steps",
    "shipped_2": "shipped student (no LoRA), 2 steps",
}


def style_table(results: dict[str, Any]) -> str:
    """One row per model of studies/style/run.py."""
    lines = [
        "| | brightness of the frame | less teacher and LoRA at 8 steps | accuracy |",
        "|---|---|---|---|",
    ]
    for key, name in STYLE.items():
        cells = [
            f"{results['models'][key][figure]['mean']:.3f} ± "
            f"{results['models'][key][figure]['interval']:.3f}"
            for figure in ("frame", "from_tuned", "accuracy")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    run = results["distillation"]
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; {results['held_out']} held-out prompts, ± half of a 95% interval over "
        f"them. LoRA of rank {results['lora']['rank']}, {results['lora']['turns']} turns; "
        f"{run['turns']} turns of the student in {run['minutes']:g} minutes on {run['prompts']} "
        f"prompts, after {run['score_turns']} of the score."
    )
    return "\n".join([*lines, "", note])


def carry_table(results: dict[str, Any]) -> str:
    """One row per model of studies/style/carry.py."""
    lines = [
        "| | brightness of the frame | less teacher and LoRA at 8 steps, same scale | accuracy |",
        "|---|---|---|---|",
    ]
    for name, figures in results["models"].items():
        cells = [
            f"{figures[key]['mean']:.3f} ± {figures[key]['interval']:.3f}"
            for key in ("frame", "from_tuned", "accuracy")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; {results['held_out']} held-out prompts, ± half of a 95% interval over "
        "them. The LoRA is that of the table above."
    )
    return "\n".join([*lines, "", note])


def small_weights_table(results: dict[str, Any]) -> str:
    """One row per way to hold or write weights of benchmarks/small_weights.py."""
    lines = ["| weights | picture, dB | lowest | size, of bf16's |", "|---|---|---|---|"]
    for name, way in results["ways"].items():
        lines.append(
            f"| {name} | {way['decibels']:.1f} | {way['lowest']:.1f} | {way['of_bf16']:.2f} |"
        )
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; {results['images']} pictures of {results['model']} against its own in "
        "fp32, equal noise."
    )
    return "\n".join([*lines, "", note])


def serve_tables(results: dict[str, Any]) -> str:
    """Closed and open load of benchmarks/serve.py, then its faults."""
    cases, batch = results["cases"], results["batch"]
    own = cases["sampler"]
    lines = [
        "| load | pictures/s | of the sampler's | CPU ms a picture | p50, ms | p95 | p99 | "
        "preview p50, ms | p95 |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| the sampler alone, batch {batch} | {own['rate']:.1f} | | {1e3 * own['cpu']:.1f} "
        "| | | | | |",
    ]
    if alone := cases.get("sampler 1"):
        lines.append(
            f"| the sampler alone, batch 1 | {alone['rate']:.1f} | "
            f"| {1e3 * alone['cpu']:.1f} | | | | | |"
        )

    def row(name: str, case: dict[str, Any]) -> None:
        times = [case["latency"], case["preview"]]
        cells = [f"{times[0][p]:.0f}" for p in ("p50", "p95", "p99")]
        cells += [f"{times[1][p]:.0f}" if times[1] else "" for p in ("p50", "p95")]
        share = f"{100 * case['of_sampler']:.0f}%" if "of_sampler" in case else ""
        lines.append(
            f"| {name} | {case['rate']:.1f} | {share} | "
            f"{1e3 * case['cpu']:.1f} | {' | '.join(cells)} |"
        )

    for number in results["clients"]:
        who = f"{number} client{'s' if number > 1 else ''}"
        row(who, cases[f"{number} plain"])
        row(f"{who}, previews", cases[f"{number} preview"])
        row(f"{who}, diffusers without batches", cases[f"{number} peer"])
    for share in (0.5, 0.8):
        case = cases[f"open {share}"]
        row(f"by chance, {case['asked_rate']:.1f} requests/s", case)
    flood, beside, faults = cases["flood"], cases["misbehaving"], results["faults"]
    soak = results["soak"]
    first, *later = soak["memory"]
    changes = [f"{(memory - first) / 2**20:+.1f}" for memory in later]
    grown = (flood["memory_after"] - flood["memory_before"]) / 2**20
    answered = ", ".join(f"{count} of {status}" for status, count in faults["fuzzed"].items())
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; the embedded student at {results['size']} pixels, "
        f"`--max-batch {batch}`, clients on the same cores; {results['seconds']:g} s a load, the "
        f"best of {results['rounds']} rounds (shares: the median), those of the peer "
        "(`ZImagePipeline` at two steps) and of chance once."
    )
    beside_it = (
        f"**Flood**, {flood['asked_rate']:.0f} requests/s for {results['seconds']:g} s: "
        f"{flood['statuses'].get('200', 0)} served at {flood['rate']:.1f} a second, "
        f"{flood['statuses'].get('429', 0)} refused (p50 {flood['refusal']['p50']:.0f} ms, p99 "
        f"{flood['refusal']['p99']:.0f} ms), memory {grown:+.0f} MiB, the next request answered in "
        f"{flood['first_after_ms']:.0f} ms. **Beside 50 slow bodies and 100 clients that vanish** "
        f"one good client has {beside['rate']:.1f} pictures/s (p95 {beside['latency']['p95']:.0f} "
        f"ms). **200 fuzzed bodies**: {answered}; {faults['oversized'].get('413', 0)} of 20 "
        f"oversized ones 413, {faults['wrong_key'].get('401', 0)} of 50 wrong keys 401; after them "
        f"it serves on, and ends with exit code {faults['exit_code']}. "
        f"**{soak['seconds']:.0f} s of 8 clients with previews** ({soak['pictures']} pictures) "
        f"change its memory of {first / 2**20:.0f} MiB by {', '.join(changes)} MiB, read after "
        "each quarter."
    )
    return "\n".join([*lines, "", note, "", beside_it])


def rehearsal_table(results: dict[str, Any]) -> str:
    """One row per stage of benchmarks/rehearsal.py: planned and measured."""
    lines = ["| stage | planned, GiB | measured, GiB | ratio | seconds |", "|---|---|---|---|---|"]
    for stage in results["stages"]:
        lines.append(
            f"| {stage['name']} | {stage['planned'] / 2**30:.2f} | {stage['measured'] / 2**30:.2f} "
            f"| {stage['ratio']:.2f} | {stage['seconds']:.1f} |"
        )
    note = (
        f"`{results['command']}`, commit {results['commit']}, {results['machine']}, "
        f"{results['date']}; {results['layers']} layers of the transformer's width, the folder of "
        f"{results['folder_bytes'] / 1e9:.1f} GB written in {results['folder_seconds']:.0f} s. "
        "On a CPU both are resident memory, the interpreter's included."
    )
    return "\n".join([*lines, "", note])


MEMORY = DOCS / "results" / "memory.json"
INFERENCE = DOCS / "inference.md"
ABLATION = DOCS / "results" / "ablation.json"
RESULTS = DOCS / "results.md"
TABLES = {
    "demo": (DOCS.parent / "README.md", DOCS / "results" / "demo.json", demo_table),
    "teacher": (DOCS / "teacher.md", DOCS / "results" / "emoji-teacher.json", teacher_table),
    "generate": (INFERENCE, DOCS / "results" / "generate.json", generate_table),
    "compiled": (INFERENCE, DOCS / "results" / "generate-compiled.json", generate_table),
    "memory": (INFERENCE, MEMORY, memory_table),
    "carry": (DOCS / "z-image.md", DOCS / "results" / "carry.json", carry_table),
    "kinds": (INFERENCE, MEMORY, kinds_table),
    "serve": (DOCS / "serving.md", DOCS / "results" / "serve.json", serve_tables),
    "student": (RESULTS, DOCS / "results" / "emoji-student.json", student_table),
    "small-weights": (INFERENCE, DOCS / "results" / "small-weights.json", small_weights_table),
    "style": (DOCS / "z-image.md", DOCS / "results" / "style.json", style_table),
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
        begin, end = f"<!-- {name}: generated by tools/tables.py -->", f"<!-- {name}: end -->"
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
