"""Pictures with maps of labels, and the S-FLCKR examples."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from taming.data.base import SkipsBroken, check_presence, existing_folder, read_list
from taming.data.images import Preprocessor, open_rgb, open_stored, to_float


def one_hot(labels: np.ndarray, n_labels: int, source: str, dtype: Any = np.float64) -> np.ndarray:
    """Labels (h, w) → (h, w, n_labels).

    Raises:
        ValueError: a label of n_labels or more; the message names the file.
    """
    if labels.max() >= n_labels:
        raise ValueError(
            f"{source} holds the label {labels.max()}, but n_labels={n_labels} allows 0 to {n_labels - 1}; "
            "raise n_labels, or shift or repair the map"
        )
    return np.eye(n_labels, dtype=dtype)[labels]


def map_name(image_name: str) -> str:
    """The map that belongs to a picture: the same name, as PNG."""
    return image_name.replace(".jpg", ".png")


class SegmentationBase(SkipsBroken):
    """Pictures with maps of labels, scaled and cut alike.

    Items: `image` (h, w, 3) float32 in [-1, 1], `segmentation` (h, w, n_labels) float64 one-hot, and the paths
    `relative_file_path_`, `file_path_`, `segmentation_path_`.

    Args:
        data_csv: list of pictures, a path relative to `data_root` a line.
        data_root: folder of the pictures.
        segmentation_root: folder of the maps: PNG files of mode L, of the picture's size and name (`.jpg` → `.png`).
        size: scale the shorter side to this and cut a square; None or <= 0: neither.
        random_crop: cut anywhere instead of from the middle.
        interpolation: of the picture: nearest, bilinear, bicubic, area or lanczos; maps are always nearest.
        n_labels: number of labels.
        shift_segmentation: add 1 to every label, in 8 bits, so that "unlabelled" (255) becomes 0.
        crop_size: side of the square if other than `size`.
        on_error: "skip" broken or missing files (logged, counted) or "raise".

    Raises:
        FileNotFoundError: a folder or the list is missing.
        ValueError: an unknown option; (on reading) a map of another mode, or a label beyond n_labels.
        ImageSizeError: (on reading) a picture and its map differ in size.
    """

    def __init__(
        self,
        data_csv: str,
        data_root: str,
        segmentation_root: str,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        n_labels: int = 182,
        shift_segmentation: bool = False,
        crop_size: int | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        self.n_labels, self.shift_segmentation = n_labels, shift_segmentation
        self.data_csv, self.data_root, self.segmentation_root = data_csv, data_root, segmentation_root
        existing_folder(data_root, f"put the pictures of {data_csv} there, or a link to them")
        existing_folder(segmentation_root, "put the maps there: a PNG of labels of each picture's name")
        names = read_list(data_csv, f"write the pictures' paths below {data_root} into it, one a line")
        self.labels: dict[str, list[str]] = {
            "relative_file_path_": names,
            "file_path_": [os.path.join(data_root, name) for name in names],
            "segmentation_path_": [os.path.join(segmentation_root, map_name(name)) for name in names],
        }
        check_presence(self.labels["file_path_"], data_csv)
        self.size = size if size is not None and size > 0 else None
        self.preprocessor = Preprocessor(
            self.size,
            (crop_size or self.size) if self.size else None,
            random_crop,
            interpolation={"image": interpolation, "segmentation": "nearest"},
        )

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def load(self, index: int) -> dict[str, Any]:
        """Picture, one-hot map and labels of one line of the list."""
        entry = {name: values[index] for name, values in self.labels.items()}
        labels = open_stored(entry["segmentation_path_"], "L")
        if self.shift_segmentation:
            labels = labels + np.uint8(1)
        image = np.asarray(open_rgb(entry["file_path_"]))
        cut = self.preprocessor(entry["file_path_"], image=image, segmentation=labels)
        return {
            **entry,
            "image": to_float(cut["image"]),
            "segmentation": one_hot(cut["segmentation"], self.n_labels, entry["segmentation_path_"]),
        }


class Examples(SegmentationBase):
    """`data/sflckr_examples.txt`, pictures in `data/sflckr_images`, maps in `data/sflckr_segmentations`."""

    def __init__(
        self,
        size: int | None = None,
        random_crop: bool = False,
        interpolation: str = "bicubic",
        on_error: str = "skip",
    ) -> None:
        super().__init__(
            data_csv="data/sflckr_examples.txt",
            data_root="data/sflckr_images",
            segmentation_root="data/sflckr_segmentations",
            size=size,
            random_crop=random_crop,
            interpolation=interpolation,
            on_error=on_error,
        )
