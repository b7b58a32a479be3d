"""LPIPS; implemented in `taming.modules.losses.lpips`, importable here for existing code."""

from taming.modules.losses.lpips import (
    LPIPS,
    NetLinLayer,
    ScalingLayer,
    normalize_tensor,
    spatial_average,
    vgg16,
)

__all__ = ["LPIPS", "NetLinLayer", "ScalingLayer", "normalize_tensor", "spatial_average", "vgg16"]
