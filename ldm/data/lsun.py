"""LSUN: churches, bedrooms and cats, from folders of picture files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from taming.data.base import SkipsBroken, check_presence, read_list
from taming.data.images import INTERPOLATIONS, open_rgb, to_float

RESAMPLERS = {"linear": INTERPOLATIONS["bilinear"]} | {
    name: INTERPOLATIONS[name] for name in ("bilinear", "bicubic", "lanczos")
}


class LSUNBase(SkipsBroken):
    """Squares cut from the middle of the listed pictures, half of them mirrored.

    Items: `image` (h, w, 3) float32 in [-1, 1], `relative_file_path_`, `file_path_`.

    Args:
        txt_file: the list, one path relative to `data_root` a line.
        data_root: folder of the pictures.
        size: side to which the squares are scaled; None leaves them as they are.
        interpolation: a key of `RESAMPLERS`.
        flip_p: share of the pictures that are mirrored, in [0, 1].
        on_error: "skip" broken pictures (logged, counted) or "raise".

    Raises:
        FileNotFoundError: the list or the pictures are missing.
        ValueError: an unknown interpolation, or a share outside [0, 1].
    """

    def __init__(
        self,
        txt_file: str,
        data_root: str,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        if interpolation not in RESAMPLERS:
            raise ValueError(f"interpolation={interpolation!r} is unknown; choose one of {list(RESAMPLERS)}")
        if not 0 <= flip_p <= 1:
            raise ValueError(f"flip_p={flip_p} is a share of the pictures: between 0 and 1")
        self.data_paths, self.data_root = txt_file, data_root
        names = read_list(txt_file, f"write the paths of the pictures below {data_root} into it, one a line")
        self.labels = {
            "relative_file_path_": names,
            "file_path_": [os.path.join(data_root, name) for name in names],
        }
        check_presence(self.labels["file_path_"], txt_file)
        self.size = size
        self.interpolation = RESAMPLERS[interpolation]
        self.flip_p = flip_p

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def load(self, index: int) -> dict[str, Any]:
        """One picture with its paths; mirroring draws from torch's generator."""
        example: dict[str, Any] = {name: values[index] for name, values in self.labels.items()}
        picture = _middle_square(open_rgb(example["file_path_"]))
        if self.size is not None:
            picture = picture.resize((self.size, self.size), self.interpolation)
        pixels = to_float(picture)
        if float(torch.rand(1)) < self.flip_p:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        return {"image": pixels} | example


def _middle_square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = ((n - side) // 2 for n in picture.size)
    right, bottom = ((n + side) // 2 for n in picture.size)
    return picture.crop((left, top, right, bottom))


class _Listed(LSUNBase):
    """`data/lsun/<LIST>.txt` below `data/lsun/<FOLDER>`; the options are those of `LSUNBase`."""

    LIST: str
    FOLDER: str
    FLIP_P = 0.5

    def __init__(self, flip_p: float | None = None, **kwargs: Any) -> None:
        flip_p = self.FLIP_P if flip_p is None else flip_p
        super().__init__(f"data/lsun/{self.LIST}.txt", f"data/lsun/{self.FOLDER}", flip_p=flip_p, **kwargs)


class LSUNChurchesTrain(_Listed):
    """Outdoor churches, training split."""

    LIST, FOLDER = "church_outdoor_train", "churches"


class LSUNChurchesValidation(_Listed):
    """Outdoor churches, validation split; not mirrored."""

    LIST, FOLDER, FLIP_P = "church_outdoor_val", "churches", 0.0


class LSUNBedroomsTrain(_Listed):
    """Bedrooms, training split."""

    LIST, FOLDER = "bedrooms_train", "bedrooms"


class LSUNBedroomsValidation(_Listed):
    """Bedrooms, validation split; not mirrored."""

    LIST, FOLDER, FLIP_P = "bedrooms_val", "bedrooms", 0.0


class LSUNCatsTrain(_Listed):
    """Cats, training split."""

    LIST, FOLDER = "cat_train", "cats"


class LSUNCatsValidation(_Listed):
    """Cats, validation split; not mirrored."""

    LIST, FOLDER, FLIP_P = "cat_val", "cats", 0.0
