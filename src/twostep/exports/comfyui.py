"""Exports a student to ComfyUI: single-file transformers in its key layout, LoRAs, and a workflow.

ComfyUI fuses query, key and value, and names a few modules otherwise; diffusers reads the same
layout back (`ZImageTransformer2DModel.from_single_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.errors import ModelError
from twostep.exports.comfyui_workflow import laid_out, lora_workflow, workflow
from twostep.exports.lora import step_weights
from twostep.exports.packed import Packing, pack
from twostep.models.folder import ModelFolder
from twostep.models.lora_files import rank_of, save_lora
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
_KNOWN: dict[str, Any] = {
    "dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "rope_theta": 256.0,
    "t_scale": 1000.0, "n_refiner_layers": 2, "in_channels": 16, "norm_eps": 1e-5, "qk_norm": True,
}  # fmt: skip
# Z-Image Turbo in bf16, as ComfyUI's page has it (huggingface.co/Comfy-Org/z_image_turbo).
_PUBLIC_BASE = "z_image_turbo_bf16.safetensors"
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


def not_recognised(architecture: Mapping[str, Any]) -> list[str]:
    """By what of a transformer's configuration ComfyUI does not know it for a Z-Image.

    It reads the width of the caption's projection and takes the rest for granted.
    """
    return [
        f"{key} is {architecture.get(key)}, expected {value}"
        for key, value in _KNOWN.items()
        if architecture.get(key, value) != value
    ]


def export_comfyui(
    student: ModelFolder,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    packing: Packing | None = None,
    merged: bool = False,
) -> list[str]:
    """Writes weights, `workflow.json` for the page and `workflow-api.json` for the API to `out`.

    A student of two LoRA files: `first.safetensors` and `second.safetensors`, and the transformer
    that they are on as `base.safetensors`, unless that is Z-Image Turbo, which ComfyUI's own page
    offers, and `packing` is None. Other students: two whole transformers of those names.

    Args:
        dtype: of the weights; None: as they are stored.
        packing: the blocks' matrices of whole transformers in 8 bits.
        merged: whole transformers of two LoRA files, too.

    Returns:
        What the user should know.

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
    strange = not_recognised(student.architecture)
    warnings = [f"ComfyUI will not recognise this model as Z-Image: {'; '.join(strange)}"]
    warnings = warnings if strange else []
    out.mkdir(parents=True, exist_ok=True)
    space = student.space
    side = min(1024, *(count * space.patch * space.scale for count in space.positions))
    files = [f"{step}.safetensors" for step in STEPS]
    if student.kind == "lora_pair" and not merged:
        base = _PUBLIC_BASE
        if packing is not None or not _is_public(student):
            base = "base.safetensors"
            plain = ModelFolder.open(student.base)
            transformer = plain.stored_transformer(PARTS[0], dtype)
            warnings += _write(transformer, plain, out / base, packing)
            del transformer
        for file, part in zip(files, PARTS, strict=True):
            weights = step_weights(student, part, dtype)
            save_lora(weights, rank_of(weights), out, file)
        nodes = lora_workflow(base, files[0], files[1], shift=schedule.shift, side=side)
        places = {"diffusion_models": [base], "loras": files}
    else:
        for file, part in zip(files, PARTS, strict=True):
            transformer = student.stored_transformer(part, dtype)
            warnings += _write(transformer, student, out / file, packing)
            del transformer
        nodes = workflow(files[0], files[1], shift=schedule.shift, side=side)
        places = {"diffusion_models": files}
    write_json(out / "workflow.json", laid_out(nodes))
    write_json(out / "workflow-api.json", nodes)
    warnings += [f"models/{folder}: {', '.join(names)}" for folder, names in places.items()]
    return warnings


def _is_public(student: ModelFolder) -> bool:
    """Whether its teacher is the model whose file ComfyUI's own page offers."""
    teacher = student.check_student("model").teacher or ""
    return Path(teacher).name == "Z-Image-Turbo"


def _write(transformer: Any, model: ModelFolder, path: Path, packing: Packing | None) -> list[str]:
    state = transformer.state_dict()
    weights, header = to_comfyui(state), {"format": "pt"}
    if packing is not None:
        weights, header["_quantization_metadata"] = pack(weights, packing)
    write_atomically(path, lambda p: save_file(weights, p, header))
    if allows_fp16(state, model.family.depth(model.architecture)):
        return []
    return [
        f"{path.name}: ComfyUI will not use fp16 for these weights; cards without bf16 run them in "
        "fp32"
    ]
