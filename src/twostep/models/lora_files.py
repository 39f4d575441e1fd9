"""LoRA files that are added to a model's weights: styles and characters, in anyone's layout.

What a file means (layout of its keys, alpha, rank) is diffusers' and peft's to say: they load it
onto the network's skeleton, which has no weights, and its layers tell what to add.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from twostep.errors import ModelError
from twostep.families.family import Family
from twostep.models.foreign import check_header
from twostep.runtime.distributed import own_part

# PEFT's own prefix, in files that its trainers write.
_PEFT = "base_model.model."
_PREFIX = "transformer."
_ENDS = (".lora_A.weight", ".lora_B.weight")
# Where diffusers keeps a LoRA's rank and alpha, in the header of its file.
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that is there.

    Attributes:
        scale: multiplies it.
        sha256: of the file.
        option: what named it, as the user typed it.
    """

    path: Path
    scale: float
    sha256: str
    option: str

    @staticmethod
    def open(
        path: Path, scale: float = 1.0, *, option: str = "--lora", sha256: str | None = None
    ) -> LoraFile:
        """Reads no more than its checksum.

        Args:
            sha256: what it must be, if it is known.

        Raises:
            ModelError: naming `option`, for a file that is missing or another one.
        """
        if not path.is_file():
            raise ModelError(f"{option}: no file at {path}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 not in (None, found):
            raise ModelError(f"{option}: {path} is another file, its sha256 is {found}")
        return LoraFile(path, float(scale), found, option)


def check_loras(files: Sequence[LoraFile], family: Family, base: Path) -> None:
    """Raises ModelError for a file that does not fit the model in `base`, before its weights."""
    for file in files:
        _read_changes(file, family, base)


@torch.no_grad()
def add_loras(model: nn.Module, files: Sequence[LoraFile], family: Family, base: Path) -> None:
    """Adds each file's `scale * B A` to the weights of `model`, whole or sharded; in place.

    Sums are in fp32, rounded once for each file.

    Args:
        base: the model's diffusers folder.

    Raises:
        ModelError: as `check_loras`.
    """
    for file in files:
        for name, (up, down, scale) in _read_changes(file, family, base).items():
            weight: Any = model.get_submodule(name).weight
            change = file.scale * scale * (up @ down)
            target = weight
            if isinstance(weight, DTensor):
                target, change = weight.to_local(), own_part(change, weight)
            target.copy_(target.float() + change.to(target.device))


def _read_changes(
    file: LoraFile, family: Family, base: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By module name: B (out, rank) and A (rank, in), in fp32 on the CPU, and alpha's factor."""
    skeleton = family.without_weights(base, "transformer", torch.float32)
    with _named(file, base):
        weights, metadata = _read(file.path)
        weights = family.lora_weights(weights)
        found = _pairs(weights, skeleton)
        skeleton.load_lora_adapter(weights, metadata=metadata, low_cpu_mem_usage=True)
        layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, LoraLayer)}
        return {
            name: (up.float(), down.float(), layers[name].scaling[layers[name].active_adapters[0]])
            for name, (up, down) in found.items()
        }


def save_lora(weights: Mapping[str, Tensor], rank: int, folder: Path, name: str) -> Path:
    """Writes a file that stock `load_lora_weights` reads, with its configuration as metadata.

    Args:
        weights: `MODULE.lora_A.weight` (rank, in) and `MODULE.lora_B.weight` (out, rank); alpha
            equals the rank.
    """
    modules = sorted(k.removesuffix(_ENDS[0]) for k in weights if k.endswith(_ENDS[0]))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules).to_dict()
    ZImagePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=dict(weights),
        weight_name=name,
        transformer_lora_adapter_metadata=_plain(config),
    )
    return folder / name


def rank_of(weights: Mapping[str, Tensor]) -> int:
    """Of a LoRA file's matrices, which all have one rank."""
    return next(value.shape[0] for key, value in weights.items() if key.endswith(_ENDS[0]))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a PEFT configuration."""
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if isinstance(value, str | int | float | bool | list | set) or value is None
    }


@contextmanager
def _named(file: LoraFile, base: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, RuntimeError, SafetensorError, OSError) as error:
        said = error.args[0] if isinstance(error, KeyError) else error
        raise ModelError(
            f"{file.option}: {file.path} is no LoRA for the transformer of {base}: {said}"
        ) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """A file's tensors, PEFT's prefix replaced by diffusers', and its LoRA's configuration."""
    check_header(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(_METADATA, "null"))
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not any(key.startswith(_PEFT) for key in weights):
        return weights, metadata
    if (path.parent / "adapter_config.json").is_file():
        config = LoraConfig.from_pretrained(str(path.parent)).to_dict()
        metadata = {_PREFIX + key: value for key, value in config.items()}
    return {_PREFIX + key.removeprefix(_PEFT): w for key, w in weights.items()}, metadata


def _pairs(weights: dict[str, Tensor], skeleton: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by module name.

    Raises:
        ValueError: unless every matrix has its place: half a LoRA would be a wrong one.
    """
    modules = dict(skeleton.named_modules())
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        name = key.removeprefix(_PREFIX).removesuffix(end or "")
        if end is None or not key.startswith(_PREFIX):
            raise ValueError(f"{key} is no matrix of a LoRA on a transformer")
        if not isinstance(modules.get(name), nn.Linear):
            raise ValueError(f"it has no linear layer {name}")
        sides.setdefault(name, {})[end] = value
    if not sides:
        raise ValueError("the file is empty")
    pairs = {}
    for name, found in sides.items():
        down, up = (found.get(end) for end in _ENDS)
        layer: Any = modules[name]
        wanted = (layer.out_features, layer.in_features)
        if down is None or up is None:
            raise ValueError(f"{name} has one of its two matrices alone")
        if down.ndim != 2 or up.ndim != 2 or (up.shape[0], down.shape[1]) != wanted:
            raise ValueError(
                f"{name} is {wanted[0]} x {wanted[1]}, the file's matrices are "
                f"{'x'.join(map(str, up.shape))} and {'x'.join(map(str, down.shape))}"
            )
        pairs[name] = up, down
    return pairs
