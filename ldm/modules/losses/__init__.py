"""Losses of the first stages of latent diffusion."""

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator
from ldm.modules.losses.reconstruction import ReconstructionWithKL

__all__ = ["LPIPSWithDiscriminator", "ReconstructionWithKL"]
