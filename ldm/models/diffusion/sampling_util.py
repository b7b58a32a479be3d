"""Bounds for estimates of x_0 while sampling."""

from __future__ import annotations

from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """Append axes of length 1 until there are `target_dims`.

    Raises:
        ValueError: there are more already.
    """
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"a tensor of {x.ndim} axes cannot be given {target_dims}")
    return x[(...,) + (None,) * missing]


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each sample down so that its root mean square is at most `value`."""
    rms = x0.pow(2).flatten(1).mean(dim=1).sqrt().clamp(min=value)
    return x0 * (value / append_dims(rms, x0.ndim))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each position down so that the root mean square of its channels is at most `value`."""
    rms = x0.pow(2).mean(dim=1, keepdim=True).sqrt().clamp(min=value)
    return x0 * (value / rms)
