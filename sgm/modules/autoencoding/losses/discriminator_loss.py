"""The loss of first stages with any regularizer: likelihood, LPIPS, a discriminator, and the regularizer's weighted terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.modules.losses.adversarial import AdversarialLoss
from taming.util import instantiate_from_config

__all__ = ["GeneralLPIPSWithDiscriminator"]

PINK_WHITE_GREEN = ((0.11, -0.99, -0.36), (0.94, 0.94, 0.94), (-0.69, -0.22, -0.80))  # in [-1, 1]


class GeneralLPIPSWithDiscriminator(AdversarialLoss):
    """Likelihood, adversarial and regularisation terms; one call serves the generator, another the discriminator.

    The likelihood is a Laplace-like one with a log-variance: |x - x̂| / exp(logvar) + logvar, summed over an image. Outside
    training the discriminator is always heard, with weight `disc_factor`.

    Args:
        disc_start: training step at which the discriminator sets in.
        logvar_init: the log-variance to begin with.
        disc_num_layers, disc_in_channels: of the discriminator.
        disc_factor: weight of both adversarial terms, after `disc_start`.
        disc_weight: multiplies the adaptive weight of the generator's term.
        perceptual_weight: weight of LPIPS beside the pixel distance.
        disc_loss: "hinge" or "vanilla".
        scale_input_to_tgt_size: bring the inputs to the reconstructions' size.
        dims: 2 for images; 3 for clips (b, c, t, h, w), which are taken as images one by one.
        learn_logvar: the autoencoder's optimizer trains the log-variance.
        regularization_weights: {name in the regularizer's log: weight}; these are logged, too.
        additional_log_keys: further names of the regularizer's log to log.
        discriminator_config: another discriminator.

    Source: Esser et al. 2021, equations 5 to 7; Rombach et al. 2022, appendix G, equation 25.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        disc_loss: str = "hinge",
        scale_input_to_tgt_size: bool = False,
        dims: int = 2,
        learn_logvar: bool = False,
        regularization_weights: Mapping[str, float] | None = None,
        additional_log_keys: Sequence[str] | None = None,
        discriminator_config: Any = None,
    ) -> None:
        super().__init__(
            disc_start, disc_num_layers, disc_in_channels, disc_factor=disc_factor, disc_weight=disc_weight,
            perceptual_weight=perceptual_weight, disc_loss=disc_loss,
            discriminator=None if discriminator_config is None else instantiate_from_config(discriminator_config),
        )  # fmt: skip
        if dims not in (2, 3):
            raise ValueError(f"dims={dims}: choose 2 for images or 3 for clips")
        self.dims = dims
        self.scale_input_to_tgt_size = scale_input_to_tgt_size
        self.learn_logvar = learn_logvar
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)), requires_grad=learn_logvar)
        self.regularization_weights = dict(regularization_weights or {})
        self.additional_log_keys = {*(additional_log_keys or ()), *self.regularization_weights}
        self.forward_keys = [
            "optimizer_idx",
            "global_step",
            "last_layer",
            "split",
            "regularization_log",
        ]

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What the discriminator's optimizer trains."""
        return self.discriminator.parameters()

    def get_trainable_autoencoder_parameters(self) -> Iterator[nn.Parameter]:
        """What the autoencoder's optimizer trains of the loss."""
        return iter([self.logvar] if self.learn_logvar else [])

    def active_factor(self, global_step: int) -> float:
        """`disc_factor` once training has reached `disc_start`, before it 0; outside training always `disc_factor`."""
        return super().active_factor(global_step) if self.training else self.disc_factor

    def heard(self, global_step: int) -> bool:
        """Whether the generator listens to the discriminator."""
        return not self.training or self.active_factor(global_step) > 0

    def get_nll_loss(self, rec_loss: Tensor, weights: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """Distances (b, c, h, w) → their negative log-likelihood a picture, and the same with a weight for each pixel."""
        nll = rec_loss / self.logvar.exp() + self.logvar
        weighted = nll if weights is None else weights * nll
        return nll.sum() / len(nll), weighted.sum() / len(nll)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        *,
        regularization_log: Mapping[str, Tensor],
        optimizer_idx: int,
        global_step: int,
        last_layer: Any,
        split: str = "train",
        weights: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one of the two players.

        Args:
            inputs, reconstructions: (b, c, h, w) in [-1, 1], or (b, c, t, h, w) with dims 3.
            regularization_log: what the regularizer returned.
            optimizer_idx: 0 for the generator, 1 for the discriminator.
            global_step: training steps so far.
            last_layer: weight of the decoder's last layer, for the adaptive weight.
            split: prefix of the logged names.
            weights: of each pixel, broadcastable to the images.

        Returns:
            The loss, and what to log.

        Raises:
            ValueError: a third player.
        """
        if optimizer_idx not in (0, 1):
            raise ValueError(f"optimizer_idx={optimizer_idx}: 0 is the autoencoder, 1 the discriminator")
        inputs, reconstructions = self._comparable(inputs, reconstructions)
        if optimizer_idx == 1:
            return self._discriminator_turn(inputs, reconstructions, global_step, split)
        rec_loss = (inputs - reconstructions).abs()
        if self.perceptual_weight > 0:
            rec_loss = rec_loss + self.perceptual_weight * self.perceptual(inputs, reconstructions)
        nll_loss, loss = self.get_nll_loss(rec_loss, weights)
        g_loss, d_weight = nll_loss.new_zeros(()), nll_loss.new_zeros(())
        if self.heard(global_step):
            g_loss = -self.judge(reconstructions, None).mean()
            d_weight = torch.ones_like(g_loss)
            if self.training:
                d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
            loss = loss + d_weight * self.disc_factor * g_loss
        log = {}
        for name, value in regularization_log.items():
            if name in self.regularization_weights:
                loss = loss + self.regularization_weights[name] * value
            if name in self.additional_log_keys:
                log[f"{split}/{name}"] = value.detach().float().mean()
        return loss, log | {
            f"{split}/loss/total": loss.detach().clone().mean(),
            f"{split}/loss/nll": nll_loss.detach().mean(),
            f"{split}/loss/rec": rec_loss.detach().mean(),
            f"{split}/loss/g": g_loss.detach().mean(),
            f"{split}/scalars/logvar": self.logvar.detach().clone(),
            f"{split}/scalars/d_weight": d_weight.detach(),
        }

    def _comparable(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Both at one size, and clips as images."""
        if self.scale_input_to_tgt_size:
            inputs = F.interpolate(inputs, reconstructions.shape[2:], mode="bicubic", antialias=True)
        if self.dims == 3:
            inputs, reconstructions = (
                rearrange(x, "b c t h w -> (b t) c h w") for x in (inputs, reconstructions)
            )
        return inputs.contiguous(), reconstructions.contiguous()

    def _discriminator_turn(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, log = self.discriminator_pass(inputs, reconstructions, global_step, None, split)
        return loss, {
            f"{split}/loss/disc": log[f"{split}/disc_loss"],
            f"{split}/logits/real": log[f"{split}/logits_real"],
            f"{split}/logits/fake": log[f"{split}/logits_fake"],
        }

    @torch.no_grad()
    def log_images(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """What the discriminator holds of each patch: green for real, pink for false, inputs left of their reconstructions.

        Returns:
            `vis_logits` and `vis_logits_blended` (half picture, half colour), (b, 3, h, 2w) in [-1, 1].
        """
        pictures = self._comparable(inputs, reconstructions)
        logits = [F.interpolate(self.judge(x, None), x.shape[2:]) for x in pictures]
        values = torch.cat(logits, dim=-1).float()
        values = values / values.abs().max().clamp(min=1e-8)
        pink, white, green = (values.new_tensor(colour)[:, None, None] for colour in PINK_WHITE_GREEN)
        colours = torch.where(values < 0, torch.lerp(white, pink, -values), torch.lerp(white, green, values))
        pair = torch.cat(pictures, dim=-1).clamp(-1, 1)
        return {"vis_logits": colours, "vis_logits_blended": (0.5 * (pair + colours)).clamp(-1, 1)}
