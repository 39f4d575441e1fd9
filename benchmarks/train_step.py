"""Time, achieved rate and peak memory of the student's and the critic's turn, on random weights.

python benchmarks/train_step.py zoo:z-image-turbo-lora --device cuda
python benchmarks/train_step.py zoo:emoji-demo --out runs/benchmarks/train.json

Weights are drawn at random in the shape of the recipe's teacher, so that nothing is downloaded;
prompts and latents are random too. Operations are those that `twostep plan` counts; the rate is
compared with that of large matrix products on the same device, measured in the same run.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import ZImageTransformer2DModel
from torch import Tensor, nn

from twostep.data.cache.spec import recipe_schedule
from twostep.distill.objectives.batch import Batch, Turn
from twostep.distill.objectives.build import build_roles
from twostep.distill.objectives.draws import Draws
from twostep.distill.objectives.roles import Roles
from twostep.distill.objectives.turns import Objectives
from twostep.families.family import PromptBatch
from twostep.models.folder import ModelFolder
from twostep.planning.training import plan
from twostep.planning.weightless import open_weightless, random_batch
from twostep.recipe.schema import Recipe
from twostep.runtime.devices import pick_device
from twostep.runtime.files import write_atomically
from twostep.runtime.provenance import git_commit, machine

_MATRIX = {"cuda": 8192, "cpu": 2048}


def median_seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The median time of `run`, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, repeats: int) -> float:
    """Operations per second of a large bf16 matrix product."""
    size = _MATRIX[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats, device)


def one_turn(
    compute: Callable[[Batch, Draws], Turn],
    batch: Batch,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    autocast: bool,
) -> None:
    """Forwards, backwards and the optimizer's step."""
    device = batch.noise.device
    optimizer.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, autocast):
        turn = compute(batch, Draws(0, 0, "student", device=device))
    turn.loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def list_forward(model: nn.Module, latents: Tensor, sigma: Tensor, prompts: PromptBatch) -> Tensor:
    """diffusers' own forward, which takes lists: the straightforward way."""
    images = list(latents.unsqueeze(2))
    captions = [e[:n] for e, n in zip(prompts.embeds, prompts.lengths.tolist(), strict=True)]
    forward = ZImageTransformer2DModel.forward
    return torch.stack(forward(model, images, 1 - sigma, captions, return_dict=False)[0])


def forwards(roles: Roles, batch: Batch, repeats: int, autocast: bool) -> dict[str, float]:
    """Seconds of a forward and backward through the first step: ours, and diffusers' on lists."""
    field, device = roles.first, batch.noise.device
    sigma = torch.full((len(batch.noise),), 0.75, device=device)

    def run(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def go() -> None:
            with torch.autocast(device.type, torch.bfloat16, autocast):
                loss = forward().float().square().mean()
            loss.backward()

        return go

    ours = run(lambda: field(batch.noise, sigma, batch.prompts).velocity)
    theirs = run(lambda: list_forward(field.model, batch.noise, sigma, batch.prompts))
    return {
        "batched": median_seconds(ours, repeats, device),
        "lists": median_seconds(theirs, repeats, device),
    }


def shared_forwards(roles: Roles, batch: Batch, repeats: int, autocast: bool) -> dict[str, float]:
    """Seconds of two forwards without gradient, and of one with both inputs in one batch.

    Where two roles see the same input on one set of weights, as score and fake do with LoRA, one
    forward could serve both: this is the most that it would save.
    """
    field, device = roles.teacher, batch.noise.device
    sigma = torch.full((len(batch.noise),), 0.75, device=device)
    twice = (
        torch.cat([batch.noise] * 2), sigma.repeat(2), PromptBatch.cat([batch.prompts] * 2)
    )  # fmt: skip

    def run(*calls: tuple[Tensor, Tensor, PromptBatch]) -> Callable[[], None]:
        def go() -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, autocast):
                for call in calls:
                    field(*call)

        return go

    once = (batch.noise, sigma, batch.prompts)
    return {
        "two": median_seconds(run(once, once), repeats, device),
        "one_of_both": median_seconds(run(twice), repeats, device),
    }


def main(
    recipe_path: Annotated[str, typer.Argument(metavar="RECIPE")],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    device: Annotated[str, typer.Option()] = "auto",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path, typer.Option()] = Path("runs/benchmarks/train_step.json"),
) -> None:
    """Measures and writes one JSON file."""
    recipe = Recipe.load(recipe_path, overrides or ())
    chosen, settings = pick_device(device), recipe.training
    folder = open_weightless(recipe.teacher.model)

    def load(source: ModelFolder, part: str, dtype: torch.dtype) -> Any:
        model = source.family.without_weights(source.base, part, dtype).to_empty(device=chosen)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.normal_(std=0.02)
        return model

    torch.manual_seed(0)
    expected = plan(recipe, prompt_tokens=prompt_tokens)
    roles = build_roles(recipe, folder, device=chosen, load=load)
    objectives = Objectives.build(recipe, roles, recipe_schedule(recipe, folder))
    batch = random_batch(
        recipe, folder, rows=expected.micro_batch, prompt_tokens=prompt_tokens, device=chosen
    )
    rate = matrix_rate(chosen, repeats)
    cases = {
        "student": (objectives.student, roles.student_parameters()),
        "critic": (
            objectives.critic,
            [*roles.fake_parameters(), *roles.critic.heads.parameters()],
        ),
    }
    tokens = batch.noise.shape[2] * batch.noise.shape[3] // 4 + batch.prompts.embeds.shape[1]
    turns: dict[str, Any] = {}
    for name, (compute, parameters) in cases.items():
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        if chosen.type == "cuda":
            torch.cuda.reset_peak_memory_stats(chosen)

        def run(
            compute: Callable[[Batch, Draws], Turn] = compute,
            parameters: list[nn.Parameter] = parameters,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            one_turn(compute, batch, parameters, optimizer, settings.autocast)

        seconds = median_seconds(run, repeats, chosen)
        flops = expected.flops[name] * expected.micro_batch / settings.batch_size
        turns[name] = {
            "seconds": seconds,
            "samples": len(batch.noise),
            "tokens_per_second": len(batch.noise) * tokens / seconds,
            "operations": flops,
            "share_of_matrix_rate": flops / seconds / rate,
            "peak_memory_bytes": torch.cuda.max_memory_allocated(chosen)
            if chosen.type == "cuda"
            else None,
            "planned_bytes": sum(r.total for r in expected.roles) + expected.activations[name],
        }
        print(f"{name}: {seconds:.3f} s, {turns[name]['share_of_matrix_rate']:.0%} of {rate:.3g}")
    results = {
        "command": shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "commit": git_commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu",
        "date": date.today().isoformat(),
        "matrix_operations_per_second": rate,
        "turns": turns,
        "forward_and_backward_seconds": forwards(roles, batch, repeats, settings.autocast),
        "shared_forward_seconds": shared_forwards(roles, batch, repeats, settings.autocast),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))
    print(out)


if __name__ == "__main__":
    typer.run(main)
