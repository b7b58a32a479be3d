"""From a picture to what a depth network wants to see; each step takes a sample, a dict, and returns it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ldm.modules.image_degradation.resample import resize

# which of the two scales keeps the aspect ratio, and how sides are rounded to multiples
METHODS: dict[str, tuple[Callable[..., float], Callable[[float], int]]] = {
    "lower_bound": (max, math.ceil),
    "upper_bound": (min, math.floor),
    "minimal": (lambda *scales: min(scales, key=lambda scale: abs(1 - scale)), round),
}


class Resize:
    """Scales `image` (and `disparity`, `depth`, `mask`, if a sample has them) to sides that are multiples of a number.

    Args:
        width: target.
        height: target.
        resize_target: scale the maps, too, taking nearest values.
        keep_aspect_ratio: use one scale for both sides, which `resize_method` chooses.
        ensure_multiple_of: sides become multiples of this.
        resize_method: "lower_bound" (at least the target), "upper_bound" (at most) or "minimal" (as little as possible).
        image_interpolation_method: a mode of `ldm.modules.image_degradation.resample`.
    """

    def __init__(
        self,
        width: int,
        height: int,
        resize_target: bool = True,
        keep_aspect_ratio: bool = False,
        ensure_multiple_of: int = 1,
        resize_method: str = "lower_bound",
        image_interpolation_method: str = "area",
    ) -> None:
        if resize_method not in METHODS:
            raise ValueError(f"resize_method={resize_method!r} is unknown; choose one of {sorted(METHODS)}")
        self.width, self.height = width, height
        self.resize_target = resize_target
        self.keep_aspect_ratio, self.multiple = keep_aspect_ratio, ensure_multiple_of
        self.resize_method, self.mode = resize_method, image_interpolation_method

    def get_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that a picture of this size is scaled to."""
        choose, _ = METHODS[self.resize_method]
        scales = [self.width / width, self.height / height]
        if self.keep_aspect_ratio:
            scales = [choose(*scales)] * 2
        return self._multiple(scales[0] * width, self.width), self._multiple(scales[1] * height, self.height)

    def _multiple(self, side: float, target: int) -> int:
        """The nearest multiple; where that is on the wrong side of the target, the next one on the right side."""
        _, bounded = METHODS[self.resize_method]
        nearest = round(side / self.multiple) * self.multiple
        wrong = (self.resize_method == "lower_bound" and nearest < target) or (
            self.resize_method == "upper_bound" and nearest > target
        )
        return max(self.multiple, bounded(side / self.multiple) * self.multiple if wrong else nearest)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """(h, w, …) arrays → scaled ones."""
        width, height = self.get_size(sample["image"].shape[1], sample["image"].shape[0])
        sample["image"] = resize(sample["image"], height, width, self.mode)
        if self.resize_target:
            for name in ("disparity", "depth", "mask"):
                if name in sample:
                    sample[name] = resize(sample[name], height, width, "nearest")
        return sample


class NormalizeImage:
    """Subtracts a mean from each channel of `image` (h, w, c) and divides by a deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = np.array(mean), np.array(std)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """`image` normalised."""
        sample["image"] = (sample["image"] - self.mean) / self.std
        return sample


class PrepareForNet:
    """`image` (h, w, c) → (c, h, w); all arrays become contiguous float32."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Arrays as networks take them."""
        sample["image"] = np.ascontiguousarray(sample["image"].transpose(2, 0, 1), dtype=np.float32)
        for name in ("mask", "disparity", "depth"):
            if name in sample:
                sample[name] = np.ascontiguousarray(sample[name], dtype=np.float32)
        return sample
