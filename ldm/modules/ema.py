"""Exponential moving average of weights; implemented in `taming.modules.ema`, importable here for existing code."""

from taming.modules.ema import LitEma, ema_scope

__all__ = ["LitEma", "ema_scope"]
