"""What every adversarially trained first stage shares: GAN losses, their start, and the adaptive weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.losses.lpips import LPIPS, WithoutLPIPS
from taming.util import nearest


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`value` before step `threshold`, `weight` from it on."""
    return value if global_step < threshold else weight


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Logistic loss of the discriminator (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d_loss,
    "vanilla": vanilla_d_loss,
}


class AdversarialLoss(nn.Module):
    """Base of the reconstruction losses with LPIPS and a patch discriminator.

    Args:
        disc_start: training batch at which the discriminator's loss sets in.
        disc_num_layers, disc_in_channels, disc_ndf, use_actnorm: of the `NLayerDiscriminator`.
        disc_factor: weight of both adversarial terms, after `disc_start`.
        disc_weight: multiplies the adaptive weight of the generator's term.
        perceptual_weight: weight of LPIPS beside the pixel distance; with 0 its network is neither built nor fetched.
        disc_conditional: the discriminator also sees a condition, concatenated to the channels.
        disc_loss: "hinge" or "vanilla".
        discriminator: another one, instead of the `NLayerDiscriminator`.

    Source: Esser et al. 2021, equations 5 to 7.
    """

    last_layer: Any  # may be set from outside, as published, instead of being passed

    def __init__(
        self,
        disc_start: int,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_ndf: int = 64,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        discriminator: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if disc_loss not in DISCRIMINATOR_LOSSES:
            raise AssertionError(
                f"disc_loss={disc_loss!r} is unknown. {nearest(disc_loss, DISCRIMINATOR_LOSSES)}"
            )
        self.perceptual_loss = LPIPS() if perceptual_weight > 0 else WithoutLPIPS()
        self.perceptual_weight = perceptual_weight
        if discriminator is None:
            discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm)
            discriminator.apply(weights_init)
        self.discriminator = discriminator
        self.discriminator_iter_start = disc_start
        self.disc_loss = DISCRIMINATOR_LOSSES[disc_loss]
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional

    def perceptual(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """LPIPS distances (b, 1, 1, 1), or a zero where their weight is zero."""
        if self.perceptual_weight > 0:
            return self.perceptual_loss(inputs.contiguous(), reconstructions.contiguous())
        return inputs.new_zeros(1)

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Any = None) -> Tensor:
        """The generator weight that makes both losses pull equally at the decoder's last layer.

        Source: Esser et al. 2021, equation 7, with δ = 1e-4, clamped to [0, 1e4].
        """
        last_layer = self.last_layer[0] if last_layer is None else last_layer
        nll_pull, g_pull = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (nll_loss, g_loss)
        )
        weight = (nll_pull / (g_pull + 1e-4)).clamp(0.0, 1e4).detach()
        return weight * self.discriminator_weight

    def active_factor(self, global_step: int) -> float:
        """`disc_factor` once training has reached `disc_start`, before it 0."""
        return adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)

    def judge(self, images: Tensor, cond: Tensor | None) -> Tensor:
        """The discriminator's logits for images, beside their condition if there is one."""
        return self.discriminator(
            images.contiguous() if cond is None else torch.cat((images.contiguous(), cond), dim=1)
        )

    def generator_terms(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        last_layer: Any,
        cond: Tensor | None,
        lazy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The generator's loss and its adaptive weight.

        Args:
            nll_loss: reconstruction loss, with its graph.
            reconstructions: (b, c, h, w).
            last_layer: weight of the decoder's last layer.
            cond: condition, given if and only if `disc_conditional`.
            lazy: the weight is 0, without asking for gradients, when `disc_factor` is 0.
        """
        if (cond is not None) != self.disc_conditional:
            raise AssertionError("a condition must be given if and only if disc_conditional is set")
        g_loss = -self.judge(reconstructions, cond).mean()
        if lazy and not self.disc_factor > 0:
            return g_loss, torch.tensor(0.0)
        try:
            return g_loss, self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        except RuntimeError:
            # no graph to the last layer: fine in validation, a mistake in training
            assert not self.training, "the reconstruction has no gradient to the last layer"
            return g_loss, torch.tensor(0.0)

    def discriminator_pass(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss on detached images, and what to log of it."""
        logits_real = self.judge(inputs.detach(), cond)
        logits_fake = self.judge(reconstructions.detach(), cond)
        loss = self.active_factor(global_step) * self.disc_loss(logits_real, logits_fake)
        log = {
            f"{split}/disc_loss": loss.clone().detach().mean(),
            f"{split}/logits_real": logits_real.detach().mean(),
            f"{split}/logits_fake": logits_fake.detach().mean(),
        }
        return loss, log
