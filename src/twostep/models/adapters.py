"""Several LoRA adapters on one network: the steps of a student, or every role of a training run.

PEFT's own `set_adapter` switches `requires_grad` as it goes, which a graph that is still to be
walked backwards does not survive. Here switching sets nothing but which adapter the layers read;
recomputation under activation checkpointing runs under the role of its forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep.errors import RecipeError
from twostep.families.family import Family, Prediction, PromptBatch
from twostep.models.int8 import pack_int8
from twostep.models.lora_files import LoraFile, load_adapter
from twostep.models.student import STEPS
from twostep.runtime.randomness import Stream, torch_seed

# The key under which a LoRA layer finds the adapter it is to read.
_NOW = "now"


class AdapterSwitch:
    """The LoRA layers of a network, run with one adapter at a time.

    Args:
        model: has its adapters already; starts with none active.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: dict[str, Any] = {
            key: layer for key, layer in model.named_modules() if isinstance(layer, LoraLayer)
        }
        self.active: str | None = None  # nothing yet
        self.activate("")

    def activate(self, name: str) -> None:
        """Lets the layers read adapter `name` from now on; none if it is empty.

        They read it under one key for all of them, so that compiled code does not depend on which
        it is.
        """
        if name == self.active:
            return
        for layer in self.layers.values():
            layer._disable_adapters = not name
            layer._active_adapter = [_NOW]
            if name:
                for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout):
                    parts._modules[_NOW] = parts._modules[name]
                layer.scaling[_NOW] = layer.scaling[name]
        self.active = name

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Inside, the backbone runs with adapter `name`; with none if it is empty."""
        before = self.active
        self.activate(name)
        try:
            yield
        finally:
            self.activate(before or "")


class AdapterVelocity(nn.Module):
    """A network that runs with one of its adapters; another may run with another.

    Args:
        name: the adapter; empty for the network as it is.
    """

    def __init__(self, switch: AdapterSwitch, name: str) -> None:
        super().__init__()
        self.switch, self.name, self.model = switch, name, switch.model

    def forward(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        """As `Velocity`."""
        with self.switch.role(self.name):
            prediction: Prediction = self.model(latents, sigma, prompts, taps)
            return prediction


def load_lora_pair(
    model: Any, folder: Path, family: Family, base: Path
) -> tuple[AdapterVelocity, AdapterVelocity]:
    """Both steps of a student of LoRA files, on the one copy of the teacher's weights, `model`.

    Args:
        base: the teacher's folder.

    Raises:
        ModelError: for a file that does not fit the teacher.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # several adapters are meant
        for step in STEPS:
            file = LoraFile.open(folder / f"{step}.safetensors", option="model")
            load_adapter(model, file, family, base, adapter_name=step)
    switch = AdapterSwitch(model.eval())
    return AdapterVelocity(switch, STEPS[0]), AdapterVelocity(switch, STEPS[1])


class SharedBackbone(AdapterSwitch):
    """A velocity model whose frozen weights serve every role.

    Args:
        model: gets the adapters; its own weights are frozen and keep their dtype.
        names: trainable roles.
        rank: of every adapter; alpha equals it, since several readers of LoRA files ignore alpha.
        target_modules: a regular expression that whole module names must match.
        seed: the adapters' first weights follow from it and from the role's place in `names`.
        original: loads the transformer as it was, for `merged`; None where nothing is merged.
        int8: packs the frozen weights of the blocks (`memory.py`), once the adapters are there.

    Raises:
        RecipeError: if no linear layer matches `target_modules`.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        *,
        rank: int,
        target_modules: str,
        seed: int,
        original: Callable[[], nn.Module] | None = None,
        int8: bool = False,
    ) -> None:
        model.requires_grad_(False)
        for index, name in enumerate(names):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=target_modules)
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # several adapters are meant
                torch.manual_seed(torch_seed(seed, Stream.ADAPTERS, index))
                try:
                    inject_adapter_in_model(config, model, name)
                except ValueError as error:
                    raise RecipeError(
                        f"student.target_modules: no linear layer matches {target_modules!r}"
                    ) from error
        if int8:
            pack_int8(model)
        super().__init__(model)
        self.rank, self.original = rank, original
        for name in names:
            for parameter in self.parameters(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's parameters, fp32, in the order of the layers."""
        return [p for part in self._parts(name).values() for p in part.parameters()]

    def module(self, name: str) -> nn.Module:
        """The adapter's parameters as a module of their own, for checkpoints."""
        parts = {key.replace(".", "/"): part for key, part in self._parts(name).items()}
        return nn.ModuleDict(parts)

    def lora(self, name: str) -> dict[str, Tensor]:
        """The adapter as a LoRA file holds it, fp32 on the CPU."""
        state = {k: part.get_parameter("weight") for k, part in self._parts(name).items()}
        return {f"{key}.weight": value.detach().cpu().clone() for key, value in state.items()}

    @torch.no_grad()
    def start(self, name: str, file: Path) -> None:
        """Gives an adapter the weights of a LoRA file, of its own rank or a lower one.

        What the file has no rank for stays as it begins, so that it adds nothing yet.

        Raises:
            RecipeError: for a file of a higher rank, or of other layers.
        """
        stored = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
        parts = {f"{key}.weight": part for key, part in self._parts(name).items()}
        if stored.keys() != parts.keys():
            other = sorted(stored.keys() ^ parts.keys())[0]
            raise RecipeError(
                f"student.init: {file} is of other layers than student.target_modules ({other})"
            )
        for key, value in stored.items():
            own: Any = parts[key].weight
            rank = value.shape[0] if "lora_A" in key else value.shape[1]
            if rank > self.rank:
                raise RecipeError(
                    f"student.init: {file} has rank {rank}, student.rank is {self.rank}"
                )
            if "lora_A" in key:
                own[:rank] = value.to(own)
            else:
                own.zero_()
                own[:, :rank] = value.to(own)

    def _parts(self, name: str) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        for key, layer in self.layers.items():
            parts[f"{key}.lora_A"] = layer.lora_A[name]
            parts[f"{key}.lora_B"] = layer.lora_B[name]
        return parts

    def recompute_layers(self, share: float = 1.0) -> None:
        """Recomputes a share of the blocks in the backward pass, each under its own role."""

        def run(layer: nn.Module, *inputs: Any) -> Any:
            name = self.active or ""

            def under_its_role(*again: Any) -> Any:
                # Nothing to put back: whoever calls a role says which, and the next block
                # that is recomputed is most likely this one's neighbour.
                self.activate(name)
                return layer(*again)

            return checkpoint(under_its_role, *inputs, use_reentrant=False)

        self.model.recompute_layers(share, run)

    @torch.no_grad()
    def merged(self, name: str) -> nn.Module:
        """The transformer with the adapter added to its weights, as diffusers has it.

        To the weights as they were loaded: packing costs the student nothing once it is trained.
        """
        assert self.original is not None
        transformer = self.original()
        for key, layer in self.layers.items() if name else ():
            weight: Any = transformer.get_submodule(key).weight
            weight += layer.get_delta_weight(name).to(weight)
        return transformer
