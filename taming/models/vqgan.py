"""The VQGAN: images to a grid of codes from a learned codebook, and back (Esser et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.models.base import FirstStage
from taming.models.redraw import redraw
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.ema import LitEma
from taming.modules.vqvae.codebook import CodebookUsage
from taming.modules.vqvae.quantize import (
    EMAVectorQuantizer,
    GumbelQuantize,
    VectorQuantizer,
    VectorQuantizer2,
)
from taming.util import ConfigError, instantiate_from_config

__all__ = [
    "EMAVQ", "Decoder", "EMAVectorQuantizer", "Encoder", "GumbelQuantize", "GumbelVQ", "VQModel", "VQNoDiscModel",
    "VQSegmentationModel", "VectorQuantizer",
]  # fmt: skip


class VQModel(FirstStage):
    """A vector-quantised autoencoder with perceptual and adversarial loss.

    Training and validation log `codebook_usage`, the share of codes that occur, and `codebook_perplexity`: in training
    over the latest `usage_window` codes, in validation over all of an epoch.

    Args:
        ddconfig: options of `Encoder` and `Decoder` (`double_z` must be False).
        lossconfig: of the loss.
        n_embed: size of the codebook.
        embed_dim: channels of a code.
        ckpt_path: weights to start from.
        ignore_keys: prefixes of entries in that file to leave out.
        image_key: entry of a batch that holds the image.
        colorize_nlabels: number of labels, if the images are segmentations.
        monitor: what checkpoints are ranked by.
        remap: `.npy` file of the used code indices, see `taming.modules.vqvae.remap.Remap`.
        sane_index_shape: code indices as (b, h, w) instead of flat.
        quantizer_config: any quantiser of `taming.modules.vqvae.quantize`; it brings its own options, `remap` and
            `sane_index_shape` among them. None is the published one: `VectorQuantizer2` with beta = 0.25.
        ema_decay: keep an average of all weights with this decay, as `model_ema`.
        scheduler_config: learning-rate multiplier for both optimizers.
        usage_window: how many of the latest codes `train/codebook_usage` looks at; 0 logs no usage at all.

    Raises:
        ConfigError: the quantiser has other codes than `n_embed` and `embed_dim` say.
    """

    model_ema: LitEma
    quantize: Any

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
        remap: str | None = None,
        sane_index_shape: bool = False,
        quantizer_config: Any = None,
        ema_decay: float | None = None,
        scheduler_config: Any = None,
        usage_window: int = 1 << 16,
    ) -> None:
        super().__init__(image_key, colorize_nlabels, monitor)
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.scheduler_config = scheduler_config
        self.usage_window = usage_window
        self.usage: dict[str, CodebookUsage] = {}
        self.build(ddconfig, lossconfig)
        if quantizer_config is None:
            self.quantize = VectorQuantizer2(
                n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
            )
        else:
            self.quantize = self._checked(instantiate_from_config(quantizer_config), remap, sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self._complete(ckpt_path, ignore_keys, ema_decay)

    def _checked(self, quantizer: Any, remap: str | None, sane_index_shape: bool) -> Any:
        if remap is not None or sane_index_shape:
            raise ConfigError(
                "with a quantizer_config, remap and sane_index_shape belong into its params, not beside it"
            )
        found = (quantizer.n_e, quantizer.e_dim)
        if found != (self.n_embed, self.embed_dim):
            raise ConfigError(
                f"quantizer_config makes {found[0]} codes of {found[1]} channels, but the model's n_embed={self.n_embed} "
                f"and embed_dim={self.embed_dim}; set these to {found[0]} and {found[1]}"
            )
        return quantizer

    def _complete(
        self,
        ckpt_path: str | None,
        ignore_keys: Sequence[str],
        ema_decay: float | None,
        quantizer: Any = None,
    ) -> None:
        """What comes after all networks are in place, in a subclass with another `quantizer` after that one."""
        if quantizer is not None:
            self.quantize = quantizer
        self.ema_decay, self.use_ema = ema_decay, ema_decay is not None
        if ema_decay is not None:
            self.model_ema = LitEma(self, decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    # --------------------------------------------------------------------------------------- images and codes

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) in [-1, 1] → latents (b, embed_dim, h', w') before the codebook."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Images (b, c, h, w) in [-1, 1] → quantised latents (b, embed_dim, h', w'), loss, (…, …, code indices)."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latents (b, embed_dim, h', w') → images (b, out_ch, h, w)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Code indices (b, h', w') → images (b, out_ch, h, w).

        Raises:
            ValueError: the indices are no grid.
            IndexError: an index that the codebook lacks.
        """
        if code_b.ndim != 3:
            raise ValueError(
                f"code indices must come as a grid (b, h, w), not {tuple(code_b.shape)}; reshape them"
            )
        return self.decode(
            self.quantize.get_codebook_entry(code_b.reshape(-1), (*code_b.shape, self.embed_dim))
        )

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Images → reconstructions and the quantiser's loss."""
        quant, diff, _ = self.encode(input)
        return self.decode(quant), diff

    def transform(
        self, image: Tensor, condition: Any = None, strength: float = 0.8, *, transformer: Any, **options: Any
    ) -> Tensor:
        """Re-draw the last `strength` share of an image's codes with a transformer, and decode; see `redraw` for options and errors.

        Example: `vqgan.transform(image, condition=["red heart"], strength=0.5, transformer=transformer, top_k=100)`

        Args:
            image: (b, c, h, w) in [-1, 1].
            condition: as `Net2NetTransformer.generate` takes it.
            strength: share of the codes to draw, in [0, 1].
            transformer: a Net2NetTransformer over this model's codes.
            options: of `taming.models.redraw.redraw`.

        Returns:
            Images (b, c, h, w).
        """
        return redraw(self, image, condition, strength, transformer, **options)

    # --------------------------------------------------------------------------------------------- training

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Images → reconstructions, the quantiser's loss, code indices."""
        quant, diff, (_, _, indices) = self.encode(inputs)
        return self.decode(quant), diff, indices

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """The configured loss, called as published; in training also the use of the codebook."""
        reconstructions, codebook_loss, indices = outputs
        loss, log = self.loss(
            codebook_loss, inputs, reconstructions, player, self.batch_counter,
            last_layer=self.get_last_layer(), split=split, predicted_indices=indices,
        )  # fmt: skip
        return loss, log | self._codebook_log(player, indices, split)

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Encoder, decoder, codebook and the two projections, in the published order; not what running averages move."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        averaged = set(self.quantize.parameters()) if isinstance(self.quantize, EMAVectorQuantizer) else set()
        return [p for part in parts for p in part.parameters() if p not in averaged]

    def _codebook_log(self, player: int, indices: Tensor, split: str) -> dict[str, Tensor]:
        """Count a batch's codes once; in training, what to log of the latest."""
        if player != 0 or not self.usage_window:
            return {}
        if split not in self.usage:
            self.usage[split] = CodebookUsage(
                self.quantize.re_embed, self.usage_window if split == "train" else None
            )
        self.usage[split].update(indices)
        return _figures(self.usage[split], split) if split == "train" else {}

    def _forget_usage(self) -> None:
        self.usage = {split: usage for split, usage in self.usage.items() if split == "train"}

    def _log_usage(self) -> None:
        for split, usage in self.usage.items():
            if split != "train":
                usage.counts = self.trainer.strategy.reduce(usage.counts.to(self.device), reduce_op="sum")
                self.log_dict(_figures(usage, split))

    def on_validation_epoch_start(self) -> None:
        """Count the epoch's codes anew."""
        self._forget_usage()

    def on_validation_epoch_end(self) -> None:
        """Log how the epoch used the codebook."""
        self._log_usage()

    def on_test_epoch_start(self) -> None:
        """Count the epoch's codes anew."""
        self._forget_usage()

    def on_test_epoch_end(self) -> None:
        """Log how the epoch used the codebook."""
        self._log_usage()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the latest codes, too, so that the curve of their use goes on after a resume."""
        super().on_save_checkpoint(checkpoint)
        if "train" in self.usage:
            checkpoint["recent_codes"] = self.usage["train"].recent.int().cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the latest codes again, where the checkpoint has them."""
        super().on_load_checkpoint(checkpoint)
        if "recent_codes" in checkpoint:
            self._codebook_log(0, checkpoint["recent_codes"], "train")

    # --------------------------------------------------------------------------------------------- pictures

    def log_images(
        self, batch: Mapping[str, Any], plot_ema: bool | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures of a batch in [-1, 1]: `inputs`, `reconstructions`, and the latter with averaged weights, if they are kept."""
        log = super().log_images(batch, **kwargs)
        if self.use_ema if plot_ema is None else plot_ema:
            with self.ema_scope():
                log["reconstructions_ema"] = super().log_images(batch, **kwargs)["reconstructions"]
        return log


def _figures(usage: CodebookUsage, split: str) -> dict[str, Tensor]:
    return {f"{split}/codebook_usage": usage.share(), f"{split}/codebook_perplexity": usage.perplexity()}


class _Alone:
    """Mixin of the models that play without a discriminator: one optimizer, which `configure_optimizers` returns bare."""

    discriminator = None

    def configure_optimizers(self) -> Any:
        """Adam (β = 0.5, 0.9), and its multiplier if there is one."""
        optimizers, schedulers = super().configure_optimizers()  # type: ignore[misc]
        return (optimizers, schedulers) if schedulers else optimizers[0]


class VQSegmentationModel(_Alone, VQModel):
    """A vector-quantised autoencoder of segmentation maps; the loss (`BCELossWithQuant`) has no discriminator.

    Takes the parameters of `VQModel`, and:

    Args:
        n_labels: number of labels; pictures show each in a random colour.
    """

    def __init__(self, n_labels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"colorize_nlabels": n_labels, **kwargs})
        self.n_labels = n_labels

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """The configured loss, called as published."""
        reconstructions, codebook_loss, indices = outputs
        loss, log = self.loss(codebook_loss, inputs, reconstructions, split=split)
        return loss, log | self._codebook_log(player, indices, split)

    def quality(self, inputs: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Share of the pixels whose likeliest label is the right one."""
        return {"accuracy": (reconstructions.argmax(dim=1) == inputs.argmax(dim=1)).float().mean()}

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        """Pictures in [-1, 1]: `inputs`, and `reconstructions` with each pixel's likeliest label, both in colours."""
        x = self.get_input(batch, self.image_key).to(self.device)
        logits = self(x)[0]
        if x.shape[1] <= 3:
            return {"inputs": x, "reconstructions": logits}
        likeliest = F.one_hot(logits.argmax(dim=1), num_classes=logits.shape[1])
        maps = likeliest.permute(0, 3, 1, 2).to(x)
        return {"inputs": self.to_rgb(x), "reconstructions": self.to_rgb(maps)}


class VQNoDiscModel(_Alone, VQModel):
    """A vector-quantised autoencoder without a discriminator.

    The loss is called as `loss(codebook_loss, inputs, reconstructions, batches so far, split=…)` and returns the loss and
    what to log. Takes the parameters of `VQModel`.
    """

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """The configured loss, called as published."""
        reconstructions, codebook_loss, indices = outputs
        loss, log = self.loss(codebook_loss, inputs, reconstructions, self.batch_counter, split=split)
        return loss, log | self._codebook_log(player, indices, split)


class GumbelVQ(VQModel):
    """A VQGAN whose codes are drawn, at a temperature that falls with training (logged as `temperature`).

    Encoding is random: set a seed where it must repeat. Further parameters as of `VQModel`.

    Args:
        embed_dim: channels of a code; must equal ddconfig's z_channels.
        temperature_scheduler_config: a schedule that is called with the number of batches so far.
        kl_weight: weight of the codes' divergence from the uniform distribution.
    """

    def __init__(
        self,
        ddconfig: Any,
        lossconfig: Any,
        n_embed: int,
        embed_dim: int,
        temperature_scheduler_config: Any,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        kl_weight: float = 1e-8,
        remap: str | None = None,
        ema_decay: float | None = None,
        scheduler_config: Any = None,
    ) -> None:
        z_channels = ddconfig["z_channels"]
        if embed_dim != z_channels:
            raise ConfigError(
                f"GumbelVQ needs embed_dim={embed_dim} equal to ddconfig.z_channels={z_channels}; set both to one number"
            )
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, colorize_nlabels=colorize_nlabels,
            monitor=monitor, scheduler_config=scheduler_config,
        )  # fmt: skip
        self.loss.n_classes = n_embed
        self.vocab_size = n_embed
        self.temperature_scheduler = instantiate_from_config(temperature_scheduler_config)
        quantizer = GumbelQuantize(z_channels, embed_dim, n_embed, kl_weight=kl_weight, remap=remap)
        self._complete(ckpt_path, ignore_keys, ema_decay, quantizer)

    def temperature_scheduling(self) -> None:
        """Set the temperature that belongs to the number of batches so far."""
        self.quantize.temperature = self.temperature_scheduler(self.batch_counter)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Refused, as published.

        Raises:
            NotImplementedError: always; the message says how to decode codes.
        """
        raise NotImplementedError(
            "GumbelVQ has no decode_code; use decode(quantize.get_codebook_entry(indices, (b, h, w, embed_dim)))"
        )

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """As in the base class, at the scheduled temperature."""
        self.temperature_scheduling()
        return super().reconstruct(inputs)

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """As in the base class; the autoencoder's training also logs the temperature."""
        loss, log = super().player_loss(player, inputs, outputs, split)
        drawn = {"temperature": self.quantize.temperature} if player == 0 and split == "train" else {}
        return loss, log | drawn


class EMAVQ(VQModel):
    """A VQGAN whose codebook follows running averages instead of a gradient (beta = 0.25 weighs the commitment).

    Parameters as of `VQModel`.
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
        remap: str | None = None,
        sane_index_shape: bool = False,
        ema_decay: float | None = None,
        scheduler_config: Any = None,
    ) -> None:
        super().__init__(
            ddconfig, lossconfig, n_embed, embed_dim, image_key=image_key, colorize_nlabels=colorize_nlabels,
            monitor=monitor, scheduler_config=scheduler_config,
        )  # fmt: skip
        quantizer = EMAVectorQuantizer(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self._complete(ckpt_path, ignore_keys, ema_decay, quantizer)
