"""Networks, denoisers and samplers of the engine; the main names are loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taming import lazy_names

if TYPE_CHECKING:
    from sgm.modules.diffusionmodules.denoiser import Denoiser
    from sgm.modules.diffusionmodules.discretizer import Discretization
    from sgm.modules.diffusionmodules.loss import StandardDiffusionLoss
    from sgm.modules.diffusionmodules.model import Decoder, Encoder, Model
    from sgm.modules.diffusionmodules.openaimodel import UNetModel
    from sgm.modules.diffusionmodules.sampling import BaseDiffusionSampler
    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

__all__ = [
    "BaseDiffusionSampler", "Decoder", "Denoiser", "Discretization", "Encoder", "Model", "OpenAIWrapper", "StandardDiffusionLoss",
    "UNetModel",
]  # fmt: skip

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        name: f"{__name__}.{module}.{name}"
        for module, names in {
            "denoiser": ("Denoiser",),
            "discretizer": ("Discretization",),
            "loss": ("StandardDiffusionLoss",),
            "model": ("Decoder", "Encoder", "Model"),
            "openaimodel": ("UNetModel",),
            "sampling": ("BaseDiffusionSampler",),
            "wrappers": ("OpenAIWrapper",),
        }.items()
        for name in names
    },
)
