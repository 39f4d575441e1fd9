"""Loading a diffusers folder: velocity fields, prompt encoder, decoder and schedule."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ZImageTransformer2DModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from twostep.errors import ModelError
from twostep.families.zimage import PATCH, ZImageVelocity
from twostep.models.prompt_store import PromptStore
from twostep.runtime.files import folder_fingerprint

ZOO = Path(__file__).parent.parent / "zoo"
MAX_PIXELS = 2048 * 2048
_COMPONENTS = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae")
# Pickled weights are never fetched, let alone opened.
_HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.safetensors")


@cache
def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    """A model of the hub, asked for once in a process."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name!r} is no local folder, nor could the hub be asked: {error}"
        ) from error


def locate(name: str, patterns: Sequence[str] = _HUB_PATTERNS) -> Path:
    """The folder that `name` means: `zoo:NAME`, a local folder, or a hub id.

    Args:
        patterns: the files that are fetched of a model on the hub.

    Raises:
        ModelError: if there is no such folder.
    """
    if name.startswith("zoo:"):
        folder = ZOO / name.removeprefix("zoo:")
        if not folder.is_dir():
            known = ", ".join(
                f"zoo:{p.parent.name}" for p in sorted(ZOO.glob("*/model_index.json"))
            )
            raise ModelError(f"no model {name!r} in the package; there are: {known}")
    elif Path(name).is_dir():
        folder = Path(name)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
        folder = _fetch(name, tuple(patterns))
    else:
        raise ModelError(f"no model folder at {name!r}")
    return folder


def resolve(name: str, patterns: Sequence[str] = _HUB_PATTERNS) -> Path:
    """`locate`, for a diffusers folder of the Z-Image family.

    Raises:
        ModelError: if there is no such folder, or parts of it are missing.
    """
    folder = locate(name, patterns)
    missing = [part for part in _COMPONENTS if not (folder / part).exists()]
    if missing:
        raise ModelError(f"{folder} is no Z-Image diffusers folder: missing {', '.join(missing)}")
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a diffusers folder."""
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return index


def read_architecture(folder: Path, part: str = "transformer") -> dict[str, Any]:
    """The transformer's configuration: what makes two models interchangeable."""
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("_")}


def read_shift(folder: Path) -> float:
    """The scheduler's time shift.

    Raises:
        ModelError: for a scheduler other than flow-match Euler with a static shift.
    """
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"{folder}: scheduler is {config.get('_class_name')}, "
            "expected FlowMatchEulerDiscreteScheduler"
        )
    if config.get("use_dynamic_shifting"):
        raise ModelError(
            f"{folder}: use_dynamic_shifting is not supported, expected a static shift"
        )
    return float(config.get("shift", 1.0))


def load_velocity(
    folder: Path, part: str = "transformer", dtype: torch.dtype = torch.float32
) -> ZImageVelocity:
    """The folder's transformer as a velocity field, in evaluation mode, on CPU."""
    transformer = ZImageTransformer2DModel.from_pretrained(
        folder, subfolder=part, dtype=dtype, use_safetensors=True
    )
    return ZImageVelocity(transformer).eval()


def unloaded_transformer(folder: Path, part: str, dtype: torch.dtype) -> ZImageTransformer2DModel:
    """The folder's transformer as its configuration describes it; its weights mean nothing.

    For use on the meta device, where tensors have no memory yet.
    """
    config = ZImageTransformer2DModel.load_config(folder, subfolder=part)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return ZImageTransformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(default)


