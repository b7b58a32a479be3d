"""Learning-rate multipliers; implemented in `ldm.lr_scheduler`, importable here for existing configurations."""

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2

__all__ = ["LambdaLinearScheduler", "LambdaWarmUpCosineScheduler", "LambdaWarmUpCosineScheduler2"]
