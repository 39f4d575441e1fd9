"""All roles on one frozen backbone: each trainable role is a PEFT LoRA on it.

PEFT's own `set_adapter` switches `requires_grad` as it goes, which a graph that is still to be
walked backwards does not survive. Here switching sets nothing but which adapter the layers read;
recomputation under activation checkpointing runs under the role of its forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from twostep.errors import RecipeError
from twostep.families.zimage import Prediction, PromptBatch, ZImageVelocity
from twostep.models.int8 import pack_int8
from twostep.models.lora_pair import AdapterSwitch


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
        model: ZImageVelocity,
        names: list[str],
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
                torch.manual_seed(seed + index)
                try:
                    inject_adapter_in_model(config, model.transformer, name)
                except ValueError as error:
                    raise RecipeError(
                        f"student.target_modules: no linear layer matches {target_modules!r}"
                    ) from error
        if int8:
            pack_int8(model.transformer)
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

    def _parts(self, name: str) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        for key, layer in self.layers.items():
            parts[f"{key}.lora_A"] = layer.lora_A[name]
            parts[f"{key}.lora_B"] = layer.lora_B[name]
        return parts

    def checkpoint_activations(self, share: float = 1.0) -> None:
        """Recomputes a share of the blocks in the backward pass, each under its own role."""

        def run(layer: nn.Module, *inputs: Any) -> Any:
            name = self.active

            def under_its_role(*again: Any) -> Any:
                with self.role(name):
                    return layer(*again)

            return checkpoint(under_its_role, *inputs, use_reentrant=False)

        self.model.enable_gradient_checkpointing(share, run)

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


class AdapterRole:
    """A role on a shared backbone.

    Args:
        name: the adapter; empty for the frozen backbone alone.
    """

    def __init__(self, backbone: SharedBackbone, name: str = "") -> None:
        self.backbone, self.name, self.model = backbone, name, backbone.model

    def __call__(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        with self.backbone.role(self.name):
            prediction: Prediction = self.model(latents, sigma, prompts, taps)
            return prediction

    def parameters(self) -> list[nn.Parameter]:
        return self.backbone.parameters(self.name) if self.name else []

    def trained_module(self) -> nn.Module:
        return self.backbone.module(self.name)

    def transformer(self) -> nn.Module:
        return self.backbone.merged(self.name)
