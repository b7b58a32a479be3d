"""The patch discriminator; implemented in `taming.modules.discriminator.model`, importable here for existing code."""

from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from taming.modules.util import ActNorm

__all__ = ["ActNorm", "NLayerDiscriminator", "weights_init"]
