"""Exports a student's steps as `torch.export` programs, for one size, batch and caption length.

ONNX is left out: its exporter (torch 2.13) has no complex numbers, which Z-Image's rotary factors
are made of (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from twostep.errors import ModelError
from twostep.families.family import SEQUENCE_MULTIPLE, PromptBatch
from twostep.inference.sampler import Sampler
from twostep.method.schedule import Schedule
from twostep.models.folder import ModelFolder
from twostep.models.student import STEPS
from twostep.models.velocity import Velocity, bind
from twostep.runtime.files import write_json


class Step(nn.Module):
    """A velocity whose prompts are plain tensors, all in one bucket."""

    def __init__(self, velocity: Velocity) -> None:
        super().__init__()
        self.network = velocity

    def forward(self, latents: Tensor, sigma: Tensor, embeds: Tensor, lengths: Tensor) -> Tensor:
        return bind(self.network, PromptBatch(embeds, lengths, True))(latents, sigma)


@torch.no_grad()
def export_programs(
    student: ModelFolder, out: Path, *, size: tuple[int, int], batch_size: int, caption_tokens: int
) -> list[str]:
    """Writes `first.pt2`, `second.pt2` and `program.json`, which says what goes in and out.

    Args:
        size: (height, width) in pixels.
        caption_tokens: what captions are padded to.

    Raises:
        InputError, ModelError: for a size or a caption length that the model does not take.
    """
    if caption_tokens < SEQUENCE_MULTIPLE or caption_tokens % SEQUENCE_MULTIPLE:
        raise ModelError(
            f"caption_tokens: must be a positive multiple of {SEQUENCE_MULTIPLE}, "
            f"got {caption_tokens}"
        )
    sampler = Sampler.load(student)
    shape = (batch_size, *student.latent_shape(size))
    width = int(sampler.encoder.text_encoder.config.hidden_size)
    example = (
        torch.zeros(shape),
        torch.ones(batch_size),
        torch.zeros(batch_size, caption_tokens, width),
        torch.full((batch_size,), caption_tokens),
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, velocity in zip(STEPS, sampler.velocities, strict=True):
        program = torch.export.export(Step(velocity).eval(), example)
        _forget_source(program)
        torch.export.save(program, out / f"{name}.pt2")  # the archive's root is called so, too
    write_json(out / "program.json", _description(sampler.schedule, example))
    return [f"inputs {', '.join(str(tuple(t.shape)) for t in example)}, for nothing else"]


def _forget_source(program: torch.export.ExportedProgram) -> None:
    """Drops the places in this machine's source that each operation came from."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)


def _description(schedule: Schedule, example: tuple[Tensor, ...]) -> dict[str, object]:
    names = ("latents", "sigma", "prompt_embeds", "lengths")
    return {
        "inputs": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in zip(names, example, strict=True)
        },
        "output": "velocity, shaped as latents; clean = latents - sigma * velocity",
        "prompt_embeds": "zeros after each caption's end, which `lengths` gives",
        "sigma": {"first": 1.0, "second": schedule.step2_sigma},
        "transition": schedule.transition,
    }
