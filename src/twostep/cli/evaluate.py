"""`twostep evaluate`: students beside their teacher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

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
    features: Annotated[
        list[str] | None,
        typer.Option(help="inspector, efficientnet-lite0, ...; the first gives the main figures"),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(help="inspector, ocr, clip, or NAME=COMMAND of your own; may be repeated"),
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

    from twostep.evaluation import evaluate as evaluation
    from twostep.evaluation.prompts import PromptSet
    from twostep.inference.generate import SamplerOptions
    from twostep.runtime.devices import pick_device
    from twostep.runtime.processes import local_device

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
        options=SamplerOptions(
            memory=memory, device=local_device(pick_device(device, option="--device"))
        ),
    )
    comparison = evaluation.evaluate(request, out / "images")
    if comparison is None:  # another process judges
        return
    path = out / "metrics.json"
    comparison.write(path, {"command": shlex.join(["twostep", *sys.argv[1:]])})
    strong(comparison.verdict)
    say(f"report: {path.with_name('report.html')}\n        {path}")
