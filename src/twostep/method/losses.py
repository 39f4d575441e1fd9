"""Losses: tensors in, a scalar out. No network is called here.

Shapes: clean and other latents (B, C, H, W); logits (B, K). Scalars are means over everything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def flow_matching(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a velocity (arXiv 2210.02747, eq. 23)."""
    return (velocity - target).square().mean()


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error on cached noise-image pairs: sharper than squared error."""
    return (prediction - target).abs().mean()


def distribution_matching(clean: Tensor, score_clean: Tensor, fake_clean: Tensor) -> Tensor:
    """Pseudo-target loss whose gradient is the normalised score difference (DMD, eq. 7 and 8).

    `0.5 * (clean - stopgrad(clean + (score_clean - fake_clean) / mean|clean - score_clean|))^2`,
    the mean per sample, in fp32. `score_clean` and `fake_clean` are the two models' clean
    predictions at the same noised `clean`; zero gradient where they agree.
    """
    clean = clean.float()
    with torch.no_grad():
        direction = (score_clean - fake_clean) / _scale(clean, score_clean)
    return pseudo_target(clean, direction)


def guidance_augmentation(clean: Tensor, conditional: Tensor, unconditional: Tensor) -> Tensor:
    """The move along the score's guidance (Decoupled DMD, arXiv 2511.22677), per sample, in fp32.

    On `distribution_matching`'s scale: with weight `alpha - 1` at the same noise level, the two
    together have the gradient of distribution matching whose score has guidance `alpha`.
    `conditional` and `unconditional` are the score's clean predictions.
    """
    clean = clean.float()
    with torch.no_grad():
        direction = (conditional - unconditional) / _scale(clean, conditional)
    return pseudo_target(clean, direction)


def _scale(clean: Tensor, score_clean: Tensor) -> Tensor:
    """How far the score moves each sample, (B, 1, 1, 1): matching weighs samples alike by it."""
    return (clean - score_clean).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-3)


def pseudo_target(clean: Tensor, direction: Tensor) -> Tensor:
    """A scalar whose gradient in `clean` is `-direction / clean.numel()`."""
    target = (clean + direction).detach()
    return 0.5 * (clean - target).square().mean()


def generator_adversarial(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss."""
    return softplus(-fake_logits.float()).mean()


def critic_adversarial(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Logistic critic loss; 2 log 2 for a critic that cannot tell."""
    return softplus(-real_logits.float()).mean() + softplus(fake_logits.float()).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor, noise_std: float) -> Tensor:
    """Finite-difference gradient penalty on the reals (APT, arXiv 2501.08316, eq. 4).

    Both logits must see the same re-noising noise and level; only the clean reals differ, by
    Gaussian noise of `noise_std`.
    """
    return ((real_logits.float() - perturbed_logits.float()) / noise_std).square().mean()