def transformer_with(like: Any, weights: Mapping[str, Tensor]) -> Any:
    """A transformer of the same configuration that holds `weights`, which are not copied."""
    with torch.device("meta"):
        shell = type(like).from_config(like.config)
    shell.load_state_dict(weights, assign=True)
    return shell


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
            return AutoModel.from_pretrained(
                folder / "text_encoder", dtype=dtype, use_safetensors=True
            ).eval()

        store = None
        if prompt_cache is not None:
            parts = (folder_fingerprint(folder / p) for p in ("text_encoder", "tokenizer"))
            store = PromptStore(prompt_cache, "-".join([*parts, str(dtype)]))
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return PromptEncoder(tokenizer, load, cache_size, store)

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
        """One (tokens, D) tensor per prompt, fp32; `prompts` is not changed."""
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

    def _encode(self, prompts: list[str], max_length: int) -> list[Tensor]:
        texts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        batch = self.tokenizer(
            texts, padding=True, max_length=max_length, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        hidden = self.text_encoder(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            output_hidden_states=True,
        ).hidden_states[-2]
        lengths = batch.attention_mask.sum(1).tolist()
        return [h[:n].float() for h, n in zip(hidden, lengths, strict=True)]


@dataclass(frozen=True)
class Decoder:
    """Latents to images through the folder's VAE, or a tiny one made for the same latents."""

    vae: Any

    @staticmethod
    def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
        vae = AutoencoderKL.from_pretrained(
            folder, subfolder="vae", dtype=dtype, use_safetensors=True
        )
        return Decoder(vae.eval())

    @staticmethod
    def load_tiny(name: str, like: Decoder, dtype: torch.dtype = torch.float32) -> Decoder:
        """An `AutoencoderTiny`: a folder, `zoo:NAME` or a hub id (`madebyollin/taef1` for Z-Image).

        Args:
            like: whose latents it must read.

        Raises:
            ModelError: if there is none, or it is made for other latents.
        """
        folder = locate(name, ("*.json", "*.safetensors"))
        config = folder / "config.json"
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if found.get("_class_name") != "AutoencoderTiny":
            raise ModelError(
                f"decoder: {name} must hold an AutoencoderTiny, "
                f"its config.json says {found.get('_class_name')}"
            )
        tiny = Decoder(AutoencoderTiny.from_pretrained(folder, dtype=dtype, use_safetensors=True))
        shapes = [(d.vae.config.latent_channels, d.scale) for d in (tiny, like)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"decoder: {name} reads latents of {shapes[0][0]} channels at 1/{shapes[0][1]}, "
                f"the model's have {shapes[1][0]} at 1/{shapes[1][1]}"
            )
        tiny.vae.eval()
        return tiny

    @property
    def scale(self) -> int:
        """Pixels per latent, along each side."""
        config = self.vae.config
        stages = getattr(config, "block_out_channels", None) or config.decoder_block_out_channels
        return int(2 ** (len(stages) - 1))

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 64) -> Tensor:
        """(B, C, H, W) latents to (B, 3, scale * H, scale * W) images in -1..1, fp32."""
        config = self.vae.config
        images = []
        for part in latents.split(batch_size):
            part = part.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
            images.append(self.vae.decode(part, return_dict=False)[0].float().clamp(-1, 1))
        return torch.cat(images).contiguous()

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Inverse of `decode`, the posterior's mode; fp32."""
        config = self.vae.config
        latents = []
        for part in images.split(batch_size):
            code = self.vae.encode(part.to(self.vae.dtype)).latent_dist.mode()
            latents.append(((code - config.shift_factor) * config.scaling_factor).float())
        return torch.cat(latents)


@dataclass(frozen=True)
class LatentSpace:
    """Where a model's images live.

    Attributes:
        channels: of a latent.
        scale: pixels per latent, along each side.
        positions: the most image tokens, in rows and columns, that the model tells apart.
    """

    channels: int
    scale: int
    positions: tuple[int, int]

    @staticmethod
    def of(transformer: Mapping[str, Any], scale: int) -> LatentSpace:
        """From the transformer's configuration."""
        _, rows, columns = transformer["axes_lens"]
        return LatentSpace(int(transformer["in_channels"]), scale, (int(rows), int(columns)))

    @staticmethod
    def of_folder(folder: Path) -> LatentSpace:
        """Of a model folder; loads no weights."""
        vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return LatentSpace.of(read_architecture(folder), scale)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a `height` x `width` image.

        Raises:
            ValueError: if a side is not a positive multiple of twice the VAE's scale or longer than
                the model has positions for, or the image has more than `MAX_PIXELS`.
        """
        multiple = PATCH * self.scale
        if height * width > MAX_PIXELS:
            raise ValueError(f"at most {MAX_PIXELS} pixels, {width}x{height} has {height * width}")
        sides = zip(("height", "width"), (height, width), self.positions, strict=True)
        for name, value, positions in sides:
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")
            if value > positions * multiple:
                raise ValueError(
                    f"{name} must be at most {positions * multiple} for this model, got {value}"
                )
        return self.channels, height // self.scale, width // self.scale
