"""First stages of latent diffusion: KL-regularised and vector-quantised autoencoders, and none at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.tiling import Tiled
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from taming.models.base import FirstStage
from taming.models.vqgan import VQModel as _VQModel
from taming.modules.ema import LitEma

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface"]

logger = logging.getLogger(__name__)


class AutoencoderKL(Tiled, FirstStage):
    """An autoencoder whose latents are drawn towards a standard normal distribution.

    Args:
        ddconfig: options of `Encoder` and `Decoder`; `double_z` must be True.
        lossconfig: of the loss.
        embed_dim: channels of the latent.
        ckpt_path: weights to start from.
        ignore_keys: prefixes of entries in that file to leave out.
        image_key: entry of a batch that holds the image.
        colorize_nlabels: number of labels, if the images are segmentations.
        monitor: what checkpoints are ranked by.
        ema_decay: keep an average of all weights with this decay, as `model_ema`.
        learn_logvar: train the loss's log-variance, too.
        scheduler_config: learning-rate multiplier for both optimizers.

    Source: Rombach et al. 2022, section 3.1.
    """

    def __init__(
        self,
        ddconfig: Any,
        lossconfig: Any,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
        scheduler_config: Any = None,
    ) -> None:
        super().__init__(image_key, colorize_nlabels, monitor)
        if not ddconfig["double_z"]:
            raise AssertionError("a KL autoencoder needs ddconfig.double_z=True: mean and log-variance")
        self.learn_logvar = learn_logvar
        self.scheduler_config = scheduler_config
        self.embed_dim = embed_dim
        self.build(ddconfig, lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.use_ema = ema_decay is not None
        if ema_decay is not None:
            self.ema_decay = ema_decay
            self.model_ema = LitEma(self, decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Images (b, c, h, w) in [-1, 1] → the distribution of their latents (b, embed_dim, h', w')."""
        return DiagonalGaussianDistribution(self.quant_conv(self.run_encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (b, embed_dim, h', w') → images (b, out_ch, h, w)."""
        return self.run_decoder(self.post_quant_conv(z))

    def forward(
        self, input: Tensor, sample_posterior: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Images → reconstructions (of a draw from the posterior, or of its mode) and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """The configured loss, called as published."""
        reconstructions, posterior = outputs
        return self.loss(
            inputs,
            reconstructions,
            posterior,
            player,
            self.batch_counter,
            last_layer=self.get_last_layer(),
            split=split,
        )

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Encoder, decoder and the two projections, and the log-variance if it is to be learned."""
        parts = (self.encoder, self.decoder, self.quant_conv, self.post_quant_conv)
        learned = [self.loss.logvar] if self.learn_logvar else []
        return [p for part in parts for p in part.parameters()] + learned

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, log_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1]: `inputs`, `samples` (decoded noise), `reconstructions`, and these with averaged weights.

        A sample of random noise says little about a KL autoencoder: its latents are only drawn towards a normal
        distribution, with a tiny weight.
        """
        x = self.get_input(batch, self.image_key).to(self.device)
        log: dict[str, Tensor] = {}
        if not only_inputs:
            log |= self._draw(x, "")
            if log_ema or self.use_ema:
                with self.ema_scope():
                    log |= self._draw(x, "_ema")
        (log["inputs"],) = self.displayable(x)
        return log

    def _draw(self, x: Tensor, suffix: str) -> dict[str, Tensor]:
        reconstruction, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.sample()))
        (reconstruction,) = self.displayable(reconstruction)
        return {f"samples{suffix}": samples, f"reconstructions{suffix}": reconstruction}

    def next_steps(self, logdir: str) -> str:
        """What to do with the trained model, for the end of a training run."""
        return f"  use it as    first_stage_config.params.ckpt_path={logdir}/checkpoints/last.ckpt"


class VQModel(Tiled, _VQModel):
    """The VQGAN as latent diffusion trains it: `taming.models.vqgan.VQModel` and more options.

    Args:
        batch_resize_range: [lo, hi]; each batch is resized to a random multiple of 16 in this range (to hi for the
            first five batches, so that memory is reserved early).
        scheduler_config: learning-rate multiplier for both optimizers.
        lr_g_factor: the autoencoder learns at this multiple of the learning rate.
        use_ema: keep an average of all weights, as `model_ema`.
    """

    def __init__(
        self,
        ddconfig: Any,
        lossconfig: Any,
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,
        scheduler_config: Any = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
    ) -> None:
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, ckpt_path, ignore_keys, image_key, colorize_nlabels, monitor, remap,
            sane_index_shape, ema_decay=0.9999 if use_ema else None, scheduler_config=scheduler_config,
        )  # fmt: skip
        self.batch_resize_range = batch_resize_range
        self.lr_g_factor = lr_g_factor

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """As in the base class; resized if `batch_resize_range` says so."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is not None:
            low, high = self.batch_resize_range
            size = high if self.batch_counter <= 4 else int(np.random.choice(np.arange(low, high + 16, 16)))
            if size != x.shape[2]:
                x = F.interpolate(x, size=size, mode="bicubic").detach()
        return x

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] → latents (b, embed_dim, h', w') before the codebook."""
        return self.quant_conv(self.run_encoder(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latents (b, embed_dim, h', w') → images (b, out_ch, h, w)."""
        return self.run_decoder(self.post_quant_conv(quant))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Images → reconstructions and the quantiser's loss, and the code indices on request."""
        reconstruction, diff, indices = self.reconstruct(input)
        return (reconstruction, diff, indices) if return_pred_indices else (reconstruction, diff)

    def log_images(
        self, batch: Mapping[str, Any], only_inputs: bool = False, plot_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures in [-1, 1]: `inputs`, `reconstructions`, and the latter with averaged weights on request."""
        if only_inputs:
            return {"inputs": self.get_input(batch, self.image_key).to(self.device)}
        return super().log_images(batch, plot_ema=plot_ema)


class VQModelInterface(VQModel):
    """A VQModel whose latents are those before the codebook; decoding quantises them first."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"embed_dim": embed_dim, **kwargs})

    def encode(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] → latents (b, embed_dim, h', w') before the codebook."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latents (b, embed_dim, h', w') → images, through the codebook unless told not to."""
        quant = h if force_not_quantize else self.quantize(h)[0]
        return super().decode(quant)


class IdentityFirstStage(nn.Module):
    """No first stage: diffusion in pixel space, or a condition used as it is.

    Args:
        vq_interface: `quantize` answers as a quantiser does, `(x, None, [None, None, None])`.
    """

    def __init__(self, *args: Any, vq_interface: bool = False, **ignored_options: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x itself."""
        return x

    def decode(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x itself."""
        return x

    def quantize(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x itself, in a quantiser's triple if so configured."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """x itself."""
        return x
