"""From values such as a prompt and a size to images: batches, sampling, the watermark, saving."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm import watermark
from ldm.inference import next_number, precision_scope, save_png, to_image
from sgm.modules.diffusionmodules.discretizer import Discretization
from sgm.util import append_dims
from taming.data.images import to_float
from taming.util import nearest

__all__ = [
    "WATERMARK_BITS", "WATERMARK_MESSAGE", "Img2ImgDiscretizationWrapper", "Txt2NoisyDiscretizationWrapper", "WatermarkEmbedder", "do_img2img", "do_sample",
    "embed_watermark", "get_batch", "get_input_image_tensor", "get_unique_embedder_keys_from_conditioner", "perform_save_locally",
]  # fmt: skip

logger = logging.getLogger(__name__)

WATERMARK_MESSAGE = 0b101100111110110010010000011110111011000110011110
WATERMARK_BITS = [int(bit) for bit in f"{WATERMARK_MESSAGE:b}"]
SIZE_STEP = 64  # pixels by which the sides of a picture to begin with may grow

Filter = Callable[[Tensor], Tensor]
Builder = Callable[[Mapping[str, Any], Sequence[int], Any], tuple[Any, Any]]


# ----------------------------------------------------------------------------------------------------------- watermark


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


class WatermarkEmbedder:
    """Writes bits into images; see `ldm.watermark`.

    Args:
        watermark: zeros and ones.
    """

    def __init__(self, watermark: Sequence[int]) -> None:
        self.watermark = list(watermark)

    def __call__(self, image: Tensor) -> Tensor:
        """Images (b, 3, h, w) or (n, b, 3, h, w) in [0, 1] → the same, marked; those below 256² pixels stay as they are."""
        height, width = image.shape[-2:]
        if not watermark.is_large_enough(height, width):
            _say_once(f"images of {width}x{height} pixels are too small for a watermark: they get none")
            return image
        pictures = (255 * image.detach().float()).flatten(0, -4).permute(0, 2, 3, 1).flip(-1).cpu().numpy()
        marked = np.stack([watermark.embed(picture, self.watermark) for picture in pictures])
        out = torch.from_numpy(marked).flip(-1).permute(0, 3, 1, 2).reshape(image.shape) / 255
        return out.clamp(0.0, 1.0).to(image)


embed_watermark = WatermarkEmbedder(WATERMARK_BITS)


def perform_save_locally(save_path: str | Path, samples: Tensor) -> list[Path]:
    """Write images (b, 3, h, w) in [0, 1] as 000000000.png, …, with the watermark; nothing is overwritten. Returns the paths."""
    folder = Path(save_path)
    number = next_number(folder, r"(\d+)\.png")
    paths = [folder / f"{number + i:09}.png" for i in range(len(samples))]
    for path, image in zip(paths, embed_watermark(samples), strict=True):
        save_png(to_image(image), path)
    return paths


# -------------------------------------------------------------------------------------------------------------- batches


def get_unique_embedder_keys_from_conditioner(conditioner: Any) -> list[str]:
    """The entries of a batch that a conditioner reads, each once."""
    keys: dict[str, None] = {}
    for embedder in conditioner.embedders:
        own = embedder.input_key
        keys.update(dict.fromkeys([own] if own is not None else getattr(embedder, "input_keys", None) or ()))
    return list(keys)


def _value(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise KeyError(f"the conditioner needs the value {key!r}. {nearest(key, values)}")
    return values[key]


def _texts(values: Mapping[str, Any], shape: Sequence[int], device: Any) -> tuple[Any, Any]:
    texts = (_value(values, "prompt"), values.get("negative_prompt") or "")
    positive, negative = (np.full(tuple(shape), text, dtype=object).tolist() for text in texts)
    return positive, negative


def _numbers(*keys: str, negative: str | None = None) -> Builder:
    """Values side by side, for each sample; the negative condition may have its own."""

    def build(values: Mapping[str, Any], shape: Sequence[int], device: Any) -> tuple[Tensor, Tensor]:
        def rows(names: Iterable[str]) -> Tensor:
            return torch.tensor([_value(values, name) for name in names], device=device).repeat(*shape, 1)

        positive = rows(keys)
        return positive, positive.clone() if negative is None else rows([negative])

    return build


BUILDERS: dict[str, Builder] = {
    "txt": _texts,
    "original_size_as_tuple": _numbers("orig_height", "orig_width"),
    "crop_coords_top_left": _numbers("crop_coords_top", "crop_coords_left"),
    "aesthetic_score": _numbers("aesthetic_score", negative="negative_aesthetic_score"),
    "target_size_as_tuple": _numbers("target_height", "target_width"),
}


def get_batch(
    keys: Iterable[str],
    value_dict: Mapping[str, Any],
    N: int | Sequence[int],
    device: Any = "cpu",
    builders: Mapping[str, Builder] = BUILDERS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch for the conditioner, and one for the negative condition.

    Args:
        keys: entries that the conditioner reads.
        value_dict: prompt, negative_prompt, orig_height, …; an entry that no builder makes is taken as it is.
        N: number of samples, or the shape of the batch.
        device: of the tensors.
        builders: how entries are made.

    Raises:
        KeyError: a value is missing.
    """
    shape = [N] if isinstance(N, int) else list(N)
    batch: dict[str, Any] = {}
    batch_uc: dict[str, Any] = {}
    for key in keys:
        if key in builders:
            batch[key], batch_uc[key] = builders[key](value_dict, shape, device)
        else:
            batch[key] = _value(value_dict, key)
            if isinstance(batch[key], Tensor):
                batch[key] = batch[key].to(device)
                batch_uc[key] = batch[key].clone()
    return batch, batch_uc


