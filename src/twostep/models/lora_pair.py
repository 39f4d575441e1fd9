"""A student as two LoRA files on its teacher: one set of weights serves both steps."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twostep.errors import ModelError
from twostep.families.zimage import Prediction, PromptBatch, ZImageVelocity
from twostep.method.rollout import TwoStep
from twostep.models.folder import (
    load_velocity,
    resolve,
)
from twostep.runtime.files import write_atomically

INDEX = "twostep.json"
STEPS = ("first", "second")


class AdapterSwitch:
    """The LoRA layers of a transformer, run with one adapter at a time.

    Args:
        model: whose transformer has its adapters already; starts with none active.
    """

    def __init__(self, model: ZImageVelocity) -> None:
        from peft.tuners.lora import LoraLayer

        self.model, self.active = model, ""
        self.layers: dict[str, Any] = {
            key: layer
            for key, layer in model.transformer.named_modules()
            if isinstance(layer, LoraLayer)
        }
        self._activate("")

    def _activate(self, name: str) -> None:
        for layer in self.layers.values():
            layer._disable_adapters = not name
            layer._active_adapter = [name] if name else []
        self.active = name

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Inside, the backbone runs with adapter `name`; with none if it is empty."""
        before = self.active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)


class AdapterField(nn.Module):
    """A velocity model that runs with one of its adapters; another may run with another."""

    def __init__(self, switch: AdapterSwitch, name: str) -> None:
        super().__init__()
        self.switch, self.name, self.model = switch, name, switch.model

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return self.model.channels

    def forward(
        self, latents: Tensor, sigma: Tensor, prompts: PromptBatch, taps: tuple[int, ...] = ()
    ) -> Prediction:
        """As `ZImageVelocity.forward`."""
        with self.switch.role(self.name):
            prediction: Prediction = self.model(latents, sigma, prompts, taps)
            return prediction


@dataclass(frozen=True)
class LoraPair:
    """What a folder of `first.safetensors` and `second.safetensors` says of itself.

    Attributes:
        teacher: the model that the files belong to: a folder, `zoo:NAME` or a hub id.
    """

    teacher: str
    schedule: TwoStep

    @staticmethod
    def read(folder: Path) -> LoraPair | None:
        """None if the folder is no such pair.

        Raises:
            ModelError: if its index cannot be used, or a file is missing.
        """
        path = folder / INDEX
        if not path.is_file():
            return None
        missing = [f"{s}.safetensors" for s in STEPS if not (folder / f"{s}.safetensors").is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {', '.join(missing)}")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            schedule = TwoStep(float(index["step2_sigma"]), index["transition"])
            return LoraPair(str(index["teacher"]), schedule)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{path}: expected teacher, step2_sigma and transition, got {error!r}"
            ) from error

    def write(self, folder: Path) -> None:
        """Writes the index."""
        index = {
            "teacher": self.teacher,
            "step2_sigma": self.schedule.step2_sigma,
            "transition": self.schedule.transition,
        }
        text = json.dumps(index, indent=2) + "\n"
        write_atomically(folder / INDEX, lambda p: p.write_text(text, encoding="utf-8"))

    def load(self, folder: Path, dtype: torch.dtype) -> tuple[AdapterField, AdapterField]:
        """Both steps, on one copy of the teacher's weights."""
        velocity = load_velocity(resolve(self.teacher), dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # several adapters are meant
            for step in STEPS:
                velocity.transformer.load_lora_adapter(
                    str(folder / f"{step}.safetensors"), prefix="transformer", adapter_name=step
                )
        switch = AdapterSwitch(velocity.eval())
        return AdapterField(switch, "first"), AdapterField(switch, "second")
