"""The loss of the VQGAN: reconstruction, codebook and adversarial terms."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.losses.adversarial import AdversarialLoss, adopt_weight, hinge_d_loss, vanilla_d_loss
from taming.modules.losses.lpips import LPIPS
from taming.modules.vqvae.codebook import code_counts, perplexity_of

__all__ = [
    "LPIPS", "DummyLoss", "NLayerDiscriminator", "VQLPIPSWithDiscriminator", "adopt_weight", "hinge_d_loss", "l1", "l2",
    "measure_perplexity", "vanilla_d_loss", "weights_init",
]  # fmt: skip


class DummyLoss(nn.Module):
    """No loss, for models that are only used."""


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Absolute difference, element by element."""
    return (x - y).abs()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Squared difference, element by element."""
    return (x - y) ** 2


PIXEL_LOSSES = {"l1": l1, "l2": l2}


def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Exponential of the entropy of the codes' frequencies, and how many codes occur at all.

    Args:
        predicted_indices: code indices of any shape.
        n_embed: size of the codebook.
    """
    counts = code_counts(predicted_indices, n_embed)
    return perplexity_of(counts), (counts > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Loss of a vector-quantised first stage; one call serves the generator, another the discriminator.

    `pixelloss_weight` is stored and, as published, has no effect. The further parameters are those of
    `AdversarialLoss`, and:

    Args:
        codebook_weight: weight of the quantiser's loss.
        n_classes: size of the codebook, for logging its use.
        pixel_loss: "l1" or "l2".

    Source: Esser et al. 2021, equations 4 to 7.
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
        pixel_loss: str = "l1",
    ) -> None:
        super().__init__(
            disc_start, disc_num_layers, disc_in_channels, disc_ndf, disc_factor, disc_weight, perceptual_weight,
            use_actnorm, disc_conditional, disc_loss,
        )  # fmt: skip
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss={pixel_loss!r} is unknown; choose one of {sorted(PIXEL_LOSSES)}")
        self.codebook_weight = codebook_weight
        self.pixel_weight = pixelloss_weight
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor | None,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Any = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of one of the two players.

        Args:
            codebook_loss: the quantiser's loss; None counts as zero.
            inputs, reconstructions: (b, c, h, w) in [-1, 1].
            optimizer_idx: 0 for the generator, 1 for the discriminator.
            global_step: training batches so far.
            last_layer: weight of the decoder's last layer, for the adaptive weight.
            cond: condition for the discriminator.
            split: prefix of the logged names.
            predicted_indices: codes, to log their perplexity and use (needs `n_classes`).

        Returns:
            The loss, and what to log.
        """
        if optimizer_idx == 1:
            return self.discriminator_pass(inputs, reconstructions, global_step, cond, split)
        codebook_loss = inputs.new_zeros(1) if codebook_loss is None else codebook_loss
        p_loss = self.perceptual(inputs, reconstructions)
        rec_loss = self.pixel_loss(inputs.contiguous(), reconstructions.contiguous())
        if self.perceptual_weight > 0:
            rec_loss = rec_loss + self.perceptual_weight * p_loss
        nll_loss = rec_loss.mean()
        g_loss, d_weight = self.generator_terms(nll_loss, reconstructions, last_layer, cond)
        disc_factor = self.active_factor(global_step)
        loss = nll_loss + d_weight * disc_factor * g_loss + self.codebook_weight * codebook_loss.mean()
        log = {
            f"{split}/total_loss": loss.clone().detach().mean(),
            f"{split}/quant_loss": codebook_loss.detach().mean(),
            f"{split}/nll_loss": nll_loss.detach().mean(),
            f"{split}/rec_loss": rec_loss.detach().mean(),
            f"{split}/p_loss": p_loss.detach().mean(),
            f"{split}/d_weight": d_weight.detach(),
            f"{split}/disc_factor": torch.tensor(disc_factor),
            f"{split}/g_loss": g_loss.detach().mean(),
        }
        if predicted_indices is not None and self.n_classes is not None:
            with torch.no_grad():
                perplexity, used = measure_perplexity(
                    rearrange(predicted_indices, "... -> (...)"), self.n_classes
                )
            log |= {f"{split}/perplexity": perplexity, f"{split}/cluster_usage": used.float()}
        return loss, log
