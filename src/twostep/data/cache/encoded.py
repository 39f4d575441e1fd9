"""The embeddings of a cache's prompts before it is built, a file for each shard until it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from twostep.data.cache.spec import CacheSpec, Shard
from twostep.data.cache.store import CacheError
from twostep.runtime.checked_tensors import DamagedError, load_checked, save_checked
from twostep.runtime.devices import Placement
from twostep.runtime.files import write_atomically
from twostep.runtime.progress import progress_bar


@dataclass(frozen=True)
class EncodedPrompts:
    """On the CPU, in the encoder's dtype.

    Attributes:
        empty: the empty prompt's, (tokens, D).
    """

    spec: CacheSpec
    empty: Tensor

    @staticmethod
    def encode(
        spec: CacheSpec, shards: Sequence[Shard], placement: Placement, *, hidden: bool = False
    ) -> EncodedPrompts:
        """Encodes what no earlier run did, and lets the text encoder go.

        Args:
            hidden: show no progress.
        """
        encoder = spec.teacher.encoder(placement, cache_size=0)
        encoded = EncodedPrompts(spec, encoder.encode([""])[0].cpu().clone())
        count = sum(len(shard.prompts) for shard in shards)
        with progress_bar("prompts", count, hidden=hidden) as advance:
            for shard in shards:
                if not encoded._is_there(shard):
                    tensors = {
                        str(i): embeds.cpu().clone()
                        for i, embeds in enumerate(encoder.encode(shard.prompts))
                    }
                    for i, embeds in enumerate(tensors.values()):
                        if not bool(embeds.isfinite().all()):
                            raise CacheError(
                                "teacher.model: its text encoder gives values that are not finite "
                                f"for the prompt {shard.prompts[i][:60]!r}"
                            )
                    metadata = {"fingerprint": spec.fingerprint}
                    write = partial(save_checked, tensors, metadata=metadata)
                    write_atomically(encoded._path(shard), write)
                advance(len(shard.prompts))
        return encoded

    def read(self, shard: Shard) -> list[Tensor]:
        """One (tokens, D) for each of its prompts."""
        try:
            tensors, _ = load_checked(self._path(shard))
            return [tensors[str(i)] for i in range(len(shard.prompts))]
        except (DamagedError, OSError, KeyError) as error:
            raise CacheError(
                f"{self._path(shard)} was damaged or removed since it was written. Run it again"
            ) from error

    def remove(self, shard: Shard) -> None:
        """Once the shard holds them."""
        self._path(shard).unlink(missing_ok=True)

    def _path(self, shard: Shard) -> Path:
        return self.spec.folder / f"prompts-{shard.index:05d}.safetensors"

    def _is_there(self, shard: Shard) -> bool:
        try:
            _, metadata = load_checked(self._path(shard))
        except (DamagedError, OSError):
            return False  # missing or damaged
        return metadata.get("fingerprint") == self.spec.fingerprint
