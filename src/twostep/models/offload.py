"""Weights that wait elsewhere until their layer runs, and how weights come to a device at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from twostep.models.fp8 import pack_fp8
from twostep.models.int8 import pack_int8
from twostep.runtime.devices import Placement


def place(transformers: Iterable[nn.Module], placement: Placement) -> None:
    """Brings transformers to their device in the way that `placement.memory` names."""
    for transformer in transformers:
        if placement.memory == "offload":
            offload(transformer, placement.device)
            continue
        if placement.memory == "int8":
            pack_int8(transformer)
        if placement.memory == "fp8":
            pack_fp8(transformer, placement.dtype)
        transformer.to(placement.device)


def offload(transformer: nn.Module, device: torch.device) -> None:
    """Weights wait in CPU memory and come to `device` layer by layer, the next ones ahead of time.

    On a CPU they wait on disk instead, in a temporary folder.
    """
    from diffusers.hooks import apply_group_offloading

    options: dict[str, Any] = {}
    if device.type == "cuda":
        options = {"use_stream": True, "non_blocking": True, "low_cpu_mem_usage": True}
    else:
        folder = tempfile.TemporaryDirectory(prefix="twostep-weights-")
        options = {"offload_to_disk_path": folder.name}
        # The folder lives as long as the weights that wait in it.
        transformer._offloaded_to = folder  # type: ignore[assignment]
    apply_group_offloading(
        transformer,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="leaf_level",
        **options,
    )
