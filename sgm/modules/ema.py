"""Exponential moving average of weights; implemented in `taming.modules.ema`, importable here for existing code."""

from taming.modules.ema import LitEma

__all__ = ["LitEma"]
