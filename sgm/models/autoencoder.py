"""First stages of chapter three by name: the engine with classic layers, KL-regularised or with a codebook, and none at all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import ldm.models.autoencoder as ldm
from ldm.models.tiling import Tiled
from sgm.models.autoencoding import AbstractAutoencoder, AutoencodingEngine
from sgm.util import get_nested_attribute, instantiate_from_config

__all__ = [
    "AEIntegerWrapper", "AbstractAutoencoder", "AutoencoderKL", "AutoencoderKLInferenceWrapper", "AutoencoderKLModeOnly",
    "AutoencoderLegacyVQ", "AutoencodingEngine", "AutoencodingEngineLegacy", "IdentityFirstStage",
]  # fmt: skip

GAUSSIAN = "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"
CODEBOOK = "sgm.modules.autoencoding.regularizers.quantize.VectorQuantizer"
# of Stable Diffusion's and SDXL's first stage
PUBLISHED_LAYERS = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
NO_LOSS = {"target": "torch.nn.Identity"}
CODE_KEYS = ("min_encoding_indices", "encoding_indices", "indices")  # of the quantisers' logs


class AutoencodingEngineLegacy(Tiled, AutoencodingEngine):
    """The engine with the layers of a classic `ddconfig` and a 1×1 convolution on either side of the latents.

    As published, these two convolutions are in no optimizer unless `trainable_ae_params` names them (".*quant_conv.*").

    Args:
        embed_dim: channels of the latents.
        ddconfig: options of `Encoder` and `Decoder`.
        max_batch_size: encode and decode at most so many at a time.
        options: further parameters of `AutoencodingEngine`.
    """

    def __init__(
        self, embed_dim: int, ddconfig: Any, max_batch_size: int | None = None, **options: Any
    ) -> None:
        # plain values, which `make_projections` reads
        self.embed_dim, self.max_batch_size = embed_dim, max_batch_size
        self._z_channels, self._double = ddconfig["z_channels"], 2 if ddconfig["double_z"] else 1
        super().__init__(
            encoder_config={"target": "sgm.modules.diffusionmodules.model.Encoder", "params": ddconfig},
            decoder_config={"target": "sgm.modules.diffusionmodules.model.Decoder", "params": ddconfig},
            **options,
        )

    def make_projections(self) -> None:
        """`quant_conv` and `post_quant_conv`."""
        self.quant_conv = nn.Conv2d(self._double * self._z_channels, self._double * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, self._z_channels, 1)

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        return iter(x.split(self.max_batch_size or max(len(x), 1)))

    def encode(self, x: Tensor, return_reg_log: bool = False, unregularized: bool = False) -> Any:
        """As in the base class."""
        z = torch.cat([self.quant_conv(self.run_encoder(part)) for part in self._parts(x)])
        if unregularized:
            return z, {}
        z, log = self.regularization(z)
        return (z, log) if return_reg_log else z

    def decode(self, z: Tensor, **conditions: Any) -> Tensor:
        """Latents (b, embed_dim, h', w') → images (b, out_ch, h, w)."""
        run = self.decoder if conditions else self.run_decoder
        return torch.cat([run(self.post_quant_conv(part), **conditions) for part in self._parts(z)])


class AutoencoderKL(AutoencodingEngineLegacy):
    """An autoencoder whose latents are drawn from a Gaussian; without a ddconfig, with the layers of Stable Diffusion's.

    Args:
        embed_dim: channels of the latents.
        ddconfig: options of `Encoder` and `Decoder`.
        lossconfig: of the loss; `loss_config` is the same.
        options: further parameters of `AutoencodingEngineLegacy`.

    Source: Rombach et al. 2022, section 3.1.
    """

    SAMPLES = True

    def __init__(
        self, embed_dim: int = 4, ddconfig: Any = None, lossconfig: Any = None, loss_config: Any = None, **options: Any
    ) -> None:  # fmt: skip
        options.setdefault("regularizer_config", {"target": GAUSSIAN, "params": {"sample": self.SAMPLES}})
        super().__init__(
            embed_dim=embed_dim, ddconfig=PUBLISHED_LAYERS if ddconfig is None else ddconfig,
            loss_config=loss_config or lossconfig or NO_LOSS, **options,
        )  # fmt: skip


class AutoencoderKLModeOnly(AutoencoderKL):
    """An `AutoencoderKL` that takes the Gaussian's mean."""

    SAMPLES = False


class AutoencoderKLInferenceWrapper(AutoencoderKL):
    """`AutoencoderKL` under a name of older configurations: `encode` draws from the Gaussian."""


class AutoencoderLegacyVQ(AutoencodingEngineLegacy):
    """The engine with a codebook.

    Args:
        embed_dim: channels of a code.
        n_embed: size of the codebook.
        sane_index_shape: log indices as (b, h, w).
        options: further parameters of `AutoencodingEngineLegacy`; `double_z` of its ddconfig must be False.
    """

    def __init__(self, embed_dim: int, n_embed: int, sane_index_shape: bool = False, **options: Any) -> None:
        codebook = {"n_e": n_embed, "e_dim": embed_dim, "sane_index_shape": sane_index_shape}
        loss = options.pop("lossconfig", None)
        options.setdefault("loss_config", loss or NO_LOSS)
        super().__init__(
            embed_dim=embed_dim, regularizer_config={"target": CODEBOOK, "params": codebook}, **options
        )


class IdentityFirstStage(ldm.IdentityFirstStage):
    """No first stage: diffusion in pixel space."""

    def get_input(self, x: Any) -> Any:
        """x itself."""
        return x


class AEIntegerWrapper(nn.Module):
    """Pictures as sequences of whole numbers, by an autoencoder with a codebook; for use, not for training.

    Args:
        model: an `AutoencodingEngine`, or its configuration.
        shape: (h, w) of the map of codes.
        regularization_key: where the model keeps its codebook, a dotted path.
        encoder_kwargs: further arguments of the model's `encode`.
    """

    def __init__(
        self,
        model: Any,
        shape: Sequence[int] = (16, 16),
        regularization_key: str = "regularization",
        encoder_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model if isinstance(model, nn.Module) else instantiate_from_config(model)
        self.regularization: Any = get_nested_attribute(self.model, regularization_key)
        if not hasattr(self.regularization, "get_codebook_entry"):
            raise TypeError(
                f"{regularization_key!r} is a {type(self.regularization).__name__}, which has no codebook; AEIntegerWrapper needs one"
            )
        self.shape = tuple(shape)
        self.encoder_kwargs = {"return_reg_log": True, **(encoder_kwargs or {})}

    def encode(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) → codes (b, s)."""
        if self.training:
            raise AssertionError("AEIntegerWrapper is for use only: call .eval() first")
        _, log = self.model.encode(x, **self.encoder_kwargs)
        codes = next(log[key] for key in CODE_KEYS if key in log)
        return codes.reshape(len(x), -1)

    def decode(self, inds: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Codes (b, h·w) → images, for a map of (h, w) = `shape`, else the constructor's.

        Raises:
            ValueError: the codes do not fill that map.
        """
        height, width = self.shape if shape is None else shape
        if inds.ndim != 2 or inds.shape[1] != math.prod((height, width)):
            raise ValueError(
                f"codes {tuple(inds.shape)} do not fill a map of {height}×{width}; pass shape=(h, w)"
            )
        codes = self.regularization.get_codebook_entry(rearrange(inds, "b (h w) -> b h w", h=height), None)
        return self.model.decode(rearrange(codes, "b h w c -> b c h w"))
