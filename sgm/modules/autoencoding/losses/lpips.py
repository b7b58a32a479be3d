"""A loss on latents that also compares what they decode to."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.losses.lpips import LPIPS
from taming.util import instantiate_from_config


class LatentLPIPS(nn.Module):
    """Squared distance of latents, and LPIPS of the pictures that they decode to.

    Args:
        decoder_config: a first stage with `decode`; its encoder is dropped.
        perceptual_weight: of LPIPS between both decoded latents.
        latent_weight: of the squared distance, wherever LPIPS between decoded latents is taken.
        scale_input_to_tgt_size: bring the given images to the reconstructions' size.
        scale_tgt_to_input_size: bring the reconstructions to the images' size.
        perceptual_weight_on_inputs: of LPIPS between the decoded predictions and given images.
    """

    def __init__(
        self,
        decoder_config: Any,
        perceptual_weight: float = 1.0,
        latent_weight: float = 1.0,
        scale_input_to_tgt_size: bool = False,
        scale_tgt_to_input_size: bool = False,
        perceptual_weight_on_inputs: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_input_to_tgt_size = scale_input_to_tgt_size
        self.scale_tgt_to_input_size = scale_tgt_to_input_size
        self.decoder: Any = instantiate_from_config(decoder_config)
        if hasattr(self.decoder, "encoder"):
            del self.decoder.encoder
        self.perceptual_loss = LPIPS()
        self.perceptual_weight = perceptual_weight
        self.latent_weight = latent_weight
        self.perceptual_weight_on_inputs = perceptual_weight_on_inputs

    def forward(
        self, latent_inputs: Tensor, latent_predictions: Tensor, image_inputs: Tensor, split: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and what to log.

        Args:
            latent_inputs, latent_predictions: (b, z, h', w').
            image_inputs: (b, 3, h, w) in [-1, 1], for `perceptual_weight_on_inputs`.
            split: prefix of the logged names.
        """
        loss = (latent_inputs - latent_predictions) ** 2
        log = {f"{split}/latent_l2_loss": loss.mean().detach()}
        reconstructions: Tensor | None = None
        if self.perceptual_weight > 0.0:
            reconstructions = self.decoder.decode(latent_predictions)
            distance = self.perceptual_loss(
                self.decoder.decode(latent_inputs).contiguous(), reconstructions.contiguous()
            )
            loss = self.latent_weight * loss.mean() + self.perceptual_weight * distance.mean()
            log[f"{split}/perceptual_loss"] = distance.mean().detach()
        if self.perceptual_weight_on_inputs > 0.0:
            if reconstructions is None:
                reconstructions = self.decoder.decode(latent_predictions)
            images, reconstructions = self._at_one_size(image_inputs, reconstructions)
            distance = self.perceptual_loss(images.contiguous(), reconstructions.contiguous())
            loss = loss + self.perceptual_weight_on_inputs * distance.mean()
            log[f"{split}/perceptual_loss_on_inputs"] = distance.mean().detach()
        return loss, log

    def _at_one_size(self, images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale_input_to_tgt_size:
            images = _resize(images, reconstructions)
        elif self.scale_tgt_to_input_size:
            reconstructions = _resize(reconstructions, images)
        return images, reconstructions


def _resize(images: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(images, like.shape[2:], mode="bicubic", antialias=True)
