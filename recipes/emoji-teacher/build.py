"""Rebuilds the embedded teacher from nothing.

    python recipes/emoji-teacher/build.py --hours 3

Stages run in order and are skipped when done; a stage that was stopped goes on where it was.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from assemble import assemble, curves, measure, sheet, write_json
from autoencoder import train_autoencoder
from base import distil_guidance, train_base
from dataset import encode_scenes
from inspector_training import train_inspector
from tokenizer import write_tokenizer

from twostep.emoji.art import fetch_art

# Share of the time that each training stage gets.
SHARES = {"vae": 0.15, "inspector": 0.06, "base": 0.62, "teacher": 0.17}


def main(
    hours: Annotated[
        float, typer.Option(min=0.0, help="training time of all stages together")
    ] = 3.0,
    work: Annotated[Path, typer.Option(help="folder for data and checkpoints")] = Path("build"),
    out: Annotated[Path, typer.Option(help="where the model folders go")] = Path("build/zoo"),
    scenes: Annotated[int, typer.Option(min=2000, help="scenes in the training set")] = 160_000,
    width: Annotated[int, typer.Option(help="transformer width, a multiple of 32")] = 128,
    layers: Annotated[int, typer.Option(min=4, help="transformer layers")] = 6,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = (
        "cuda" if torch.cuda.is_available() else "cpu"
    ),
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    images: Annotated[int, typer.Option(min=16, help="held-out images to measure on")] = 512,
    vae: Annotated[Path | None, typer.Option(help="start the VAE from this folder")] = None,
) -> None:
    """Fetches the art, trains VAE, inspector, base and teacher, and writes the folders."""
    torch.set_float32_matmul_precision("high")
    minutes = {stage: 60 * hours * share for stage, share in SHARES.items()}
    encode = scenes / (400 if device == "cpu" else 4000) / 60
    art = fetch_art(work)

    def stage(name: str, expected: float, product: Path, run: Callable[[], None]) -> None:
        if product.exists():
            print(f"== {name}: done ({product})", flush=True)
            return
        print(f"== {name}: about {expected:.0f} minutes, writes {product}", flush=True)
        started = time.monotonic()
        run()
        print(f"== {name}: took {(time.monotonic() - started) / 60:.1f} minutes", flush=True)

    done = work / "scenes.done"

    def draw() -> None:
        write_tokenizer(work)
        encode_scenes(art, work, scenes, device)
        done.touch()

    def training(name: str, run: Callable[[], None]) -> None:
        stage(name, minutes[name], work / name / "config.json", run)

    training("vae", lambda: train_autoencoder(art, work, minutes["vae"], device, vae))
    training("inspector", lambda: train_inspector(art, work, minutes["inspector"], device))
    stage("scenes", encode, done, draw)
    training("base", lambda: train_base(work, minutes["base"], device, width, layers, compiled))
    training("teacher", lambda: distil_guidance(work, minutes["teacher"], device, compiled))

    teacher, base, inspector = out / "emoji-teacher", out / "emoji-base", out / "inspector"
    out.mkdir(parents=True, exist_ok=True)
    assemble(work, "teacher", teacher)
    assemble(work, "base", base)
    shutil.copytree(work / "inspector", inspector, dirs_exist_ok=True)
    figures = measure(art, teacher, base, inspector, images)
    write_json(out / "emoji-teacher.json", figures)
    sheet(teacher, inspector, out / "emoji-teacher.png")
    curves(work, out / "emoji-teacher-curves.png")
    for name, model in figures["models"].items():
        overall = model["accuracy"]["overall"]
        print(f"{name}: accuracy {overall:.3f}, Frechet {model['frechet_to_rendered']:.2f}")
    print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
