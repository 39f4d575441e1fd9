"""Prompts to embeddings, remembered in memory and on disk."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from twostep.errors import ModelError
from twostep.models.foreign import named
from twostep.models.prompt_store import PromptStore
from twostep.runtime.files import folder_fingerprint
from twostep.runtime.limits import within

# A template is a program in the tokenizer's folder; an honest one takes a millisecond a prompt.
_TEMPLATE_SECONDS = 30.0


class PromptEncoder:
    """Prompts to embeddings, as `ZImagePipeline.encode_prompt` makes them.

    Padding is trimmed before the encoder runs; the encoder is causal and padding is on the right,
    so that real tokens are the same. The last `cache_size` prompts are remembered.

    Args:
        text_encoder: the model, or what loads it, when the first prompt comes that is not known.
        store: keeps embeddings on disk, too.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        *,
        cache_size: int = 4096,
        store: PromptStore | None = None,
    ) -> None:
        self.tokenizer, self.cache_size, self.store = tokenizer, cache_size, store
        is_model = isinstance(text_encoder, nn.Module)
        self._model = text_encoder if is_model else None
        self._load: Callable[[], Any] | None = None if is_model else text_encoder
        self._device: torch.device | str | None = None
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @staticmethod
    def load(
        folder: Path,
        dtype: torch.dtype = torch.float32,
        cache_size: int = 4096,
        prompt_cache: Path | None = None,
    ) -> PromptEncoder:
        """A model folder's; its weights are read when they are needed.

        Args:
            prompt_cache: a folder in which embeddings outlive the process.
        """

        def load() -> Any:
            with named(folder / "text_encoder"):
                return AutoModel.from_pretrained(
                    folder / "text_encoder",
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                ).eval()

        store = None
        if prompt_cache is not None:
            parts = (folder_fingerprint(folder / p) for p in ("text_encoder", "tokenizer"))
            store = PromptStore(prompt_cache, "-".join([*parts, str(dtype)]))
        with named(folder / "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
        return PromptEncoder(tokenizer, load, cache_size=cache_size, store=store)

    @property
    def text_encoder(self) -> Any:
        if self._model is None:
            assert self._load is not None
            self._model = self._load()
            if self._device is not None:
                self._model.to(self._device)
        return self._model

    def to(self, device: torch.device | str) -> PromptEncoder:
        self._device = device
        if self._model is not None:
            self._model.to(device)
        self.forget()
        return self

    def release(self) -> None:
        """Gives the text encoder's memory back; it is loaded anew for the next unknown prompt."""
        if self._load is not None:
            self._model = None

    def forget(self) -> None:
        """Empties the memory of encoded prompts."""
        self._cache.clear()

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], batch_size: int = 64, max_length: int = 512
    ) -> list[Tensor]:
        """One (tokens, D) tensor per prompt, as the encoder gives it; `prompts` is not changed."""
        wanted = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        fresh: dict[str, Tensor] = {}
        if self.store is not None:
            fresh = self.store.read(wanted)
            wanted = [p for p in wanted if p not in fresh]
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            encoded = dict(zip(part, self._encode(part, max_length), strict=True))
            if self.store is not None:
                self.store.write(encoded)
            fresh.update(encoded)
        embeds = [fresh[p] if p in fresh else self._cache[p] for p in prompts]
        self._cache.update(fresh)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return embeds

    def count_tokens(self, prompt: str, max_length: int = 512) -> int:
        """Tokens of a prompt's embedding; needs no text encoder."""
        texts = self._templated([prompt])
        return len(self.tokenizer(texts, max_length=max_length, truncation=True).input_ids[0])

    def _templated(self, prompts: Sequence[str]) -> list[str]:
        def templated() -> list[str]:
            return [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                    enable_thinking=True,
                )
                for prompt in prompts
            ]

        try:
            return within(_TEMPLATE_SECONDS, templated)
        except TimeoutError as error:
            raise ModelError(
                f"the tokenizer's chat template is not done with {len(prompts)} prompts "
                f"after {_TEMPLATE_SECONDS:g} seconds"
            ) from error
        except TemplateError as error:
            raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from error

    def _encode(self, prompts: list[str], max_length: int) -> list[Tensor]:
        texts = self._templated(prompts)
        batch = self.tokenizer(
            texts, padding=True, max_length=max_length, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        hidden = self.text_encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states[-2]
        lengths = batch.attention_mask.sum(1).tolist()
        return [h[:n] for h, n in zip(hidden, lengths, strict=True)]
