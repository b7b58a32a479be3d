"""What the pages share: models by name, both stages of SDXL, turbo models, the content filter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ldm.inference import InferenceError, choose_device
from scripts.util.detection.nsfw_and_watermark_dectection import DeepFloydDataFiltering
from sgm.inference.api import ModelArchitecture, SamplingParams, SamplingPipeline, find_config
from sgm.inference.helpers import Filter, do_sample
from sgm.modules.diffusionmodules.sampling import EulerAncestralSampler
from sgm.util import load_model_from_config
from taming.util import nearest

logger = logging.getLogger(__name__)

BASES = {
    "SDXL-base-1.0": ModelArchitecture.SDXL_V1_BASE,
    "SDXL-base-0.9": ModelArchitecture.SDXL_V0_9_BASE,
    "SD-2.1": ModelArchitecture.SD_2_1,
    "SD-2.1-768": ModelArchitecture.SD_2_1_768,
}
REFINERS = {
    "SDXL-refiner-1.0": ModelArchitecture.SDXL_V1_REFINER,
    "SDXL-refiner-0.9": ModelArchitecture.SDXL_V0_9_REFINER,
}
REFINER_STRENGTH = 0.15
# heights and widths that SDXL was trained with, by their ratio (Podell et al. 2023, appendix I)
RATIOS = {
    "0.5": (704, 1408), "0.52": (704, 1344), "0.57": (768, 1344), "0.6": (768, 1280), "0.68": (832, 1216), "0.72": (832, 1152),
    "0.78": (896, 1152), "0.82": (896, 1088), "0.88": (960, 1088), "0.94": (960, 1024), "1.0": (1024, 1024), "1.07": (1024, 960),
    "1.13": (1088, 960), "1.21": (1088, 896), "1.29": (1152, 896), "1.38": (1152, 832), "1.46": (1216, 832), "1.67": (1280, 768),
    "1.75": (1344, 768), "1.91": (1344, 704), "2.0": (1408, 704), "2.09": (1472, 704), "2.4": (1536, 640), "2.5": (1600, 640),
    "2.89": (1664, 576), "3.0": (1728, 576),
}  # fmt: skip
# configuration, weights, side of the images
TURBO = {
    "SDXL-Turbo": ("sd_xl_base.yaml", "checkpoints/sd_xl_turbo_1.0.safetensors", 512),
    "SD-Turbo": ("sd_2_1.yaml", "checkpoints/sd_turbo.safetensors", 512),
}
SUBSTEPS = (0, 100, 200, 300)  # of 1000 noise levels, from the highest


@cache
def load_pipeline(name: str, device: str = "auto") -> SamplingPipeline:
    """A model for images, loaded once.

    Raises:
        InferenceError: an unknown name.
        FileNotFoundError: its weights are missing.
    """
    known = {**BASES, **REFINERS}
    if name not in known:
        raise InferenceError(f"there is no model {name!r}. {nearest(name, known)}")
    return SamplingPipeline(known[name], device=str(choose_device(device)))


@cache
def content_filter(device: str = "auto") -> Filter | None:
    """The filter of unsafe images; without its weights none, which is said once."""
    try:
        return DeepFloydDataFiltering(device=choose_device(device))
    except FileNotFoundError as error:
        logger.warning("Images are not filtered: %s", error)
        return None


def draw(
    base: Any,
    params: SamplingParams,
    prompt: str,
    negative_prompt: str = "",
    samples: int = 1,
    image: Tensor | None = None,
    refiner: Any = None,
    strength: float = REFINER_STRENGTH,
    finish_denoising: bool = True,
    filter: Filter | None = None,
) -> Tensor:
    """Images by one stage or by two.

    Args:
        base: a `SamplingPipeline`.
        params: of both stages.
        prompt, negative_prompt: texts.
        samples: how many.
        image: (1, 3, h, w) in [-1, 1], to be redrawn as far as `params.img2img_strength` says.
        refiner: the second stage's pipeline, if there is to be one.
        strength: share of the way that the second stage walks.
        finish_denoising: the first stage leaves that share to the second; otherwise it finishes, and noise is added anew.
        filter: is called with the images.

    Returns:
        (samples, 3, h, w) in [0, 1].
    """
    left = strength if refiner is not None and finish_denoising and image is None else 0.0
    options = {} if image is not None else {"left_to_refiner": left}
    first = [params] if image is None else [params, image]
    make = base.text_to_image if image is None else base.image_to_image
    if refiner is None:
        return make(*first, prompt, negative_prompt, samples, filter=filter)
    _, latents = make(*first, prompt, negative_prompt, samples, return_latents=True, **options)
    second = replace(params, img2img_strength=strength)
    return refiner.refiner(
        second, latents, prompt, negative_prompt, samples, filter=filter, add_noise=not left
    )


# ---------------------------------------------------------------------------------------------------------------- turbo


class SubstepSampler(EulerAncestralSampler):
    """One to four large steps, along some of the noise levels of a finer discretization.

    Args:
        n_sample_steps: how many.

    The other arguments are those of `EulerAncestralSampler`; `num_steps` counts the levels to choose from.

    Raises:
        ValueError: another number of steps.

    Source: Sauer et al. 2023 (Adversarial diffusion distillation).
    """

    def __init__(self, n_sample_steps: int = 1, *args: Any, **kwargs: Any) -> None:
        if not 1 <= n_sample_steps <= len(SUBSTEPS):
            raise ValueError(f"{n_sample_steps} steps asked for; choose from 1 to {len(SUBSTEPS)}")
        super().__init__(*args, **{"num_steps": 1000, **kwargs})
        self.n_sample_steps = n_sample_steps

    def prepare_sampling_loop(
        self, x: Tensor, cond: Any, uc: Any = None, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int, Any, Any]:
        """See `BaseDiffusionSampler`; the highest level is always among them, and so is the 0 at the end."""
        x, s_in, sigmas, _, cond, uc = super().prepare_sampling_loop(x, cond, uc, num_steps)
        sigmas = sigmas[[*SUBSTEPS[: self.n_sample_steps], -1]]
        return x, s_in, sigmas, len(sigmas), cond, uc


def seeded_randn(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise that only the seed decides, on any machine."""
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


