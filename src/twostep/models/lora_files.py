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
        read_changes(file, family, base)


@torch.no_grad()
def add_loras(model: nn.Module, files: Sequence[LoraFile], family: Family, base: Path) -> None:
    """Adds each file's `scale * B A` to the weights of `model`, whole or sharded; in place.

    Sums are in fp32, rounded once for all files.

    Args:
        base: the model's diffusers folder.

    Raises:
        ModelError: as `check_loras`.
    """
    found: dict[str, list[Change]] = {}
    for file in files:
        for name, change in read_changes(file, family, base).items():
            found.setdefault(name, []).append(change)
    for name, changes in found.items():
        weight: Any = model.get_submodule(name).weight
        whole = torch.zeros(weight.shape)
        for change in changes:
            whole.addmm_(change.up, change.down, alpha=change.scale)
        target = weight
        if isinstance(weight, DTensor):
            target, whole = weight.to_local(), own_part(whole, weight)
        target.copy_(target.float() + whole.to(target.device))


@dataclass(frozen=True)
class Change:
    """What a LoRA adds to a linear layer's weight: `scale * up @ down`.

    Attributes:
        up, down: B (out, rank) and A (rank, in), fp32 on the CPU.
        scale: of the file, times alpha / rank.
    """

    up: Tensor
    down: Tensor
    scale: float


def read_changes(file: LoraFile, family: Family, base: Path) -> dict[str, Change]:
    """What a file adds to the model in `base`, by module name.

    Raises:
        ModelError: as `check_loras`.
    """
    skeleton = family.without_weights(base, "transformer", torch.float32)
    with _named(file, base):
        weights, metadata = read_lora(file.path)
        weights = family.lora_weights(weights)
        found = lora_pairs(weights, skeleton)
        skeleton.load_lora_adapter(weights, metadata=metadata, low_cpu_mem_usage=True)
        layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, LoraLayer)}
        return {
            name: Change(
                up.float(),
                down.float(),
                file.scale * layers[name].scaling[layers[name].active_adapters[0]],
            )
            for name, (up, down) in found.items()
        }


def load_adapter(model: Any, file: LoraFile, family: Family, base: Path, adapter_name: str) -> None:
    """Gives `model` a file's LoRA as an adapter, in any layout that `read_changes` reads.

    Raises:
        ModelError: as `check_loras`; no matrix is left out.
    """
    with _named(file, base):
        weights, metadata = read_lora(file.path)
        weights = family.lora_weights(weights)
        lora_pairs(weights, model)
        model.load_lora_adapter(weights, metadata=metadata, adapter_name=adapter_name)


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


def joined(
    parts: Sequence[Mapping[str, Change]], *, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The sum of several LoRAs as one, exactly: their ranks beside each other.

    Scales go into the matrices. Every layer gets the same rank, with zeros where it has fewer, so
    that alpha may equal the rank for all.

    Returns:
        Matrices as `save_lora` takes them.
    """
    layers = {name: [p[name] for p in parts if name in p] for part in parts for name in part}
    rank = max(sum(len(change.down) for change in changes) for changes in layers.values())
    found = {}
    for name, changes in layers.items():
        down = torch.cat([change.down for change in changes])
        up = torch.cat([change.scale * change.up for change in changes], dim=1)
        pad = rank - len(down)
        down, up = nn.functional.pad(down, (0, 0, 0, pad)), nn.functional.pad(up, (0, pad))
        found[f"{name}{_ENDS[0]}"] = down.to(dtype).contiguous()
        found[f"{name}{_ENDS[1]}"] = up.to(dtype).contiguous()
    return found


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


def read_lora(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
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


def lora_pairs(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """B and A by name of `model`'s module, of a LoRA in diffusers' layout.

    Raises:
        ValueError: unless every matrix has its place: half a LoRA would be a wrong one.
    """
    modules = dict(model.named_modules())
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        end = next((end for end in _ENDS if key.endswith(end)), None)
        name = key.removeprefix(_PREFIX).removesuffix(end or "")
        if end is None or not key.startswith(_PREFIX):
            raise ValueError(f"{key} is no matrix of a LoRA on a transformer")
        if not isinstance(modules.get(name), nn.Linear | LoraLayer):
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
