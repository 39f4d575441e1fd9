"""What two runs must have in common."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from twostep.distill.checkpoint import list_checkpoints
from twostep.distill.monitor import read_metrics
from twostep.distill.tensor_files import load_tensors
from twostep.recipe.schema import Recipe


def final_state(recipe: Recipe, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The last checkpoint's tensors, put together from however many files it has."""
    found = {key: torch.zeros_like(value) for key, value in like.items()}
    load_tensors(found, list_checkpoints(recipe.run_folder / "checkpoints")[-1])
    return found


def assert_same_run(one: Recipe, other: Recipe, tiny_folder: Path) -> None:
    """Equal losses, and weights that differ by far less than training moved them."""
    last = list_checkpoints(one.run_folder / "checkpoints")[-1]
    alone = load_file(last / "state.safetensors")
    together = final_state(other, alone)
    start = load_file(tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    compared = 0
    for key, value in alone.items():
        kind, role, *rest = key.split("/")
        if kind != "module":
            continue
        begun = start.get(rest[0].removeprefix("transformer."), torch.zeros_like(value))
        moved = (value - begun).norm()
        assert (value - together[key]).norm() <= 0.08 * moved + 1e-6, key
        compared += int(moved > 0 and role in ("first", "fake1"))
    assert compared > 10
    losses = [[r["loss"] for r in read_metrics(r.run_folder) if "loss" in r] for r in (one, other)]
    assert len(losses[0]) == len(losses[1]) > 0
    torch.testing.assert_close(*(torch.tensor(values) for values in losses), rtol=1e-3, atol=1e-5)
