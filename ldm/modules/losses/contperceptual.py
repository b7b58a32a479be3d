"""The loss of KL-regularised autoencoders, and the names that configurations reach through this path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taming.modules.losses.adversarial import AdversarialLoss
from taming.modules.losses.vqperceptual import (
    LPIPS,
    DummyLoss,
    NLayerDiscriminator,
    VQLPIPSWithDiscriminator,
    adopt_weight,
    hinge_d_loss,
    vanilla_d_loss,
    weights_init,
)

__all__ = [
    "LPIPS", "DummyLoss", "LPIPSWithDiscriminator", "NLayerDiscriminator", "VQLPIPSWithDiscriminator", "adopt_weight",
    "hinge_d_loss", "vanilla_d_loss", "weights_init",
]  # fmt: skip


class LPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction likelihood, KL divergence and adversarial terms of a KL autoencoder.

    The likelihood is a Laplace-like one with a learned log-variance: |x - x̂| / exp(logvar) + logvar, summed over an
    image, so its value grows with the resolution. `pixelloss_weight` is stored and, as published, has no effect. The
    further parameters are those of `AdversarialLoss`, and:

    Args:
        logvar_init: initial log-variance. It only trains if the autoencoder is told to (`learn_logvar`).
        kl_weight: weight of the KL divergence.

    Source: Rombach et al. 2022, appendix G, equation 25.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
    ) -> None:
        super().__init__(
            disc_start, disc_num_layers, disc_in_channels, disc_factor=disc_factor, disc_weight=disc_weight,
            perceptual_weight=perceptual_weight, use_actnorm=use_actnorm, disc_conditional=disc_conditional, disc_loss=disc_loss,
        )  # fmt: skip
        self.kl_weight = kl_weight
        self.pixel_weight = pixelloss_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: Any,
        optimizer_idx: int,
        global_step: int,
        last_layer: Any = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one of the two players.

        Args:
            inputs, reconstructions: (b, c, h, w) in [-1, 1].
            posteriors: the latents' distribution.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: training batches so far.
            last_layer: weight of the decoder's last layer, for the adaptive weight.
            cond: condition for the discriminator.
            split: prefix of the logged names.
            weights: of each pixel, broadcastable to the images.

        Returns:
            The loss, and what to log.
        """
        if optimizer_idx == 1:
            return self.discriminator_pass(inputs, reconstructions, global_step, cond, split)
        batch_size = inputs.shape[0]
        rec_loss = (inputs.contiguous() - reconstructions.contiguous()).abs()
        if self.perceptual_weight > 0:
            rec_loss = rec_loss + self.perceptual_weight * self.perceptual(inputs, reconstructions)
        nll = rec_loss / self.logvar.exp() + self.logvar
        nll_loss = nll.sum() / batch_size
        weighted_nll_loss = nll_loss if weights is None else (weights * nll).sum() / batch_size
        kl_loss = posteriors.kl().sum() / batch_size
        # the adaptive weight balances against the unweighted likelihood, as published
        g_loss, d_weight = self.generator_terms(nll_loss, reconstructions, last_layer, cond, lazy=True)
        disc_factor = self.active_factor(global_step)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + d_weight * disc_factor * g_loss
        return loss, {
            f"{split}/total_loss": loss.clone().detach().mean(),
            f"{split}/logvar": self.logvar.detach().clone(),
            f"{split}/kl_loss": kl_loss.detach().mean(),
            f"{split}/nll_loss": nll_loss.detach().mean(),
            f"{split}/rec_loss": rec_loss.detach().mean(),
            f"{split}/d_weight": d_weight.detach(),
            f"{split}/disc_factor": torch.tensor(disc_factor),
            f"{split}/g_loss": g_loss.detach().mean(),
        }
