"""CelebA-HQ and FFHQ, alone and together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from taming.data.base import (
    ConcatDatasetWithIndex,
    DelegatingDataset,
    ImagePaths,
    check_presence,
    existing_folder,
    read_list,
)
from taming.data.images import Preprocessor


class FacesBase(DelegatingDataset):
    """The items of `self.data`, of which only `keys` (all if None)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.data: Any = None
        self.keys: Sequence[str] | None = None

    def __getitem__(self, i: int) -> Any:
        example = self.data[i]
        return example if self.keys is None else {key: example[key] for key in self.keys}


class _ListedFaces(FacesBase):
    """Pictures (files or `.npy` arrays) of `data/<NAME>`, listed in `data/<NAME><SPLIT>.txt`, cut from the middle.

    Args:
        size: of the square pictures; None leaves them as they are.
        keys: of the items: image, file_path_.
        on_error: "skip" broken pictures (logged, counted) or "raise".

    Raises:
        FileNotFoundError: the folder or the list is missing; the message says what to put there.
    """

    NAME: str
    SPLIT: str

    def __init__(self, size: int | None, keys: Sequence[str] | None = None, on_error: str = "skip") -> None:
        super().__init__()
        root, listed = f"data/{self.NAME}", f"data/{self.NAME}{self.SPLIT}.txt"
        existing_folder(root, f"put the pictures there, or a link to them, and their names into {listed}")
        names = read_list(listed, f"write the names of the pictures in {root} into it, one a line")
        paths = [os.path.join(root, name) for name in names]
        check_presence(paths, listed)
        self.data = ImagePaths(paths, size=size, random_crop=False, on_error=on_error)
        self.keys = keys


class CelebAHQTrain(_ListedFaces):
    """CelebA-HQ, for training."""

    NAME, SPLIT = "celebahq", "train"


class CelebAHQValidation(_ListedFaces):
    """CelebA-HQ, for validation."""

    NAME, SPLIT = "celebahq", "validation"


class FFHQTrain(_ListedFaces):
    """FFHQ, for training."""

    NAME, SPLIT = "ffhq", "train"


class FFHQValidation(_ListedFaces):
    """FFHQ, for validation."""

    NAME, SPLIT = "ffhq", "validation"


class _FacesHQ(DelegatingDataset):
    """CelebA-HQ (`class` 0) followed by FFHQ (`class` 1), optionally cropped.

    Args:
        size, keys, on_error: as of the two data sets.
        crop_size: cut a square of this side after scaling; None: not.
        coord: add `coord` (h, w, 1) float64 in [0, 1): each pixel's number in reading order over the number of
            pixels, counted before the crop and cut with it, so that a crop knows where it came from.
    """

    PARTS: tuple[type[_ListedFaces], ...]
    RANDOM_CROP: bool

    def __init__(
        self,
        size: int | None,
        keys: Sequence[str] | None = None,
        crop_size: int | None = None,
        coord: bool = False,
        on_error: str = "skip",
    ) -> None:
        super().__init__()
        self.data = ConcatDatasetWithIndex([part(size, keys, on_error) for part in self.PARTS])
        self.coord = coord
        self.cropper = Preprocessor(crop_size=crop_size, random_crop=self.RANDOM_CROP)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example, label = self.data[i]
        if "image" in example:
            pictures = {"image": example["image"]}
            if self.coord:
                height, width = example["image"].shape[:2]
                pictures["coord"] = np.arange(height * width).reshape(height, width, 1) / (height * width)
            example = example | self.cropper(example.get("file_path_", f"picture {i}"), **pictures)
        return example | {"class": label}


class FacesHQTrain(_FacesHQ):
    """Both, for training: crops from anywhere."""

    PARTS, RANDOM_CROP = (CelebAHQTrain, FFHQTrain), True


class FacesHQValidation(_FacesHQ):
    """Both, for validation: crops from the middle."""

    PARTS, RANDOM_CROP = (CelebAHQValidation, FFHQValidation), False