class SeededNoise:
    """Noise for each step, from the seeds `seed` + 1, + 2, …"""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of x's shape."""
        self.seed += 1
        return seeded_randn(x.shape, self.seed).to(x)


@cache
def load_turbo(name: str, device: str = "auto") -> Any:
    """A turbo model, loaded once.

    Raises:
        InferenceError: an unknown name, or its weights are missing.
    """
    if name not in TURBO:
        raise InferenceError(f"there is no model {name!r}. {nearest(name, TURBO)}")
    config, weights, _ = TURBO[name]
    if not Path(weights).is_file():
        raise InferenceError(f"there are no weights {weights}; put them there")
    loaded = OmegaConf.load(find_config("configs/inference", config))
    return load_model_from_config(loaded, weights).to(choose_device(device))


def draw_turbo(
    model: Any, prompt: str, seed: int, steps: int = 1, side: int = 512, filter: Filter | None = None
) -> Tensor:
    """An image in one to four steps, (1, 3, side, side) in [0, 1]; the seed alone decides it."""
    levels = "sgm.modules.diffusionmodules.discretizer.LegacyDDPMDiscretization"
    sampler = SubstepSampler(steps, discretization_config={"target": levels}, s_noise=1.0, eta=1.0)
    sampler.noise_sampler = SeededNoise(seed)
    values = {"prompt": prompt, "negative_prompt": "", "crop_coords_top": 0, "crop_coords_left": 0}
    for name in ("height", "width"):
        values |= {f"orig_{name}": side, f"target_{name}": side}
    noise = seeded_randn((1, 4, side // 8, side // 8), seed)
    return do_sample(model, sampler, values, 1, side, side, 4, 8, filter=filter, noise=noise)  # type: ignore[return-value]
