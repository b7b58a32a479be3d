"""Weights of the denoising error; implemented in `sgm.modules.diffusionmodules.loss_weighting`, importable here as published."""

from sgm.modules.diffusionmodules.loss_weighting import EDMWeighting, EpsWeighting, UnitWeighting, VWeighting

__all__ = ["EDMWeighting", "EpsWeighting", "UnitWeighting", "VWeighting"]
