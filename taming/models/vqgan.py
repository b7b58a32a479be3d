"""The VQGAN: images to a grid of codes from a learned codebook, and back (Esser et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from taming.models.base import FirstStage
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2

__all__ = ["Decoder", "Encoder", "VQModel"]


class VQModel(FirstStage):
    """A vector-quantised autoencoder with perceptual and adversarial loss.

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
        remap: `.npy` file of the used code indices, see `taming.modules.vqvae.quantize.Remap`.
        sane_index_shape: code indices as (b, h, w) instead of flat.
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
    ) -> None:
        super().__init__(image_key, colorize_nlabels, monitor)
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.build(ddconfig, lossconfig)
        self.quantize = VectorQuantizer2(
            n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape
        )
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

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
        """Code indices (b, h', w') → images (b, out_ch, h, w)."""
        b, h, w = code_b.shape
        return self.decode(self.quantize.get_codebook_entry(code_b.reshape(-1), (b, h, w, self.embed_dim)))

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """Images → reconstructions and the quantiser's loss."""
        quant, diff, _ = self.encode(input)
        return self.decode(quant), diff

    def reconstruct(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Images → reconstructions, the quantiser's loss, code indices."""
        quant, diff, (_, _, indices) = self.encode(inputs)
        return self.decode(quant), diff, indices

    def player_loss(
        self, player: int, inputs: Tensor, outputs: tuple[Any, ...], split: str
    ) -> tuple[Tensor, dict[str, Any]]:
        """The configured loss, called as published."""
        reconstructions, codebook_loss, indices = outputs
        return self.loss(
            codebook_loss, inputs, reconstructions, player, self.batch_counter,
            last_layer=self.get_last_layer(), split=split, predicted_indices=indices,
        )  # fmt: skip

    def autoencoder_parameters(self) -> list[nn.Parameter]:
        """Encoder, decoder, codebook and the two projections, in the published order."""
        parts = (self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv)
        return [p for part in parts for p in part.parameters()]
