"""CelebA-HQ and FFHQ; implemented in `taming.data.faceshq`, importable here because published configurations name it so."""

from taming.data.faceshq import CelebAHQTrain, CelebAHQValidation, FFHQTrain, FFHQValidation

__all__ = ["CelebAHQTrain", "CelebAHQValidation", "FFHQTrain", "FFHQValidation"]
