"""The `twostep` command: one file for each group of commands, requests made of options.

Heavy imports stay inside the commands; nothing is computed here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twostep.cli import schema as schema_command
from twostep.cli.recipes import recipes
from twostep.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Distil a few-step text-to-image flow model into two steps, check it, and run it.",
)
app.callback()(schema_command.version)
_out = Console()

RecipeArgument = Annotated[str, typer.Argument(help="a YAML file, or zoo:NAME: twostep recipes")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. training.turns=500", show_default=False)
]
SizeOption = Annotated[str, typer.Option(help="pixels: SIDE or WIDTHxHEIGHT")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


@app.command()
def teach(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="rebuild corrupt, truncated or foreign shards")
    ] = False,
) -> None:
    """Cache the teacher's samples. Goes on where an interrupted build stopped.

    Example: twostep teach zoo:emoji-demo data.prompt_count=512

    Several processes share the work: torchrun --nproc-per-node 8 -m twostep teach RECIPE
    """
    from twostep.data.cache import build
    from twostep.recipe.schema import (
        Recipe,
    )

    _quiet()
    build.open_cache(Recipe.load(recipe, overrides or ()), repair=repair)


@app.command()
def distill(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe")] = False,
    ray: Annotated[
        int | None, typer.Option(min=1, help="run on this many workers of a Ray cluster")
    ] = None,
) -> None:
    """Distil the teacher into two steps. Run it again to resume; builds the cache if need be.

    Example: twostep distill zoo:emoji-demo training.turns=500
    """
    from twostep.recipe.schema import (
        Recipe,
    )

    resolved = Recipe.load(recipe, overrides or ())
    if dry_run:
        print(resolved.to_yaml(), end="")
        return
    _quiet()
    if ray is not None:
        from twostep.distill.on_ray import distill_on_ray

        folder = distill_on_ray(resolved, ray)
    else:
        from twostep.data.cache.build import open_cache
        from twostep.distill.trainer import Trainer

        folder = Trainer(resolved, open_cache(resolved)).train()
    _out.print(f"student: {folder}", highlight=False)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpus: Annotated[int, typer.Option(min=1, help="processes, one a GPU")] = 1,
    memory: Annotated[float, typer.Option(min=0.1, help="GiB of each")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="tokens of a caption")] = 128,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="achieved rate of each, for the time")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Work out memory, disk and time of a recipe. Loads no weights; needs none.

    Example: twostep plan zoo:z-image-turbo-lora --gpus 1 --memory 80 --tflops 400
    """
    from twostep.planning.tables import tables
    from twostep.planning.training import plan as run
    from twostep.recipe.schema import (
        Recipe,
    )

    _quiet()
    found = run(Recipe.load(recipe, overrides or ()), gpus, memory, prompt_tokens, tflops)
    if as_json:
        print(found.as_json())
        return
    for part in tables(found):
        _out.print(part, highlight=False)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="a folder, zoo:NAME or a hub id")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="prompts; - reads them from stdin, a line each")
    ] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", help="a .txt, .jsonl or .parquet file of prompts")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("runs/pictures"),
    seed: Annotated[int, typer.Option(min=0, help="seed of the first picture of each prompt")] = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="a teacher's steps (8); a student has 2")
    ] = None,
    size: SizeOption = "64",
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
    memory: Annotated[
        str, typer.Option(help="weights: plain, int8 (half of bf16's), offload (a layer at a time)")
    ] = "plain",
    decoder: Annotated[
        str | None,
        typer.Option(help="an AutoencoderTiny for the VAE: a folder, zoo:NAME or a hub id"),
    ] = None,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="a folder that keeps encoded prompts for the next run")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make pictures with a teacher or a student. Those already there are not made again.

    Example: twostep generate --model zoo:emoji-student "two cats on a red background" --count 4

    From a file, with a sheet: twostep generate --model runs/x/student --prompts all.txt --grid
    """
    from twostep.inference.generate import (
        Holding,
        parse_size,
        read_prompts,
        save_grid,
    )
    from twostep.inference.generate import (
        generate as run,
    )

    _quiet()
    texts = read_prompts(prompts or (), prompts_file)
    holding = Holding.of(memory, decoder, prompt_cache)
    pictures = []
    wanted = len(dict.fromkeys(texts)) * count
    with _bar("pictures", wanted) as advance:
        for picture in run(
            texts, model, out, seed, steps, parse_size(size), count, preview, batch_size, device,
            holding,
        ):  # fmt: skip
            pictures.append(picture)
            print(picture.as_json() if json_lines else picture.path, flush=True)
            advance()
    if grid:
        path = save_grid(pictures, out / "grid.png")
        print(json.dumps({"grid": str(path)}) if json_lines else path)


@app.command()
def compare(
    models: Annotated[
        list[str], typer.Argument(help="folders, zoo:NAME or hub ids; MODEL@STEPS for other steps")
    ],
    prompt: Annotated[list[str], typer.Option(help="may be repeated: a column for each")],
    out: Annotated[Path, typer.Option(help="the .png file")] = Path("runs/compare.png"),
    seed: Annotated[int, typer.Option(min=0, help="seed of each prompt's first column")] = 0,
    count: Annotated[int, typer.Option(min=1, help="columns per prompt, seeds ascending")] = 1,
    size: SizeOption = "64",
    preview: Annotated[
        bool, typer.Option("--preview", help="a row more for what a student's step 1 points to")
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Put models side by side: the same prompts from the same noise, a row for each model.

    Example: twostep compare zoo:emoji-teacher@2 zoo:emoji-student --prompt "a dog" --count 8
    """
    from twostep.inference.compare import compare as run
    from twostep.inference.generate import (
        parse_size,
    )

    _quiet()
    print(run(models, prompt, out, seed, count, parse_size(size), preview, device))


