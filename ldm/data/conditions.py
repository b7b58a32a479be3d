"""Pictures that a model is conditioned on, made from the images of any data set: masks for inpainting, small twins for enlarging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator

from taming.data.base import DelegatingDataset
from taming.data.images import INTERPOLATIONS, imscale
from taming.util import instantiate_from_config, nearest


def _uniform(low: float, high: float, generator: Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _box(canvas: ImageDraw.ImageDraw, side: tuple[int, int], generator: Generator | None) -> None:
    """A rectangle of a third to two thirds of each side, anywhere."""
    spans = []
    for length in side:
        size = _uniform(1 / 3, 2 / 3, generator) * length
        start = _uniform(0, length - size, generator)
        spans.append((round(start), round(start + size) - 1))
    (left, right), (top, bottom) = spans
    canvas.rectangle((left, top, right, bottom), fill=255)


def _edge(canvas: ImageDraw.ImageDraw, side: tuple[int, int], generator: Generator | None) -> None:
    """A third to a half of the picture, from one of its four edges on."""
    width, height = side
    share = _uniform(1 / 3, 1 / 2, generator)
    across, down = round(share * width), round(share * height)
    corners = (
        (0, 0, across - 1, height - 1), (width - across, 0, width - 1, height - 1),
        (0, 0, width - 1, down - 1), (0, height - down, width - 1, height - 1),
    )  # fmt: skip
    canvas.rectangle(corners[int(torch.randint(4, (), generator=generator))], fill=255)


def _stroke(canvas: ImageDraw.ImageDraw, side: tuple[int, int], generator: Generator | None) -> None:
    """A brush of an eighth to a quarter of the shorter side, led over three to five places."""
    breadth = round(min(side) * _uniform(1 / 8, 1 / 4, generator))
    places = [
        tuple(_uniform(0, length, generator) for length in side)
        for _ in range(3 + int(torch.randint(3, (), generator=generator)))
    ]
    canvas.line(places, fill=255, width=breadth)
    for x, y in places:  # round ends and joints
        canvas.ellipse((x - breadth / 2, y - breadth / 2, x + breadth / 2, y + breadth / 2), fill=255)


MASKS: dict[str, Callable[[ImageDraw.ImageDraw, tuple[int, int], Generator | None], None]] = {
    "box": _box, "edge": _edge, "stroke": _stroke,
}  # fmt: skip


def random_mask(
    height: int, width: int, kinds: Sequence[str] = tuple(MASKS), generator: Generator | None = None
) -> np.ndarray:
    """A mask (height, width, 1) float32: 1 where something is hidden, 0 elsewhere.

    Args:
        height, width: of the mask.
        kinds: keys of `MASKS`, one of which is drawn.
        generator: source of the randomness; torch's global one if None.
    """
    drawing = Image.new("L", (width, height))
    kind = kinds[int(torch.randint(len(kinds), (), generator=generator))]
    MASKS[kind](ImageDraw.Draw(drawing), (width, height), generator)
    return (np.asarray(drawing) > 0).astype(np.float32)[..., None]


class ConditionedImages(DelegatingDataset):
    """A data set whose items are those of another one and what `condition` makes of their image.

    Args:
        dataset: a data set, or its configuration; its items are dicts.
        image_key: entry with the image, (h, w, c) float32 in [-1, 1].
    """

    def __init__(self, dataset: Any, image_key: str = "image") -> None:
        self.data = instantiate_from_config(dataset) if isinstance(dataset, Mapping) else dataset
        self.image_key = image_key

    def __getitem__(self, i: int) -> dict[str, Any]:
        """An item with its condition.

        Raises:
            KeyError: it has no image.
        """
        item = super().__getitem__(i)
        if self.image_key not in item:
            raise KeyError(f"item {i} has no {self.image_key!r}. {nearest(self.image_key, item)}")
        return {**item, **self.condition(np.asarray(item[self.image_key]), i)}

    def condition(self, image: np.ndarray, i: int) -> dict[str, np.ndarray]:
        """Further entries for item i."""
        raise NotImplementedError(f"{type(self).__name__} must define condition(image, i)")


class MaskedImages(ConditionedImages):
    """Images with a part to fill: each item gets `mask` (h, w, 1), 1 where hidden, and `masked_image`, grey (0) there.

    Args:
        dataset, image_key: see `ConditionedImages`.
        kinds: of masks, keys of `MASKS`.
        seed: masks that depend on it and on the item's number alone; None draws new ones each time.

    Raises:
        ValueError: unknown kinds, or none.
    """

    def __init__(
        self,
        dataset: Any,
        kinds: Sequence[str] = tuple(MASKS),
        seed: int | None = None,
        image_key: str = "image",
    ) -> None:
        if not kinds:
            raise ValueError(f"kinds is empty; choose from {', '.join(MASKS)}")
        for kind in kinds:
            if kind not in MASKS:
                raise ValueError(f"mask {kind!r} is unknown. {nearest(kind, MASKS)}")
        super().__init__(dataset, image_key)
        self.kinds, self.seed = list(kinds), seed

    def condition(self, image: np.ndarray, i: int) -> dict[str, np.ndarray]:
        """The mask, and the image without what it hides."""
        generator = None
        if self.seed is not None:
            # mixed, because a generator takes 32 bits of what it is given
            mixed = np.random.SeedSequence([self.seed, i]).generate_state(1)
            generator = Generator().manual_seed(int(mixed[0]))
        height, width = image.shape[:2]
        mask = random_mask(height, width, self.kinds, generator)
        return {"mask": mask, "masked_image": np.where(mask > 0, np.float32(0.0), image)}


class SmallTwins(ConditionedImages):
    """Images to enlarge: each item gets `LR_image`, the image shrunk by `factor` (bicubic, smoothed, in 8 bits).

    Args:
        dataset, image_key: see `ConditionedImages`.
        factor: sides are divided by it.
        enlarge: add `LR_enlarged`, too: that again in the image's size, by this interpolation (nearest, bilinear, …), for
            models that want both in one size.

    Raises:
        ValueError: a factor below 2, an unknown interpolation, or (when called) a factor that does not divide the image's sides.
    """

    def __init__(
        self, dataset: Any, factor: int = 2, enlarge: str | None = None, image_key: str = "image"
    ) -> None:
        if factor < 2:
            raise ValueError(f"factor={factor} does not shrink; it must be 2 or more")
        if enlarge is not None and enlarge not in INTERPOLATIONS:
            raise ValueError(f"enlarge={enlarge!r} is unknown; choose one of {sorted(INTERPOLATIONS)}")
        super().__init__(dataset, image_key)
        self.factor, self.enlarge = factor, enlarge

    def condition(self, image: np.ndarray, i: int) -> dict[str, np.ndarray]:
        """The shrunk image, and the enlarged one on request."""
        if image.shape[0] % self.factor or image.shape[1] % self.factor:
            raise ValueError(
                f"item {i} is {image.shape[1]} × {image.shape[0]} pixels: both sides must be multiples of factor={self.factor}"
            )
        made = {"LR_image": imscale(image, self.factor)}
        if self.enlarge is not None:
            made["LR_enlarged"] = imscale(image, self.factor, True, self.enlarge)
        return made