def get_input_image_tensor(image: Image.Image, device: Any = "cpu") -> Tensor:
    """A picture as (1, 3, h, w) in [-1, 1], its sides reduced to multiples of 64.

    Raises:
        ValueError: a side is shorter than that.
    """
    size = (image.width // SIZE_STEP * SIZE_STEP, image.height // SIZE_STEP * SIZE_STEP)
    if 0 in size:
        raise ValueError(
            f"a picture of {image.width}x{image.height} pixels is too small: both sides must reach {SIZE_STEP}"
        )
    if size != image.size:
        logger.info("%dx%d pixels become %dx%d, multiples of %d", *image.size, *size, SIZE_STEP)
    pixels = to_float(image.resize(size).convert("RGB"))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(device)


# ------------------------------------------------------------------------------------------------------------- sampling


class Img2ImgDiscretizationWrapper(Discretization):
    """The last part of another discretization's noise levels: from where a picture is redrawn.

    Args:
        discretization: the other one.
        strength: how much of it is walked, from 0 (one level) to 1 (all).

    Raises:
        ValueError: another strength.

    Source: Meng et al. 2022 (SDEdit).
    """

    def __init__(self, discretization: Discretization, strength: float = 1.0) -> None:
        if not 0.0 <= strength <= 1.0:
            raise ValueError(
                f"strength={strength} must lie between 0 (nothing changes) and 1 (everything may)"
            )
        self.discretization, self.strength = discretization, strength

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Levels, descending; the share is of all, the 0 at the end counted."""
        sigmas = self.discretization(*args, **kwargs)
        return sigmas[len(sigmas) - max(int(self.strength * len(sigmas)), 1) :]

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """Those of the other one, all of them."""
        return self.discretization.get_sigmas(n, device)


class Txt2NoisyDiscretizationWrapper(Discretization):
    """All noise levels but the lowest: latents stay as noisy as a refiner of this strength expects them.

    Args:
        discretization: the other one.
        strength: of the refiner, from 0 to 1.
        original_steps: of the whole way, if the discretization is asked for another number.

    Raises:
        ValueError: another strength.

    Source: Podell et al. 2023 (SDXL), section 2.5; Balaji et al. 2022 (eDiff-I).
    """

    def __init__(
        self, discretization: Discretization, strength: float = 0.0, original_steps: int | None = None
    ) -> None:
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength={strength} must lie between 0 (everything is drawn) and 1")
        self.discretization, self.strength, self.original_steps = discretization, strength, original_steps

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Levels, descending."""
        sigmas = self.discretization(*args, **kwargs)
        steps = len(sigmas) if self.original_steps is None else self.original_steps + 1
        pruned = max(min(int(self.strength * steps) - 1, steps - 1), 0)
        return sigmas[: max(len(sigmas) - pruned, 0)]

    def get_sigmas(self, n: int, device: Any = "cpu") -> Tensor:
        """Those of the other one, all of them."""
        return self.discretization.get_sigmas(n, device)


def home_of(model: Any, device: Any = None) -> torch.device:
    """The device asked for, or where the model is."""
    return torch.device(device if device is not None else getattr(model, "device", "cpu"))


def conditions(
    model: Any,
    batch: dict[str, Any],
    batch_uc: dict[str, Any],
    num_samples: int,
    force_uc_zero_embeddings: Sequence[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The condition and the unconditional one; all but sequences are cut to the number of samples."""
    pair = model.conditioner.get_unconditional_conditioning(
        batch, batch_uc=batch_uc, force_uc_zero_embeddings=list(force_uc_zero_embeddings or ())
    )
    c, uc = ({k: v if k == "crossattn" else v[:num_samples] for k, v in cond.items()} for cond in pair)
    return c, uc


def _finish(
    model: Any, latents: Tensor, return_latents: bool, filter: Filter | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Images in [0, 1] of latents, filtered, and the latents if wanted."""
    images = ((model.decode_first_stage(latents) + 1.0) / 2.0).clamp(0.0, 1.0)
    images = images if filter is None else filter(images)
    return (images, latents) if return_latents else images


@torch.no_grad()
def do_sample(
    model: Any,
    sampler: Any,
    value_dict: Mapping[str, Any],
    num_samples: int | Sequence[int],
    H: int,
    W: int,
    C: int,
    F: int,
    force_uc_zero_embeddings: Sequence[str] | None = None,
    batch2model_input: Sequence[str] | None = None,
    return_latents: bool = False,
    filter: Filter | None = None,
    device: Any = None,
    noise: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Images from noise.

    Args:
        model: a `DiffusionEngine`.
        sampler: one of `sgm.modules.diffusionmodules.sampling`.
        value_dict: see `get_batch`.
        num_samples: images, or the shape of a batch of them.
        H, W: of the images in pixels.
        C, F: channels of the latents, and factor of the first stage.
        force_uc_zero_embeddings: entries whose unconditional embedding is zero.
        batch2model_input: entries of the batch that the network is given, too.
        return_latents: give them, too.
        filter: is called with the images.
        device: where to compute; where the model is if None.
        noise: to begin with, (b, C, H / F, W / F); drawn on the CPU if None, so that a seed gives the same on every device.

    Returns:
        (b, 3, H, W) in [0, 1], and the latents if wanted.
    """
    home, shape = home_of(model, device), [num_samples] if isinstance(num_samples, int) else list(num_samples)
    count = math.prod(shape)
    with precision_scope(home), model.ema_scope():
        keys = get_unique_embedder_keys_from_conditioner(model.conditioner)
        wanted = [*keys, *(k for k in batch2model_input or () if k not in keys)]
        batch, batch_uc = get_batch(wanted, value_dict, shape, home)
        c, uc = conditions(model, batch, batch_uc, count, force_uc_zero_embeddings)
        extra = {key: batch[key] for key in batch2model_input or ()}
        noise = torch.randn(count, C, H // F, W // F) if noise is None else noise
        latents = sampler(denoiser_of(model, **extra), noise.to(home), cond=c, uc=uc)
        return _finish(model, latents, return_latents, filter)


@torch.no_grad()
def do_img2img(
    img: Tensor,
    model: Any,
    sampler: Any,
    value_dict: Mapping[str, Any],
    num_samples: int,
    force_uc_zero_embeddings: Sequence[str] = (),
    additional_kwargs: Mapping[str, Any] | None = None,
    offset_noise_level: float = 0.0,
    return_latents: bool = False,
    skip_encode: bool = False,
    filter: Filter | None = None,
    device: Any = None,
    add_noise: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Images like others: these are noised to the sampler's first level, and denoised from there.

    Args:
        img: images (b, 3, h, w) in [-1, 1], or latents; one is repeated for all samples.
        model, sampler, value_dict, num_samples, force_uc_zero_embeddings, return_latents, filter, device: see `do_sample`. The
            sampler's discretization says how far the images are noised: see `Img2ImgDiscretizationWrapper`.
        additional_kwargs: entries added to both conditions.
        offset_noise_level: strength of further noise that is constant over each image.
        skip_encode: `img` are latents.
        add_noise: False for latents that are as noisy already, see `Txt2NoisyDiscretizationWrapper`.

    Returns:
        See `do_sample`.
    """
    home = home_of(model, device)
    with precision_scope(home), model.ema_scope():
        keys = get_unique_embedder_keys_from_conditioner(model.conditioner)
        batch, batch_uc = get_batch(keys, value_dict, num_samples, home)
        c, uc = conditions(model, batch, batch_uc, num_samples, force_uc_zero_embeddings)
        c, uc = {**c, **(additional_kwargs or {})}, {**uc, **(additional_kwargs or {})}
        z = img.to(home) if skip_encode else model.encode_first_stage(img.to(home))
        z = z.expand(num_samples, *z.shape[1:]) if len(z) == 1 else z
        noise = torch.randn_like(z)
        if offset_noise_level > 0.0:
            noise = noise + offset_noise_level * append_dims(torch.randn(len(z), device=home), z.ndim)
        sigma = sampler.discretization(sampler.num_steps)[0].to(z)
        # the sampler takes noise of unit variance and multiplies by this number
        start = (z + noise * sigma if add_noise else z) / (1.0 + sigma**2).sqrt()
        latents = sampler(denoiser_of(model), start, cond=c, uc=uc)
        return _finish(model, latents, return_latents, filter)


def denoiser_of(model: Any, **extra: Any) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A model as a function (x, σ, condition) → x_0; `extra` goes to the network."""
    return lambda x, sigma, c: model.denoiser(model.model, x, sigma, c, **extra)
