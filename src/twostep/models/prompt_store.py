"""Prompt embeddings on disk: a prompt that was encoded once needs no text encoder again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twostep.runtime.files import write_atomically


@dataclass(frozen=True)
class PromptStore:
    """A folder with a file for each prompt.

    Attributes:
        encoder: tells text encoders apart; embeddings of one are not those of another.
    """

    folder: Path
    encoder: str

    def read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Those of `prompts` that are there, (tokens, D) each; a torn file is not."""
        found: dict[str, Tensor] = {}
        for prompt in prompts:
            path = self._path(prompt)
            if path.is_file():
                try:
                    found[prompt] = load_file(path)["embeds"]
                except (SafetensorError, KeyError, OSError):
                    continue
        return found

    def write(self, embeds: Mapping[str, Tensor]) -> None:
        """Adds prompts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for prompt, tensor in embeds.items():
            whole = {"embeds": tensor.cpu().contiguous()}
            write_atomically(self._path(prompt), partial(save_file, whole))

    def _path(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self.encoder}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"
