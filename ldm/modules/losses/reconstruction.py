"""A plain reconstruction loss: no perceptual network to download, no discriminator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.losses.vqperceptual import PIXEL_LOSSES


class ReconstructionWithKL(nn.Module):
    """Mean pixel distance plus KL divergence, for small autoencoders and machines without a network connection.

    It is called as `LPIPSWithDiscriminator` is; having no discriminator, it needs one optimizer only.

    Args:
        kl_weight: weight of the KL divergence per latent number.
        l1_weight, l2_weight: weights of the absolute and the squared difference.
    """

    def __init__(self, kl_weight: float = 1e-6, l1_weight: float = 1.0, l2_weight: float = 1.0) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.weights = {"l1": l1_weight, "l2": l2_weight}

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, posteriors: Any, optimizer_idx: int = 0, global_step: int = 0,
        last_layer: Any = None, cond: Tensor | None = None, split: str = "train", weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """Images (b, c, h, w) in [-1, 1], their reconstructions and the latents' distribution → loss and logs."""
        terms = [w * PIXEL_LOSSES[name](inputs, reconstructions) for name, w in self.weights.items()]
        pixels = torch.stack(terms).sum(dim=0)
        rec_loss = (pixels if weights is None else weights * pixels).mean()
        kl_loss = posteriors.kl().mean() / posteriors.mean[0].numel()
        loss = rec_loss + self.kl_weight * kl_loss
        return loss, {
            f"{split}/total_loss": loss.detach(),
            f"{split}/rec_loss": rec_loss.detach(),
            f"{split}/kl_loss": kl_loss.detach(),
        }
