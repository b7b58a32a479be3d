"""Embedders of the conditioner: classes, numbers, maps; those of texts and pictures live in the files beside this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders import modules as ldm_modules
from ldm.modules.encoders.modules import checked_labels
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.diffusionmodules.model import Encoder
from sgm.modules.diffusionmodules.openaimodel import Timestep
from sgm.modules.encoders.conditioner import AbstractEmbModel, GeneralConditioner
from sgm.modules.encoders.image import (
    FrozenOpenCLIPImageEmbedder,
    FrozenOpenCLIPImagePredictionEmbedder,
    VideoPredictionEmbedderWithEncoder,
)
from sgm.modules.encoders.text import (
    FrozenByT5Embedder,
    FrozenCLIPEmbedder,
    FrozenCLIPT5Encoder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    FrozenT5Embedder,
)
from sgm.util import instantiate_from_config
from taming.util import freeze, nearest

__all__ = [
    "AbstractEmbModel", "ClassEmbedder", "ClassEmbedderForMultiCond", "ConcatTimestepEmbedderND", "FrozenByT5Embedder",
    "FrozenCLIPEmbedder", "FrozenCLIPT5Encoder", "FrozenOpenCLIPEmbedder", "FrozenOpenCLIPEmbedder2",
    "FrozenOpenCLIPImageEmbedder", "FrozenOpenCLIPImagePredictionEmbedder", "FrozenT5Embedder", "GaussianEncoder",
    "GeneralConditioner", "IdentityEncoder", "InceptionV3", "LowScaleEncoder", "SpatialRescaler",
    "VideoPredictionEmbedderWithEncoder",
]  # fmt: skip


class IdentityEncoder(AbstractEmbModel):
    """A condition used as it is."""

    def encode(self, x: Any) -> Any:
        """x itself."""
        return x

    def forward(self, x: Any) -> Any:
        """x itself."""
        return x


class ClassEmbedder(AbstractEmbModel):
    """A learned vector for each class.

    Args:
        embed_dim: width.
        n_classes: number of classes.
        add_sequence_dim: give a context of one token, (b, 1, embed_dim), rather than a vector.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, add_sequence_dim: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)
        self.n_classes = n_classes
        self.add_sequence_dim = add_sequence_dim

    def forward(self, c: Tensor) -> Tensor:
        """Labels (b,) → (b, embed_dim).

        Raises:
            ValueError: a label outside 0 … n_classes - 1.
        """
        z = self.embedding(checked_labels(c, self.n_classes))
        return z[:, None] if self.add_sequence_dim else z

    def get_unconditional_conditioning(self, bs: int, device: Any = "cpu") -> dict[str, Tensor]:
        """A batch of the last class, for models that learned it as "no class".

        Raises:
            KeyError: the embedder has no input_key yet; it is set by the conditioner.
        """
        if self.input_key is None:
            raise KeyError("ClassEmbedder has no input_key; it is an option of the conditioner's entry")
        return {self.input_key: torch.full((bs,), self.n_classes - 1, device=device)}


class ClassEmbedderForMultiCond(ClassEmbedder):
    """A class embedder that answers with the batch, its labels replaced by their vectors."""

    def forward(
        self, batch: Mapping[str, Any], key: str | None = None, disable_dropout: bool = False
    ) -> dict[str, Any]:
        """Embed one entry of a batch.

        Args:
            batch: labels (b,) under the key, or a list of one tensor of labels, which then stays a list.
            key: the entry; input_key if None.
            disable_dropout: accepted, as published; nothing is dropped here.

        Raises:
            KeyError: the batch has no such entry.
        """
        key = self.input_key if key is None else key
        if key is None or key not in batch:
            raise KeyError(f"the batch has no labels under {key!r}. {nearest(str(key), batch)}")
        labels = batch[key]
        embedded = [super().forward(labels[0])] if isinstance(labels, list) else super().forward(labels)
        return {**batch, key: embedded}


class ConcatTimestepEmbedderND(AbstractEmbModel):
    """Each number as sines and cosines, as timesteps are, side by side.

    Args:
        outdim: width of one number.

    Source: Podell et al. 2023 (SDXL), section 2.2; Vaswani et al. 2017.
    """

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.timestep = Timestep(outdim)
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        """Numbers (b,) or (b, n) → (b, n · outdim).

        Raises:
            ValueError: more than two axes.
        """
        if x.ndim not in (1, 2):
            raise ValueError(f"numbers must come as (b,) or (b, n), not {tuple(x.shape)}")
        return self.timestep(x.flatten()).reshape(len(x), -1)


