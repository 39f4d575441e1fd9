"""`twostep generate` and `twostep compare`: pictures made of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.arguments import (
    DecoderOption,
    DeviceOption,
    LoraOption,
    MemoryOption,
    PromptCacheOption,
    SizeOption,
    open_loras,
    parse_model,
    parse_usual_size,
    read_prompts,
)
from twostep.cli.console import as_typed
from twostep.errors import InputError
from twostep.runtime.devices import check_device_name


def generate(
    model: Annotated[
        str, typer.Option(help="a folder, zoo:NAME (see `twostep models`) or a hub id")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="prompts; - reads them from stdin, a line each")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", help="parti, or a .txt, .jsonl or .parquet file")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("runs/pictures"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="seed of the first picture of each prompt")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="a teacher's steps (8); a student has 2")
    ] = None,
    size: SizeOption = None,
    count: Annotated[int, typer.Option(min=1, help="pictures per prompt, seeds ascending")] = 1,
    preview: Annotated[
        bool, typer.Option("--preview", help="also the image that a student's step 1 points to")
    ] = False,
    grid: Annotated[
        bool, typer.Option("--grid", help="also OUT/grid.png, a row for each prompt")
    ] = False,
    json_lines: Annotated[
        bool, typer.Option("--json", help="print a line of JSON for each picture")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures at a time")] = 16,
    memory: MemoryOption = "plain",
    decoder: DecoderOption = None,
    prompt_cache: PromptCacheOption = None,
    lora: LoraOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Make pictures with a teacher or a student. Those already there are not made again.

    Example: twostep generate --model zoo:emoji-student "two cats on a red background" --count 4

    From a file, with a sheet: twostep generate --model runs/x/student --prompts all.txt --grid
    """
    from twostep.inference import generate as making
    from twostep.runtime.progress import progress_bar

    model, named_steps = parse_model(model)
    if steps is not None and named_steps not in (None, steps):
        raise InputError(f"steps: {model}@{named_steps} names other steps, got {steps}")
    steps = steps or named_steps
    options = making.SamplerOptions(
        memory=memory,
        tiny_decoder=decoder,
        prompt_cache=prompt_cache,
        device=check_device_name(device, option="--device"),
    )
    request = making.PictureRequest(
        model=model, prompts=read_prompts(prompts or (), prompts_file), seed=seed, steps=steps,
        size=parse_usual_size(size), count=count, preview=preview, batch_size=batch_size,
        options=options, loras=open_loras(lora or ()),
    )  # fmt: skip
    prepared = making.prepare(request, out)
    pictures = []
    with progress_bar("generate", len(prepared.pictures), hidden=not prepared.missing) as advance:
        for picture in prepared.make():
            pictures.append(picture)
            print(picture.as_json() if json_lines else picture.path, flush=True)
            advance(1)
    if grid:
        path = making.save_grid(pictures, out / "grid.png")
        print(json.dumps({"grid": str(path)}) if json_lines else path)


def compare(
    models: Annotated[
        list[str], typer.Argument(help="folders, zoo:NAME or hub ids; MODEL@STEPS for other steps")
    ],
    prompt: Annotated[list[str], typer.Option(help="may be repeated: a column for each")],
    out: Annotated[Path, typer.Option(help="the .png file")] = Path("runs/compare.png"),
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="seed of each prompt's first column")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="columns per prompt, seeds ascending")] = 1,
    size: SizeOption = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="a row more for what a student's step 1 points to")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Put models side by side: the same prompts from the same noise, a row for each model.

    Example: twostep compare zoo:emoji-teacher@2 zoo:emoji-student --prompt "a dog" --count 8
    """
    from twostep.inference import compare as comparing

    path = comparing.compare(
        [parse_model(model) for model in models], [as_typed(p) for p in prompt], out,
        seed=seed, count=count, size=parse_usual_size(size), preview=preview,
        device=check_device_name(device, option="--device"),
    )  # fmt: skip
    print(path)
