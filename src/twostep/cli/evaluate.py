"""`twostep evaluate`: students beside their teacher."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.arguments import (
    DeviceOption,
    MemoryOption,
    SizeOption,
    parse_usual_size,
)
from twostep.cli.console import note, say, strong
from twostep.errors import InputError
from twostep.runtime.devices import check_device_name

if TYPE_CHECKING:
    from twostep.evaluation.entries import Entry
    from twostep.inference.generate import SamplerOptions


def evaluate(
    model: Annotated[
        list[str], typer.Option(help="a student, or any folder of the family; may be repeated")
    ],
    reference: Annotated[str, typer.Option(help="the teacher: a folder, zoo:NAME or a hub id")],
    out: Annotated[Path, typer.Option(help="folder for images, metrics.json and report.html")],
    prompts: Annotated[
        str,
        typer.Option(
            help="emoji (held-out scenes), parti, hf:OWNER/NAME, or a .txt, .jsonl or .parquet file"
        ),
    ] = "emoji",
    images: Annotated[int, typer.Option(min=4, help="images per model")] = 512,
    seeds: Annotated[
        int, typer.Option(min=1, help="images per prompt; 2 or more for diversity")
    ] = 2,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="what all the noise follows from")
    ] = 0,
    reference_steps: Annotated[int, typer.Option(min=1, help="the teacher's steps")] = 8,
    steps: Annotated[
        int | None, typer.Option(min=1, help="steps of a model that is not a two-step student (8)")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="somebody else's model beside ours, a row each: "
            "NAME=MODEL[,steps=N][,sigmas=1:S][,lora=FILE[:SCALE]][,guidance=G]; may be repeated"
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="inspector, efficientnet-lite0, dinov2, clip, inception-v3-compat; the first "
            "gives the main figures"
        ),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(help="inspector, ocr, clip, or NAME=COMMAND of your own; may be repeated"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="a benchmark's prompts, seeds and folders in place of figures of ours: geneval, "
            "dpg, oneig, oneig-zh, longtext, longtext-zh or cvtg"
        ),
    ] = None,
    official: Annotated[
        str | None,
        typer.Option(help="the preset's own scorer, a command with {images} (docs/evaluation.md)"),
    ] = None,
    first: Annotated[
        int | None, typer.Option(min=1, help="of the preset's prompts, to try it")
    ] = None,
    size: SizeOption = None,
    halves: Annotated[int, typer.Option(min=0, help="random halves behind each interval")] = 100,
    memory: MemoryOption = "plain",
    device: DeviceOption = "auto",
) -> None:
    """Compare students with their teacher on the same prompts and noise. Resumable.

    Example: twostep evaluate --model runs/x/student --reference path/to/teacher --out runs/check

    Several processes share the work: torchrun --nproc-per-node 8 -m twostep evaluate ...
    """
    from twostep.evaluation import entries

    check_device_name(device, option="--device")
    names = entries.short_names(model)
    listed = entries.list_entries(reference, reference_steps, names, student_steps=steps)
    pixels = parse_usual_size(size) or entries.usual_size(listed)
    entries.check_size(listed, pixels)

    from twostep.distill.monitor import read_metrics
    from twostep.evaluation import evaluate as evaluation
    from twostep.evaluation.baselines import parse_baseline, with_baselines
    from twostep.evaluation.prompts import PromptSet
    from twostep.inference.generate import SamplerOptions
    from twostep.runtime.devices import pick_device
    from twostep.runtime.processes import local_device

    listed = with_baselines(listed, [parse_baseline(text) for text in baseline or ()])
    where = local_device(pick_device(device, option="--device"))
    options = SamplerOptions(memory=memory, device=where)
    if preset is not None:
        for option, given in (("prompts", prompts != "emoji"), ("features", features),
                              ("scores", scores)):  # fmt: skip
            if given:
                raise InputError(f"--{option}: a --preset has its own prompts and its own scorer")
        _benchmark(
            preset, [e for e in listed if e.kind != "naive"], out,
            official=official, size=pixels, seed=seed, first=first, options=options,
        )  # fmt: skip
        return
    if official is not None or first is not None:
        option = "--official" if official is not None else "--first"
        raise InputError(f"{option}: is for a --preset")
    is_emoji = prompts == "emoji"
    try:
        prompt_set = PromptSet.load(prompts, images, seeds, seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    if len(prompt_set) < images:
        found = len(prompt_set.prompts)
        note(f"{len(prompt_set)} images of the {images} asked for: {found} prompts x {seeds} seeds")
    request = evaluation.EvaluationRequest(
        entries=listed,
        prompts=prompt_set,
        features=features or (["inspector"] if is_emoji else ["efficientnet-lite0"]),
        scores=scores if scores is not None else (["inspector"] if is_emoji else []),
        halves=halves,
        size=pixels,
        options=options,
    )
    comparison = evaluation.evaluate(request, out / "images")
    if comparison is None:  # another process judges
        return
    path = out / "metrics.json"
    facts = {"command": shlex.join(["twostep", *sys.argv[1:]])}
    trained = Path(model[0])  # a student lies in its run's folder
    curves = read_metrics(trained.parent) if trained.is_dir() else []
    comparison.write(path, facts, curves=curves)
    strong(comparison.verdict)
    say(f"report: {path.with_name('report.html')}\n        {path}")


def _benchmark(
    name: str,
    listed: Sequence[Entry],
    out: Path,
    *,
    official: str | None,
    size: tuple[int, int],
    seed: int,
    first: int | None,
    options: SamplerOptions,
) -> None:
    """The models' pictures for a benchmark, and its scorer where one is configured."""
    from twostep.evaluation.benchmarks.official_scorer import OfficialScorer
    from twostep.evaluation.benchmarks.presets import find_preset
    from twostep.evaluation.benchmarks.run import BenchmarkRequest, as_text, run_benchmark

    preset = find_preset(name)
    scorer = None if official is None else OfficialScorer.parse(official)
    note(f"{preset.title}, {preset.source.url}: licence {preset.licence}")
    result = run_benchmark(
        BenchmarkRequest(
            preset=preset, entries=listed, size=size, seed=seed, first=first, scorer=scorer,
            options=options,
        ),
        out,
    )  # fmt: skip
    if result is not None:
        say(as_text(result))
        say(f"all of it: {out / preset.name / 'benchmark.json'}")
