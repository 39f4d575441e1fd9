"""Prompt embeddings on disk: a prompt that was encoded once needs no text encoder again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from twostep.runtime.checked_tensors import DamagedError, load_checked, save_checked
from twostep.runtime.files import make_folder, write_atomically
from twostep.runtime.notices import notice


@dataclass(frozen=True)
class PromptStore:
    """A folder with a file for each prompt.

    Attributes:
        encoder: tells text encoders apart; embeddings of one are not those of another.
    """

    folder: Path
    encoder: str

    def read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Those of `prompts` that are there, (tokens, D) each; a damaged one is named."""
        found: dict[str, Tensor] = {}
        for prompt in prompts:
            path = self._path(prompt)
            if path.is_file():
                try:
                    tensors, _ = load_checked(path)
                except (DamagedError, OSError) as error:
                    notice(f"{error}; the prompt is encoded anew")
                    continue
                embeds = tensors.get("embeds")
                if embeds is not None and embeds.ndim == 2 and bool(embeds.isfinite().all()):
                    found[prompt] = embeds
        return found

    def write(self, embeds: Mapping[str, Tensor]) -> None:
        """Adds prompts."""
        make_folder(self.folder)
        for prompt, tensor in embeds.items():
            whole = {"embeds": tensor.cpu().contiguous()}
            write_atomically(self._path(prompt), partial(save_checked, whole))

    def _path(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self.encoder}\n{prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"
