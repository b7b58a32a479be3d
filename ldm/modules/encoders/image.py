"""Images as vectors of CLIP, and the noise that unCLIP adds to them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.diffusionmodules.openaimodel import Timestep
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.diffusionmodules.util import drop_rows
from ldm.modules.encoders.openclip import OpenCLIPWeights, clip_model
from taming.checkpoint import CheckpointError, load_data

CLIP_SIZE = 224
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize(x: Tensor, size: int = CLIP_SIZE, antialias: bool = True) -> Tensor:
    """Bicubic, with the corners in place, as the published models see pictures.

    Args:
        x: (b, c, h, w).
        size: height and width of the result.
        antialias: blur first where the picture becomes smaller, by a Gaussian of (factor - 1) / 2 pixels.
    """
    from torchvision.transforms.functional import gaussian_blur

    factors = [side / size for side in x.shape[-2:]]
    if antialias and max(factors) > 1:
        sigmas = [max((factor - 1) / 2, 1e-3) for factor in factors]
        kernel = [int(max(4 * sigma, 3)) | 1 for sigma in sigmas]  # odd
        x = gaussian_blur(x, kernel[::-1], sigmas[::-1])  # torchvision wants the width first
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=True)


class ImageEncoder(OpenCLIPWeights):
    """A picture as one vector of CLIP.

    Args:
        antialias: blur before making a picture smaller.
        ucg_rate: share of the vectors that become zero, for guidance; also in eval mode, as published.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, antialias: bool = True, ucg_rate: float = 0.0) -> None:
        super().__init__()
        self.antialias, self.ucg_rate = antialias, ucg_rate
        self.register_buffer("mean", torch.tensor(CLIP_MEAN), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD), persistent=False)

    def needs(self, name: str) -> bool:
        """Of CLIP the visual tower alone is read."""
        return name.startswith("visual.")

    def preprocess(self, x: Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1] → (b, 3, 224, 224), normalised by CLIP's statistics.

        Raises:
            ValueError: not a batch of RGB pictures.
        """
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures must come as (b, 3, h, w), not {tuple(x.shape)}")
        x = (resize(x, antialias=self.antialias) + 1) / 2
        return (x - self.mean[:, None, None]) / self.std[:, None, None]

    def encode_with_vision_transformer(self, img: Tensor) -> Any:
        """(b, 3, h, w) in [-1, 1] → (b, d)."""
        self.ensure_weights()
        weight = next(self.model.visual.parameters())
        return self.model.visual(self.preprocess(img).to(weight))

    def forward(self, image: Tensor, no_dropout: bool = False) -> Any:
        """(b, 3, h, w) in [-1, 1] → (b, d)."""
        z = self.encode_with_vision_transformer(image)
        return z if no_dropout else self.dropped(z)

    def dropped(self, z: Tensor) -> Tensor:
        """Vectors (b, …), those of some pictures zero."""
        return z if self.ucg_rate == 0.0 else drop_rows(z, self.ucg_rate)

    def encode(self, image: Any) -> Tensor:
        """As `forward`."""
        return self(image)


class ClipImageEmbedder(ImageEncoder):
    """A picture as one vector of OpenAI's CLIP.

    Args:
        model: OpenAI's name, such as "ViT-L/14", or a folder (see `clip_model`).
        jit, device: accepted, as published; the work is done where the weights are.
        antialias, ucg_rate: see `ImageEncoder`.

    Source: Ramesh et al. 2022 (unCLIP); Radford et al. 2021.
    """

    def __init__(
        self,
        model: str,
        jit: bool = False,
        device: str = "cuda",
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__(antialias, ucg_rate)
        self.device = device
        self.build(*clip_model(model))


class FrozenClipImageEmbedder(ClipImageEmbedder):
    """As `ClipImageEmbedder`, under its older name: without blur and without dropout."""

    def __init__(self, model: str, jit: bool = False, device: str = "cuda", antialias: bool = False) -> None:
        super().__init__(model, jit, device, antialias)


class FrozenOpenCLIPImageEmbedder(ImageEncoder):
    """A picture as one vector of an open_clip model.

    Args:
        arch, version: see `OpenCLIPWeights`.
        device, max_length: accepted, as published.
        freeze: eval mode, no gradients.
        layer: "pooled", the only one.
        antialias, ucg_rate: see `ImageEncoder`.

    Raises:
        NotImplementedError: layer "penultimate".
        AssertionError: any other layer.

    Source: Cherti et al. 2023 (OpenCLIP).
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "pooled",
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        super().__init__(antialias, ucg_rate)
        if layer == "penultimate":
            raise NotImplementedError("layer='penultimate' is not defined for pictures; use 'pooled'")
        if layer != "pooled":
            raise AssertionError(f"layer={layer!r} is unknown; the only one is 'pooled'")
        self.device, self.max_length, self.layer = device, max_length, layer
        self.build(arch, version, without="transformer")
        if freeze:
            self.freeze()


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Noise on CLIP's image vectors, and its level as an embedding.

    Args:
        clip_stats_path: a file with the mean and the standard deviation of the vectors, (d,) or (1, d); noise is added
            to vectors standardised by them. Without it they are taken as they are. It is wanted at first use.
        timestep_dim: width of the embedded level.
        args, kwargs: see `ImageConcatWithNoiseAugmentation`.

    Source: Ramesh et al. 2022 (unCLIP); Ho et al. 2022 (conditioning augmentation).
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(
        self,
        *args: Any,
        clip_stats_path: str | os.PathLike[str] | None = None,
        timestep_dim: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("data_mean", torch.zeros(1, timestep_dim), persistent=False)
        self.register_buffer("data_std", torch.ones(1, timestep_dim), persistent=False)
        self._statistics = clip_stats_path
        if clip_stats_path is not None and Path(clip_stats_path).is_file():
            self.read_statistics()
        self.time_embed = Timestep(timestep_dim)

    def read_statistics(self) -> None:
        """Read the statistics' file, once.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it does not hold two tensors.
        """
        path, device = self._statistics, self.data_mean.device
        if path is None or device.type == "meta":
            return
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there are no statistics of CLIP's image vectors at {path}; put the published file there, or leave "
                "clip_stats_path out"
            )
        loaded = load_data(path, device)
        if not isinstance(loaded, list | tuple) or len(loaded) != 2:
            raise CheckpointError(f"{path} must hold two tensors: the mean and the standard deviation")
        self.data_mean, self.data_std = (t.reshape(1, -1) for t in loaded)
        self._statistics = None

    def scale(self, x: Tensor) -> Tensor:
        """Vectors (b, d) to zero mean and unit variance."""
        self.read_statistics()
        return (x - self.data_mean.to(x.device)) / self.data_std.to(x.device)

    def unscale(self, x: Tensor) -> Tensor:
        """The inverse of `scale`."""
        self.read_statistics()
        return x * self.data_std.to(x.device) + self.data_mean.to(x.device)

    def forward(self, x: Tensor, noise_level: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Vectors (b, d), and levels (b,) or random ones → noisy vectors (b, d), embedded levels (b, timestep_dim)."""
        z, level = super().forward(self.scale(x), noise_level=noise_level, **kwargs)
        return self.unscale(z), self.time_embed(level)
