"""Parts of another discretization's noise levels; implemented in `sgm.inference.helpers`, importable here as published."""

from sgm.inference.helpers import Img2ImgDiscretizationWrapper, Txt2NoisyDiscretizationWrapper

__all__ = ["Img2ImgDiscretizationWrapper", "Txt2NoisyDiscretizationWrapper"]
