"""`twostep export`, `assemble` and `average`: student folders in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from twostep.cli.arguments import (
    LoraOption,
    NewFolderOption,
    SizeOption,
    open_loras,
    parse_dtype,
    parse_usual_size,
    read_prompts,
)
from twostep.cli.console import say
from twostep.runtime.progress import working

# Of `exports/registry.py`, which needs torch.
Format = Literal["diffusers", "server", "lora", "comfyui", "gguf", "torch"]

LicenceOption = Annotated[
    str | None,
    typer.Option("--license", help="for the hub: in place of the teacher's own, e.g. apache-2.0"),
]
PrivateOption = Annotated[bool, typer.Option("--private", help="on the hub, for yourself alone")]


def export(
    model: Annotated[str, typer.Option(help="a two-step student: a folder, zoo:NAME or a hub id")],
    to: Annotated[
        Format, typer.Option(help="server is for vLLM-Omni and SGLang, torch is torch.export")
    ],
    out: NewFolderOption,
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
    size: SizeOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of the weights: float32, bfloat16 or float16; as stored without it"),
    ] = None,
    lora: LoraOption = None,
    weights: Annotated[
        str | None,
        typer.Option(help="the blocks' matrices: fp8 or int8 for comfyui, q8_0 or q4_k for gguf"),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="for comfyui: whole transformers of two LoRA files")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="for torch")] = 1,
    caption_tokens: Annotated[
        int, typer.Option(min=1, help="for torch: captions are padded to this multiple of 32")
    ] = 64,
    base_model: Annotated[
        str | None,
        typer.Option(help="the teacher's name on the hub, where the student says another"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="OWNER/NAME: upload it to the Hugging Face hub, too")
    ] = None,
    licence: LicenceOption = None,
    private: PrivateOption = False,
) -> None:
    """Write a student in a format that others read.

    Example: twostep export --model runs/x/student --to comfyui --out exported
    """
    from twostep.models.folder import ModelFolder

    pixels = parse_usual_size(size)
    student = ModelFolder.open(model)
    student.check_student("model")
    if pixels is not None:
        student.latent_shape(pixels)
    prompts = () if check is None else read_prompts((), check, option="--check")
    with working(f"export: {model} to {to}"):
        from twostep.exports import hub, registry
    if push is not None:
        hub.check_repo(push)
        hub.check_has_card(to)
    options = registry.ExportOptions(
        teacher=teacher,
        rank=rank,
        energy=energy,
        check=prompts,
        base_model=base_model,
        size=pixels,
        batch_size=batch_size,
        caption_tokens=caption_tokens,
        dtype=parse_dtype(dtype),
        loras=open_loras(lora or ()),
        weights=weights,
        merged=merged,
    )
    with working(f"export: writing {out}"):
        lines = registry.export(model, to, out, options)
    for line in lines:
        say(line)
    say(f"written: {out}")
    if push is not None:
        hub.prepare(out, push, licence=licence)
        say(f"uploaded: {hub.push(out, push, private=private)}")


def push(
    folder: Annotated[Path, typer.Argument(help="a run's student, or what an export wrote")],
    name: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub")],
    licence: LicenceOption = None,
    private: PrivateOption = False,
) -> None:
    """Upload a student's folder to the Hugging Face hub; its card is made for the new place.

    Example: twostep push runs/x/student me/my-two-step --license apache-2.0
    """
    from twostep.exports import hub

    hub.prepare(folder, name, licence=licence)
    say(f"uploaded: {hub.push(folder, name, private=private)}")


def assemble(
    teacher: Annotated[str, typer.Option(help="gives everything but the transformers")],
    first: Annotated[str, typer.Option(help="a folder, a whole transformer in a file, or a LoRA")],
    second: Annotated[str, typer.Option(help="the same, for the second step")],
    out: NewFolderOption,
) -> None:
    """Make a student folder of two transformers or LoRA files that came from elsewhere.

    Example: twostep assemble --teacher TEACHER --first a.safetensors --second b/ --out student
    """
    with working(f"assemble: writing {out}"):
        from twostep.exports import combine

        combine.assemble(teacher, first, second, out=out)
    say(f"written: {out}")


def average(
    students: Annotated[
        list[str], typer.Argument(help="two or more: folders, zoo:NAME or hub ids")
    ],
    out: NewFolderOption,
) -> None:
    """Make one student of several: the mean of their weights.

    For runs of one teacher from the same weights that differ in seed or settings.

    Example: twostep average runs/a/student runs/b/student --out student
    """
    with working(f"average: writing {out}"):
        from twostep.exports import combine

        combine.average(students, out=out)
    say(f"written: {out}")
