"""The discriminator's losses; implemented in `taming.modules.losses.adversarial`, importable here for existing code."""

from taming.modules.losses.adversarial import hinge_d_loss, vanilla_d_loss

__all__ = ["hinge_d_loss", "vanilla_d_loss"]
