"""The models under short names, loaded when first asked for: `from ldm.models import LatentDiffusion`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
    from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion

__all__ = ["DDPM", "AutoencoderKL", "LatentDiffusion", "VQModelInterface"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoencoderKL": "ldm.models.autoencoder.AutoencoderKL",
        "DDPM": "ldm.models.diffusion.ddpm.DDPM",
        "LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "VQModelInterface": "ldm.models.autoencoder.VQModelInterface",
    },
)
