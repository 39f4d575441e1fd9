"""The family of Z-Image: what its folders say, and how its network is opened.

The network itself is `zimage_network.py`, imported with the first weights: a folder is
opened, and a mistake answered, without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep.families.family import SEQUENCE_MULTIPLE, LatentSpace
from twostep.families.loading import load_diffusers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from twostep.families.zimage_network import ZImageVelocity

PATCH = 2


class ZImage:
    """The family (`family.Family`)."""

    transformer = "ZImageTransformer2DModel"
    patch = PATCH

    def load(self, folder: Path, part: str, dtype: torch.dtype) -> ZImageVelocity:
        from diffusers import ZImageTransformer2DModel

        loaded = load_diffusers(ZImageTransformer2DModel, folder, part, dtype, exact=True)
        return self.as_velocity(loaded).eval()

    def without_weights(self, folder: Path, part: str, dtype: torch.dtype) -> ZImageVelocity:
        import torch
        from diffusers import ZImageTransformer2DModel

        config = ZImageTransformer2DModel.load_config(folder, subfolder=part)
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                transformer = ZImageTransformer2DModel.from_config(config, trust_remote_code=False)
        finally:
            torch.set_default_dtype(default)
        return self.as_velocity(transformer).eval()

    def lora_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """By diffusers' own converter, which would drop DoRA's scales with a warning.

        Raises:
            ValueError, KeyError: for a layout that is not known.
        """
        from diffusers import ZImagePipeline

        dora = [key for key in weights if "dora_scale" in key or "magnitude" in key]
        if dora:
            raise ValueError(f"{dora[0]}: DoRA is not supported")
        converted: dict[str, Tensor] = ZImagePipeline.lora_state_dict(dict(weights))
        return converted

    def whole_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `Family.whole_weights`; ComfyUI's layout by diffusers' own converter."""
        for prefix in ("model.diffusion_model.", "diffusion_model."):
            if all(key.startswith(prefix) for key in weights):
                weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        if not any(".attention.qkv." in key or key.startswith("x_embedder.") for key in weights):
            return weights
        from diffusers.loaders import single_file_utils

        converted = single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(
            dict(weights)
        )
        return {key: value.contiguous() for key, value in converted.items()}

    def as_velocity(self, transformer: Any) -> ZImageVelocity:
        """As `Family.as_velocity`.

        Raises:
            ValueError: for a transformer without patches of 2 x 2.
        """
        from twostep.families.zimage_network import as_velocity

        return as_velocity(transformer)

    def latent_space(self, transformer: Mapping[str, Any], scale: int) -> LatentSpace:
        _, rows, columns = transformer["axes_lens"]
        channels = int(transformer["in_channels"])
        return LatentSpace(channels, scale, PATCH, (int(rows), int(columns)))

    def caption_width(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["cap_feat_dim"])

    def caption_tokens(self, transformer: Mapping[str, Any]) -> int:
        """The image's tokens stand one after the padded caption's last, which begins at 1."""
        frames = int(transformer["axes_lens"][0])
        return (frames - 2) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE

    def depth(self, transformer: Mapping[str, Any]) -> int:
        return int(transformer["n_layers"])

    def blocks(self, transformer: Any) -> Iterator[nn.Module]:
        """Main layers first, then the refiners'."""
        return chain(transformer.layers, transformer.noise_refiner, transformer.context_refiner)

    def shift(self, scheduler: Mapping[str, Any], size: tuple[int, int] | None) -> float:
        """The same for every size."""
        name = scheduler.get("_class_name")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"scheduler is {name}, expected FlowMatchEulerDiscreteScheduler")
        if scheduler.get("use_dynamic_shifting"):
            raise ValueError("use_dynamic_shifting is not supported, expected a static shift")
        return float(scheduler.get("shift", 1.0))