@app.command()
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
    seed: Annotated[int, typer.Option(min=0, help="what all the noise follows from")] = 0,
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
    size: SizeOption = "64",
    halves: Annotated[int, typer.Option(min=0, help="random halves behind each interval")] = 100,
    device: DeviceOption = "auto",
) -> None:
    """Compare students with their teacher on the same prompts and noise. Resumable.

    Example: twostep evaluate --model runs/x/student --reference path/to/teacher --out runs/check

    Several processes share the work: torchrun --nproc-per-node 8 -m twostep evaluate ...
    """
    from twostep.cli.evaluate import run_evaluation

    _quiet()
    path = run_evaluation(
        model, reference, out, prompts, images, seeds, seed, reference_steps, steps,
        features, scores, size, halves, device,
    )  # fmt: skip
    if path is not None:
        _out.print(f"report: {path.with_name('report.html')}\n        {path}", highlight=False)


@app.command()
def export(
    model: Annotated[str, typer.Option(help="a two-step student: a folder, zoo:NAME or a hub id")],
    to: Annotated[str, typer.Option(help="diffusers, lora, comfyui or torch (torch.export)")],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or not there")],
    teacher: Annotated[
        str | None, typer.Option(help="for lora: the model the files belong to")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="for lora")] = 64,
    energy: Annotated[
        float | None,
        typer.Option(help="for lora: the share of the change to keep, 0 to 1, in place of --rank"),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(help="for lora: a file of prompts to compare the pictures on"),
    ] = None,
    size: SizeOption = "64",
    batch_size: Annotated[int, typer.Option(min=1, help="for torch")] = 1,
    caption_tokens: Annotated[
        int, typer.Option(min=1, help="for torch: captions are padded to this multiple of 32")
    ] = 64,
) -> None:
    """Write a student in a format that others read.

    Example: twostep export --model runs/x/student --to comfyui --out exported
    """
    from twostep.exports import registry
    from twostep.inference.generate import (
        parse_size,
        read_prompts,
    )

    _quiet()
    prompts = () if check is None else read_prompts((), check)
    pixels = parse_size(size)
    options = registry.ExportOptions(
        teacher=teacher, rank=rank, energy=energy, check=prompts, size=pixels,
        batch_size=batch_size, caption_tokens=caption_tokens,
    )  # fmt: skip
    for line in registry.export(model, to, out, options):
        _out.print(line, highlight=False)
    _out.print(f"written: {out}", highlight=False)


@app.command()
def assemble(
    teacher: Annotated[str, typer.Option(help="gives everything but the transformers")],
    first: Annotated[str, typer.Option(help="a transformer's folder, or a LoRA file")],
    second: Annotated[str, typer.Option(help="the same, for the second step")],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or not there")],
) -> None:
    """Make a student folder of two transformers or LoRA files that came from elsewhere.

    Example: twostep assemble --teacher TEACHER --first a.safetensors --second b/ --out student
    """
    from twostep.exports.combine import assemble as run

    _quiet()
    run(teacher, first, second, out=out)
    _out.print(f"written: {out}", highlight=False)


@app.command()
def average(
    students: Annotated[
        list[str], typer.Argument(help="two or more: folders, zoo:NAME or hub ids")
    ],
    out: Annotated[Path, typer.Option(help="folder to write; must be empty or not there")],
) -> None:
    """Make one student of several: the mean of their weights.

    For runs of one teacher from the same weights that differ in seed or settings.

    Example: twostep average runs/a/student runs/b/student --out student
    """
    from twostep.exports.combine import average as run

    _quiet()
    run(students, out=out)
    _out.print(f"written: {out}", highlight=False)


@app.command()
def demo(
    minutes: Annotated[
        float, typer.Option(min=0.1, help="time for all of it: cache, distilling, evaluation")
    ] = 12.0,
    out: Annotated[Path, typer.Option(help="folder for the run and its report")] = Path(
        "runs/demo"
    ),
    images: Annotated[int, typer.Option(min=16, help="held-out images to evaluate on")] = 512,
) -> None:
    """Distil the embedded teacher into two steps and report how close the student comes.

    Example: twostep demo --minutes 12
    """
    from twostep.cli.demo import run_demo

    _quiet()
    report = run_demo(minutes, out, images)
    _out.print(f"report: {report.with_suffix('.html')}\n        {report}", highlight=False)


app.command()(schema_command.schema)
app.command()(recipes)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; what it yields advances it by one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns, console = (TextColumn(title), BarColumn(), MofNCompleteColumn()), Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bars:
        bar = bars.add_task("", total=total)
        yield lambda: bars.advance(bar)


def _quiet() -> None:
    """Our own progress bars suffice: no other library's bar for each file it opens."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point: a user's mistake ends in one clear message and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"twostep: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
