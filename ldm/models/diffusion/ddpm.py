"""The published home of every diffusion model; each lives in a file of its own, with the models that it builds on below it."""

from ldm.models.diffusion.conditioned import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    Layout2ImgDiffusion,
)
from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.pixel import DDPM
from ldm.models.diffusion.upscale import LatentUpscaleDiffusion, LatentUpscaleFinetuneDiffusion
from ldm.models.diffusion.wrapper import DiffusionWrapper
from taming.util import disabled_train

__all__ = [
    "DDPM", "DiffusionWrapper", "ImageEmbeddingConditionedLatentDiffusion", "LatentDepth2ImageDiffusion", "LatentDiffusion",
    "LatentFinetuneDiffusion", "LatentInpaintDiffusion", "LatentUpscaleDiffusion", "LatentUpscaleFinetuneDiffusion",
    "Layout2ImgDiffusion", "disabled_train",
]  # fmt: skip
