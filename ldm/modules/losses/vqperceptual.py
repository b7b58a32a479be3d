"""The loss of the VQ first stages of latent diffusion: taming's, with the published argument order and helpers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.losses.vqperceptual import (
    LPIPS,
    NLayerDiscriminator,
    adopt_weight,
    hinge_d_loss,
    l1,
    l2,
    measure_perplexity,
    vanilla_d_loss,
    weights_init,
)
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator as _VQLPIPSWithDiscriminator

__all__ = [
    "LPIPS", "NLayerDiscriminator", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss",
    "hinge_d_loss_with_exemplar_weights", "l1", "l2", "measure_perplexity", "vanilla_d_loss", "weights_init",
]  # fmt: skip


def hinge_d_loss_with_exemplar_weights(logits_real: Tensor, logits_fake: Tensor, weights: Tensor) -> Tensor:
    """Hinge loss of the discriminator with a weight for each image.

    Args:
        logits_real, logits_fake: (b, 1, h, w).
        weights: (b,).
    """
    real = F.relu(1.0 - logits_real).mean(dim=[1, 2, 3])
    fake = F.relu(1.0 + logits_fake).mean(dim=[1, 2, 3])
    return 0.5 * torch.stack([(weights * loss).sum() / weights.sum() for loss in (real, fake)]).sum()


class VQLPIPSWithDiscriminator(_VQLPIPSWithDiscriminator):
    """`taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator` with a choice of the perceptual loss.

    Args:
        perceptual_loss: only "lpips" is defined (as in the original, which named two more without having them).

    Raises:
        ValueError: another perceptual loss.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        pixel_loss: str = "l1",
    ) -> None:
        if perceptual_loss != "lpips":
            raise ValueError(f"perceptual_loss={perceptual_loss!r} is not defined; only 'lpips' is")
        super().__init__(
            disc_start, codebook_weight, pixelloss_weight, disc_num_layers, disc_in_channels, disc_factor, disc_weight,
            perceptual_weight, use_actnorm, disc_conditional, disc_ndf, disc_loss, n_classes, pixel_loss,
        )  # fmt: skip
