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
from twostep.families.loading import complete
from twostep.models.foreign import check_finite, named
from twostep.models.prompt_store import PromptStore
from twostep.runtime.checksums import folder_fingerprint
from twostep.runtime.limits import within
from twostep.runtime.notices import notice

# What ZImagePipeline encodes at most.
MAX_TOKENS = 512
# A template is a program in the tokenizer's folder; an honest one takes a millisecond a prompt.
_TEMPLATE_SECONDS = 30.0


class PromptEncoder:
    """Prompts to embeddings, as `ZImagePipeline.encode_prompt` makes them.

    Padding is trimmed before the encoder runs; the encoder is causal and padding is on the right,
    so that real tokens are the same. The last `cache_size` prompts are remembered.

    Args:
        text_encoder: the model, or what loads it, when the first prompt comes that is not known.
        store: keeps embeddings on disk, too.
        max_tokens: what is longer is cut.

    Attributes:
        on_cut: told once of each prompt that was cut, with the tokens that it has.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        *,
        cache_size: int = 4096,
        store: PromptStore | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self.tokenizer, self.cache_size, self.store = tokenizer, cache_size, store
        self.max_tokens = max_tokens
        self.on_cut: Callable[[str, int], None] = self._say_cut
        is_model = isinstance(text_encoder, nn.Module)
        self._model = text_encoder if is_model else None
        self._load: Callable[[], Any] | None = None if is_model else text_encoder
        self._device: torch.device | str | None = None
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._told: set[str] = set()

    @staticmethod
    def load(
        folder: Path,
        dtype: torch.dtype = torch.float32,
        cache_size: int = 4096,
        prompt_cache: Path | None = None,
        *,
        max_tokens: int = MAX_TOKENS,
    ) -> PromptEncoder:
        """A model folder's; its weights are read when they are needed.

        Args:
            prompt_cache: a folder in which embeddings outlive the process.
        """

        def load() -> Any:
            with named(folder / "text_encoder"):
                found = AutoModel.from_pretrained(
                    folder / "text_encoder",
                    dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
                model = complete(found, folder / "text_encoder").eval()
                check_finite(model, folder / "text_encoder")
                return model

        store = None
        if prompt_cache is not None:
            parts = (folder_fingerprint(folder / p) for p in ("text_encoder", "tokenizer"))
            cut = [] if max_tokens == MAX_TOKENS else [str(max_tokens)]
            store = PromptStore(prompt_cache, "-".join([*parts, str(dtype), *cut]))
        with named(folder / "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False
            )
        return PromptEncoder(
            tokenizer, load, cache_size=cache_size, store=store, max_tokens=max_tokens
        )

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
    def encode(self, prompts: Sequence[str], batch_size: int = 64) -> list[Tensor]:
        """One (tokens, D) tensor per prompt, as the encoder gives it; `prompts` is not changed."""
        wanted = [p for p in dict.fromkeys(prompts) if p not in self._cache]
        fresh: dict[str, Tensor] = {}
        if self.store is not None:
            fresh = self.store.read(wanted)
            wanted = [p for p in wanted if p not in fresh]
        for start in range(0, len(wanted), batch_size):
            part = wanted[start : start + batch_size]
            encoded = dict(zip(part, self._encode(part), strict=True))
            if self.store is not None:
                self.store.write(encoded)
            fresh.update(encoded)
        embeds = [fresh[p] if p in fresh else self._cache[p] for p in prompts]
        self._cache.update(fresh)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return embeds

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a prompt's embedding; needs no text encoder."""
        texts = self._templated([prompt])
        batch = self.tokenizer(texts, max_length=self.max_tokens, truncation=True)
        return len(batch.input_ids[0])

    def _note_cut(
        self, prompts: Sequence[str], texts: Sequence[str], lengths: Sequence[int]
    ) -> None:
        """Tells of those prompts whose texts have more tokens than the `lengths` that are kept."""
        for prompt, text, length in zip(prompts, texts, lengths, strict=True):
            if length >= self.max_tokens and prompt not in self._told:
                whole = len(self.tokenizer([text]).input_ids[0])
                if whole > self.max_tokens:
                    if len(self._told) >= self.cache_size:  # a server lives long
                        self._told.clear()
                    self._told.add(prompt)
                    self.on_cut(prompt, whole)

    def _say_cut(self, prompt: str, tokens: int) -> None:
        notice(
            f"a prompt of {tokens} tokens is cut at {self.max_tokens}, which the model has "
            f"positions for: {prompt[:60]!r}..."
        )

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

    def _encode(self, prompts: list[str]) -> list[Tensor]:
        texts = self._templated(prompts)
        try:
            batch = self.tokenizer(
                texts,
                padding=True,
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            said = " ".join(str(error).split())[:300]
            raise ModelError(f"the tokenizer cannot be used: {said}") from error
        vocabulary = self.text_encoder.get_input_embeddings().num_embeddings
        if int(batch.input_ids.max()) >= vocabulary:
            raise ModelError(
                f"the tokenizer knows more tokens than the text encoder, which has {vocabulary}"
            )
        batch = batch.to(self.text_encoder.device)
        hidden = self.text_encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states[-2]
        lengths = batch.attention_mask.sum(1).tolist()
        self._note_cut(prompts, texts, lengths)
        return [h[:n] for h, n in zip(hidden, lengths, strict=True)]
