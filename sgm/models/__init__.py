"""The models under short names, loaded when first asked for: `from sgm.models import AutoencoderKL, DiffusionModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from sgm.models.autoencoder import AutoencoderKL, AutoencodingEngine
    from sgm.models.diffusion import DiffusionEngine
    from sgm.models.notebook import DiffusionModel

__all__ = ["AutoencoderKL", "AutoencodingEngine", "DiffusionEngine", "DiffusionModel"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutoencoderKL": "sgm.models.autoencoder.AutoencoderKL",
        "AutoencodingEngine": "sgm.models.autoencoder.AutoencodingEngine",
        "DiffusionEngine": "sgm.models.diffusion.DiffusionEngine",
        "DiffusionModel": "sgm.models.notebook.DiffusionModel",
    },
)
