"""`twostep serve`: models behind an OpenAI-style endpoint, with a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.arguments import (
    DecoderOption,
    DeviceOption,
    MemoryOption,
    PromptCacheOption,
    open_loras,
    parse_device,
    parse_model,
    parse_size,
)
from twostep.errors import InputError, missing_extra
from twostep.runtime.devices import check_device_name

if TYPE_CHECKING:
    from twostep.serving.served_model import ModelChoice


def serve(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(help="[NAME=]MODEL[@STEPS], a folder, zoo:NAME or a hub id; may be repeated"),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="the embedded student and its teacher")
    ] = False,
    host: Annotated[
        str, typer.Option(help="address to listen on; others than this machine's need keys")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one")] = 8000,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="a file of bearer keys, one a line; also the variable TWOSTEP_API_KEY"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="[NAME=]FILE[:SCALE], a LoRA file on the model NAME, or on all; may be repeated"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="pixels where a request names none: SIDE or WIDTHxHEIGHT; otherwise "
            "what the model was made for"
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="pictures in a batch")] = 8,
    batch_wait: Annotated[
        float, typer.Option(min=0, help="milliseconds that a batch waits for more under load")
    ] = 4,
    queue: Annotated[int, typer.Option(min=10, help="pictures that may wait; more get 429")] = 64,
    deadline: Annotated[float, typer.Option(min=0.1, help="seconds for a request; then 504")] = 60,
    max_pixels: Annotated[int, typer.Option(min=1, help="of one picture")] = 2048 * 2048,
    max_prompt: Annotated[int, typer.Option(min=1, help="characters of a prompt")] = 4000,
    memory: MemoryOption = "plain",
    decoder: DecoderOption = None,
    prompt_cache: PromptCacheOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="compile the models: a slow start, faster steps")
    ] = False,
    runs: Annotated[
        Path | None, typer.Option(help="a training's folder, or one of them, to show at /runs")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="write prompts into the log")
    ] = False,
    device: DeviceOption = "auto",
    ray: Annotated[
        bool,
        typer.Option("--ray", help="on Ray Serve: RAY_ADDRESS's cluster, or one on this machine"),
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="with --ray: processes that hold the models (1)")
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option(help="with --ray: MIN:MAX replicas, by the length of the queue")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="with --ray: GPUs of a replica, CPUs where there is none (1)"),
    ] = None,
    two_stage: Annotated[
        bool,
        typer.Option("--two-stage", help="with --ray: step 1 and step 2 in replicas of their own"),
    ] = False,
) -> None:
    """Serve models over HTTP: OpenAI's images API, a stream with step 1's preview, a page.

    Example: twostep serve --demo

    A student and its teacher: twostep serve --model runs/x/student --model teacher=FOLDER@8

    On a cluster: RAY_ADDRESS=... twostep serve --ray --autoscale 2:8 --model runs/x/student
    """
    check_device_name(device, option="--device")
    if size is not None:
        parse_size(size)
    if demo and model:
        raise InputError("--demo: serves the embedded models, give it or --model")
    try:
        from twostep.cli import serve_options, serve_ray
        from twostep.serving import served_model
        from twostep.serving.server import check_open
        from twostep.serving.server import serve as run
    except ImportError as error:
        raise missing_extra("serve", error, option="serve") from error

    asked = serve_options.read(context.params)
    check_open(asked.server)
    ready = serve_options.say_ready
    if asked.replication is not None:
        serve_ray.serve_on_ray(asked, on_ready=ready)
        return
    holding = asked.holding(parse_device(device))
    opened = served_model.open_models(asked.choices, size=asked.size)
    run(
        lambda: served_model.load_models(opened, holding),
        {each.offer.name: each.offer for each in opened},
        asked.server,
        on_ready=ready,
    )


def parse_choice(text: str) -> ModelChoice:
    """A model to serve, from "[NAME=]MODEL[@STEPS]"; its name is the folder's unless given.

    Raises:
        InputError: if what follows the last @ is no positive number.
    """
    from twostep.serving.served_model import ModelChoice

    match = re.fullmatch(r"([\w.-]+)=(.+)", text, flags=re.S)
    name, rest = (match[1], match[2]) if match else (None, text)
    folder, steps = parse_model(rest)
    if name is None:
        name = Path(folder.removeprefix("zoo:")).name
        name = name if steps is None else f"{name}@{steps}"
    return ModelChoice(name, folder, steps)


def with_loras(choices: Sequence[ModelChoice], texts: Sequence[str]) -> list[ModelChoice]:
    """The models with the LoRA files of "[NAME=]FILE[:SCALE]".

    Raises:
        InputError, ModelError: for a name that no model has, or a file that cannot be used.
    """
    found = list(choices)
    for text in texts:
        match = re.fullmatch(r"([\w.@-]+)=(.+)", text, flags=re.S)
        name, file = (match[1], match[2]) if match else (None, text)
        if name is not None and name not in [choice.name for choice in choices]:
            known = ", ".join(choice.name for choice in choices)
            raise InputError(f"--lora: no model {name!r}, there are: {known}")
        loras = tuple(open_loras([file]))
        found = [
            replace(choice, loras=(*choice.loras, *loras))
            if name in (None, choice.name)
            else choice
            for choice in found
        ]
    return found
