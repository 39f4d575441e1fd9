"""Exports a student to ComfyUI: two single-file transformers in its key layout, and a workflow.

ComfyUI fuses query, key and value, and names a few modules otherwise; diffusers reads the same
layout back (`ZImageTransformer2DModel.from_single_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.errors import ModelError
from twostep.models.folder import ModelFolder
from twostep.models.student import PARTS, STEPS
from twostep.runtime.files import write_atomically, write_json

_RENAMED = (
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
)
# ComfyUI computes in fp16 only if the spread of this norm's weights is below the bound; above it
# fp16 gives black images (model_detection.py, as read on 2026-11-23).
_FP16_NORM, _FP16_BOUND = "layers.{}.ffn_norm1.weight", 0.42


def to_comfyui(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Z-Image transformer's diffusers state dict in ComfyUI's layout.

    Raises:
        ModelError: if a query has no key or value to be fused with.
    """
    result: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            parts = [name.replace(".to_q.", f".to_{p}.") for p in "qkv"]
            missing = [p for p in parts if p not in weights]
            if missing:
                raise ModelError(f"the transformer has {name} but not {', '.join(missing)}")
            fused = torch.cat([weights[p] for p in parts])
            result[name.replace(".to_q.", ".qkv.")] = fused
            continue
        for old, new in _RENAMED:
            name = name.replace(old, new)
        result[name] = weight.contiguous()
    return result


def allows_fp16(weights: Mapping[str, Tensor], layers: int) -> bool:
    """Whether ComfyUI would run these weights in fp16."""
    norm = weights[_FP16_NORM.format(layers - 2)].float()
    return norm.std(unbiased=False).item() < _FP16_BOUND


def workflow(first: str, second: str, shift: float, side: int = 1024) -> dict[str, Any]:
    """ComfyUI's API format: two loaders, two samplers of one step each, nothing in between.

    The second sampler starts where the first one stopped, noise left over included; with the
    `simple` scheduler and this shift the two steps are at sigma 1 and shift / (1 + shift).
    """

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    common = {
        "noise_seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple",
        "positive": ["6", 0], "negative": ["7", 0],
    }  # fmt: skip
    return {
        "1": node("UNETLoader", unet_name=first, weight_dtype="default"),
        "2": node("UNETLoader", unet_name=second, weight_dtype="default"),
        "3": node("ModelSamplingAuraFlow", model=["1", 0], shift=shift),
        "4": node("ModelSamplingAuraFlow", model=["2", 0], shift=shift),
        "5": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
        "6": node("CLIPTextEncode", clip=["5", 0], text="a red fox in the snow"),
        "7": node("ConditioningZeroOut", conditioning=["6", 0]),
        "8": node("EmptySD3LatentImage", width=side, height=side, batch_size=1),
        "9": node(
            "KSamplerAdvanced", model=["3", 0], latent_image=["8", 0], add_noise="enable",
            start_at_step=0, end_at_step=1, return_with_leftover_noise="enable", **common,
        ),
        "10": node(
            "KSamplerAdvanced", model=["4", 0], latent_image=["9", 0], add_noise="disable",
            start_at_step=1, end_at_step=2, return_with_leftover_noise="disable", **common,
        ),
        "11": node("VAELoader", vae_name="ae.safetensors"),
        "12": node("VAEDecode", samples=["10", 0], vae=["11", 0]),
        "13": node("SaveImage", images=["12", 0], filename_prefix="twostep"),
    }  # fmt: skip


def _save(weights: dict[str, Tensor], path: Path) -> None:
    save_file(weights, path, {"format": "pt"})


def export_comfyui(student: ModelFolder, out: Path) -> list[str]:
    """Writes `first.safetensors`, `second.safetensors` and `workflow.json` to `out`.

    Returns:
        Warnings.

    Raises:
        ModelError: for a schedule that ComfyUI's stock nodes do not run.
    """
    schedule = student.schedule()
    simple = schedule.sigmas(2)[1]
    if schedule.transition != "euler" or abs(schedule.step2_sigma - simple) > 1e-4:
        raise ModelError(
            f"ComfyUI's stock samplers run Euler steps at sigma 1 and {simple:.4g}; this student "
            f"has transition {schedule.transition} and step2_sigma {schedule.step2_sigma:.4g}"
        )
    layers = student.family.depth(student.architecture)
    out.mkdir(parents=True, exist_ok=True)
    warnings = []
    for name, part in zip(STEPS, PARTS, strict=True):
        state = student.stored_transformer(part).state_dict()
        converted = to_comfyui(state)
        path = out / f"{name}.safetensors"
        write_atomically(path, partial(_save, converted))
        if not allows_fp16(state, layers):
            warnings.append(
                f"{path.name}: ComfyUI will not use fp16 for these weights; cards without bf16 "
                "run them in fp32"
            )
    nodes = workflow("first.safetensors", "second.safetensors", schedule.shift)
    write_json(out / "workflow.json", nodes)
    return warnings