class SpatialRescaler(AbstractEmbModel, ldm_modules.SpatialRescaler):
    """Shrinks (or enlarges) an image several times, then maps its channels.

    Args:
        n_stages, method, multiplier, in_channels, out_channels, bias, kernel_size: see `ldm.modules.encoders.modules`.
        wrap_video: take videos, frame by frame.
        remap_output: map the channels even where out_channels is not given; their number stays.
    """

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        wrap_video: bool = False,
        kernel_size: int = 1,
        remap_output: bool = False,
    ) -> None:
        out_channels = in_channels if remap_output and out_channels is None else out_channels
        super().__init__(n_stages, method, multiplier, in_channels, out_channels, bias, kernel_size)
        self.wrap_video = wrap_video

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c', h', w'), or videos (b, c, f, h, w) → (b, c', f, h', w')."""
        if not (self.wrap_video and x.ndim == 5):
            return super().forward(x)
        frames = super().forward(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class GaussianEncoder(Encoder, AbstractEmbModel):
    """A trainable image encoder with a Gaussian bottleneck.

    The loss of the bottleneck comes beside the latents, so it is called on its own, not in a conditioner.

    Args:
        weight: of that loss; it is passed on.
        flatten_output: give a sequence.
        args, kwargs: see `taming.modules.diffusionmodules.model.Encoder`.
    """

    def __init__(self, weight: float = 1.0, flatten_output: bool = True, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.posterior = DiagonalGaussianRegularizer()
        self.weight, self.flatten_output = weight, flatten_output

    def forward(self, x: Tensor) -> tuple[dict[str, Any], Tensor]:
        """Images (b, c, h, w) → kl_loss, loss (the same) and weight; latents (b, h' · w', z) or (b, z, h', w')."""
        z, log = self.posterior(super().forward(x))
        z = z.flatten(2).transpose(1, 2) if self.flatten_output else z
        return {**log, "loss": log["kl_loss"], "weight": self.weight}, z


class LowScaleEncoder(AbstractEmbModel, ImageConcatWithNoiseAugmentation):
    """Latents of a small picture, noised at a random level that the network is told.

    Args:
        model_config: of an autoencoder; it is frozen.
        linear_start, linear_end, timesteps: of the noise schedule.
        max_noise_level: levels are drawn below it.
        output_size: height and width that the latents are brought to; None leaves them.
        scale_factor: latents are multiplied by it.
        beta_schedule, cosine_s: see `ldm.modules.diffusionmodules.util.make_beta_schedule`.

    Source: Ho et al. 2022, "Cascaded diffusion models", section 4.
    """

    model: Any

    def __init__(
        self,
        model_config: Mapping[str, Any],
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        timesteps: int = 1000,
        max_noise_level: int = 250,
        output_size: int | None = 64,
        scale_factor: float = 1.0,
        beta_schedule: str = "linear",
        cosine_s: float = 8e-3,
    ) -> None:
        schedule = {
            "beta_schedule": beta_schedule, "timesteps": timesteps, "linear_start": linear_start, "linear_end": linear_end,
            "cosine_s": cosine_s,
        }  # fmt: skip
        super().__init__(schedule, max_noise_level)
        self.model = freeze(instantiate_from_config(model_config))
        self.output_size, self.scale_factor = output_size, scale_factor

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pictures (b, c, h, w), and levels (b,) or random ones → noised latents (b, z, h', w'), levels (b,)."""
        z = self.model.encode(x)
        z = z.sample() if isinstance(z, DiagonalGaussianDistribution) else z
        z, noise_level = super().forward(self.scale_factor * z, noise_level)
        if self.output_size is not None:
            z = F.interpolate(z, size=self.output_size, mode="nearest-exact")
        return z, noise_level

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pictures."""
        return self.model.decode(z / self.scale_factor)


class InceptionV3(AbstractEmbModel):
    """A picture as one vector of the Inception network that FID is measured with.

    Args:
        normalize_input: pictures come in [0, 1] rather than in [-1, 1].
        kwargs: see `pytorch_fid.inception.InceptionV3`; pictures are resized to 299² unless resize_input is False.

    Raises:
        ImportError: pytorch_fid is not installed.
    """

    def __init__(self, normalize_input: bool = False, **kwargs: Any) -> None:
        super().__init__()
        try:
            from pytorch_fid import inception
        except ImportError as error:
            raise ImportError("InceptionV3 needs pytorch_fid: python -m pip install pytorch-fid") from error
        self.model = inception.InceptionV3(normalize_input=normalize_input, **kwargs)

    def forward(self, inp: Tensor) -> Tensor | list[Tensor]:
        """(b, 3, h, w) → (b, d); a map (b, d, h', w') of an earlier block, or a list of several blocks' maps."""
        out = self.model(inp)
        return out[0].squeeze(-1).squeeze(-1) if len(out) == 1 else out
