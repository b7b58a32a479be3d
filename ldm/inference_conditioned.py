"""Sampling under a picture: its depth kept, its pixels enlarged, its embedding varied. One function for each kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.data.util import AddMiDaS
from ldm.inference import InferenceError, decode_images, encoded_texts, latent_shape, sample_images, to_image
from ldm.inference_images import (
    Start,
    beside_texts,
    latents_of,
    padded_to_step,
    redraw,
    size_step,
    to_pixels,
)
from ldm.models.diffusion.conditioned import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    stretch,
)
from ldm.models.diffusion.sampling_util import Noise
from ldm.models.diffusion.upscale import LatentUpscaleDiffusion

DEPTH_TYPE = "dpt_hybrid"  # of the published depth network, for one that does not say its type
RENOISED_LEVEL = 50  # of a mean of embeddings
KINDS = {
    "depth": (LatentDepth2ImageDiffusion, "keeps a picture's depth", "configs/stable-diffusion/v2-midas-inference.yaml"),
    "enlarge": (LatentUpscaleDiffusion, "enlarges pictures", "configs/stable-diffusion/x4-upscaling.yaml"),
    "vary": (
        ImageEmbeddingConditionedLatentDiffusion, "varies pictures by their embedding",
        "configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml",
    ),
}  # fmt: skip


def require_kind(model: Any, kind: str) -> None:
    """Refuse a model that cannot do a task of `KINDS`.

    Raises:
        InferenceError: says what it is, and which one would do.
    """
    wanted, does, config = KINDS[kind]
    if not isinstance(model, wanted):
        raise InferenceError(
            f"this is a {type(model).__name__}; a model that {does} is a {wanted.__name__}, such as that of {config}"
        )


@torch.no_grad()
def keep_depth(
    model: Any,
    image: Image.Image,
    prompt: str,
    negative_prompt: str = "",
    steps: int = 50,
    batch_size: int = 1,
    scale: float = 9.0,
    strength: float = 0.9,
    eta: float = 0.0,
    generator: Noise = None,
    verbose: bool = True,
) -> tuple[Image.Image, Tensor]:
    """Redraw a picture under a prompt, its depth kept.

    Args:
        model: a `LatentDepth2ImageDiffusion`.
        image: of any size.
        prompt, negative_prompt, scale: of the text.
        steps, strength, eta, generator, verbose: see `redraw`; strength 1 keeps nothing but the depth.
        batch_size: how many to draw.

    Returns:
        The depth as a grey picture, near is bright; and images (batch_size, 3, h, w) in [0, 1].

    Raises:
        InferenceError: a model of another kind, or a strength out of range.
        FloatingPointError: the latents became infinite or undefined.
    """
    require_kind(model, "depth")
    step = size_step(model)
    wide = padded_to_step(to_pixels(image), step, least=2 * step)
    estimate = AddMiDaS(getattr(model.depth_model, "model_type", DEPTH_TYPE))
    seen = torch.as_tensor(estimate({"jpg": wide[0].movedim(0, -1)})["midas_in"])[None].to(model.device)
    latents = latents_of(model, wide.to(model.device).repeat(batch_size, 1, 1, 1))
    depth = model.depth_model(seen)
    fixed = {"c_concat": [model.condition_of(depth, latents).repeat(batch_size, 1, 1, 1)]}
    c, uc = beside_texts(fixed, encoded_texts(model, [prompt] * batch_size, negative_prompt, scale != 1.0))
    made = redraw(
        model, latents, c, uc, scale, strength, steps, eta, generator, verbose, from_noise=True
    )  # fmt: skip
    grey = (stretch(depth)[0] + 1.0) / 2.0
    return to_image(grey.expand(3, -1, -1)).resize(image.size), made[..., : image.height, : image.width]


@torch.no_grad()
def enlarge(
    model: Any,
    sampler: Any,
    image: Image.Image,
    prompt: str,
    negative_prompt: str = "",
    steps: int = 75,
    batch_size: int = 1,
    scale: float = 10.0,
    noise_level: int = 20,
    eta: float = 0.0,
    generator: Noise = None,
    verbose: bool = True,
    start: Start = None,
) -> Tensor:
    """A small picture as a large one, under a prompt.

    Args:
        model: a `LatentUpscaleDiffusion`.
        sampler: one of `ldm.inference.SAMPLERS`, made for the model.
        image: of any size; its pixels are as many as the latents.
        prompt, negative_prompt, scale: of the text.
        steps, eta, generator, verbose: see `LatentSampler.sample`.
        batch_size: how many to draw.
        noise_level: how much noise the picture gets first: more leaves more to the model.
        start: see `Start`.

    Returns:
        (batch_size, 3, f h, f w) in [0, 1], f the factor of the first stage.

    Raises:
        InferenceError: a model of another kind, or a noise level out of range.
        FloatingPointError: the latents became infinite or undefined.
    """
    require_kind(model, "enlarge")
    most = model.low_scale_model.max_noise_level
    if not 0 <= noise_level <= most:
        raise InferenceError(
            f"noise level {noise_level} must lie between 0 (none) and {most}, what the model was trained for"
        )
    network = model.model.diffusion_model
    small = (
        padded_to_step(to_pixels(image), getattr(network, "ds", 1))
        .to(model.device)
        .repeat(batch_size, 1, 1, 1)
    )
    level = torch.full((batch_size,), noise_level, device=model.device)
    noised, level = model.low_scale_model(small, *[level] * (most > 0))
    fixed = {"c_concat": [noised], "c_adm": level}
    c, uc = beside_texts(fixed, encoded_texts(model, [prompt] * batch_size, negative_prompt, scale != 1.0))
    shape = (batch_size, model.channels, *small.shape[2:])
    samples, _ = sampler.sample(
        S=steps, batch_size=batch_size, shape=shape[1:], conditioning=c, eta=eta, verbose=verbose, generator=generator,
        unconditional_guidance_scale=scale, unconditional_conditioning=uc,
        x_T=None if start is None else start(shape).to(model.device),
    )  # fmt: skip
    # the published first stage overflows in half precision
    with torch.autocast(model.device.type, enabled=False):
        large = decode_images(model, samples.float())
    factor = large.shape[-1] // samples.shape[-1]
    return large[..., : factor * image.height, : factor * image.width]


def embedding_of(
    model: Any,
    images: Sequence[Image.Image],
    weights: Sequence[float],
    noise_level: int = 0,
    renoise: bool = False,
) -> Tensor:
    """The weighted mean of pictures' embeddings, each noised, as a condition (1, d).

    Args:
        model: an `ImageEmbeddingConditionedLatentDiffusion`.
        images: one or more.
        weights: one for each.
        noise_level: of each embedding, for models that know noise.
        renoise: noise the mean again, at level 50.

    Raises:
        InferenceError: a model of another kind, no pictures, other weights, or a noise level out of range.
    """
    require_kind(model, "vary")
    if not images or len(images) != len(weights) or sum(weights) == 0:
        raise InferenceError(
            f"{len(images)} pictures and weights {list(weights)}: give one or more pictures, and a weight for each"
        )
    augment, device = model.noise_augmentor, model.device
    if augment is not None and not 0 <= noise_level < augment.max_noise_level:
        raise InferenceError(
            f"noise level {noise_level} must lie between 0 and {augment.max_noise_level - 1}"
        )

    def noised(vector: Tensor, level: int) -> Tensor:
        if augment is None:
            return vector
        return torch.cat(augment(vector, noise_level=torch.full((1,), level, device=device)), dim=1)

    vectors = [noised(model.embedder(to_pixels(image).to(device)), noise_level) for image in images]
    mean = torch.stack([w * v for w, v in zip(weights, vectors, strict=True)]).sum(0) / sum(weights)
    if renoise and augment is not None:
        mean = noised(mean[:, : mean.shape[1] // 2], RENOISED_LEVEL)
    return mean


@torch.no_grad()
def vary(
    model: Any,
    sampler: Any,
    images: Sequence[Image.Image],
    weights: Sequence[float] | None = None,
    prompt: str = "",
    negative_prompt: str = "",
    steps: int = 20,
    batch_size: int = 1,
    scale: float = 10.0,
    noise_level: int = 0,
    renoise: bool = False,
    eta: float = 0.0,
    generator: Noise = None,
    verbose: bool = True,
    size: tuple[int | None, int | None] = (None, None),
) -> Tensor:
    """Variations of pictures, under a prompt or none.

    Args:
        model: an `ImageEmbeddingConditionedLatentDiffusion`.
        sampler: one of `ldm.inference.SAMPLERS`, made for the model.
        images, weights, noise_level, renoise: see `embedding_of`; equal weights if None.
        prompt, negative_prompt, scale: of the text; guidance leads away from a zero embedding, too.
        steps, eta, generator, verbose: see `LatentSampler.sample`.
        batch_size: how many to draw.
        size: height and width in pixels; the model's own if None.

    Returns:
        (batch_size, 3, height, width) in [0, 1].

    Raises:
        InferenceError: see `embedding_of`; a size that the first stage cannot make.
        FloatingPointError: the latents became infinite or undefined.

    Source: Ramesh et al. 2022 (unCLIP).
    """
    vector = embedding_of(
        model, images, [1.0] * len(images) if weights is None else weights, noise_level, renoise
    )
    vector = vector.repeat(batch_size, 1)
    texts = encoded_texts(model, [prompt] * batch_size, negative_prompt, scale != 1.0)
    c, uc = beside_texts({"c_adm": vector}, texts)
    if uc is not None:
        uc = {**uc, "c_adm": torch.zeros_like(vector)}
    shape = latent_shape(model, *size)
    return sample_images(
        model, sampler, steps, batch_size, shape, c, eta=eta, verbose=verbose, generator=generator,
        unconditional_guidance_scale=scale, unconditional_conditioning=uc,
    )  # fmt: skip
