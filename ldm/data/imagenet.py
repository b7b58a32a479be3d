"""ImageNet (ILSVRC 2012) as latent diffusion reads it: by class, and with a degraded twin for super-resolution."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.data import Dataset, Subset

from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light
from ldm.modules.image_degradation.resample import MODES, resize
from taming.data import imagenet
from taming.data.base import SkipsBroken
from taming.data.imagenet import download, give_synsets_from_indices, retrieve, str_to_indices
from taming.data.images import INTERPOLATIONS, open_rgb, to_float

__all__ = [
    "ImageNetBase",
    "ImageNetSR",
    "ImageNetSRTrain",
    "ImageNetSRValidation",
    "ImageNetTrain",
    "ImageNetValidation",
    "download",
    "give_synsets_from_indices",
    "retrieve",
    "str_to_indices",
    "synset2idx",
]

SIZE = 256  # of the pictures, unless the configuration says otherwise


def synset2idx(path_to_yaml: str | Path = "data/index_synset.yaml") -> dict[str, int]:
    """Class index of each synset (`n01440764`), from a file `index: synset`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path_to_yaml).is_file():
        raise FileNotFoundError(
            f"there is no {path_to_yaml}; write a line `index: synset` for each class into it"
        )
    synsets = yaml.safe_load(Path(path_to_yaml).read_text(encoding="utf-8"))
    return {synset: index for index, synset in synsets.items()}


class ImageNetBase(imagenet.ImageNetBase):
    """`taming.data.imagenet.ImageNetBase`, of 256 × 256 pixels unless `config.size` says otherwise, and with more options.

    Args:
        process_images: False leaves the pictures unopened: items lack `image`.
        data_root: folder that holds the folder `<NAME>`; `$XDG_CACHE_HOME` (or `~/.cache`)`/autoencoders/data` if None.
        config: as in taming, and `keep_orig_class_label`: class labels are the indices of `index_synset.yaml`, even if
            `sub_indices` leaves only some classes.

    Raises:
        ValueError: `keep_orig_class_label` with a synset that `index_synset.yaml` lacks.
    """

    def __init__(
        self,
        process_images: bool = True,
        data_root: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.process_images = process_images
        self.data_root = data_root
        super().__init__({"size": SIZE, **(config or {})})

    def _prepare(self) -> None:
        if self.data_root:
            self.root = os.path.join(self.data_root, self.NAME)
            self.datadir = os.path.join(self.root, "data")
            self.txt_filelist = os.path.join(self.root, "filelist.txt")
            self.idx2syn = os.path.join(self.root, "index_synset.yaml")
        super()._prepare()

    def _load(self) -> None:
        super()._load()
        labels = self.data.labels
        if retrieve(self.config, "keep_orig_class_label", default=False):
            self.synset2idx = synset2idx(self.idx2syn)
            if absent := set(self.synsets) - set(self.synset2idx):
                raise ValueError(
                    f"{self.idx2syn} gives {absent.pop()} no index; keep_orig_class_label needs one for each"
                )
            labels["class_label"] = self.class_labels = np.array([self.synset2idx[s] for s in self.synsets])
        if not self.process_images:
            self.data = [
                dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)
            ]


class ImageNetTrain(ImageNetBase, imagenet.ImageNetTrain):
    """The training split; squares are cut at random unless `config` says `ImageNetTrain: {random_crop: false}`."""


class ImageNetValidation(ImageNetBase, imagenet.ImageNetValidation):
    """The validation split."""


# ------------------------------------------------------------------------------------------------- super-resolution

Degradation = Callable[[np.ndarray, int], np.ndarray]


def _blind(degrade: Callable[..., dict[str, np.ndarray]], image: np.ndarray, factor: int) -> np.ndarray:
    return degrade(image, sf=factor)["image"]


def _plain(mode: str, image: np.ndarray, factor: int) -> np.ndarray:
    return resize(image, image.shape[0] // factor, image.shape[1] // factor, mode)


def _smoothed(mode: str, image: np.ndarray, factor: int) -> np.ndarray:
    small = (image.shape[1] // factor, image.shape[0] // factor)
    return np.asarray(Image.fromarray(image).resize(small, INTERPOLATIONS[mode]))


# "cv_…" leaves aliases as OpenCV does (except cv_area), "pil_…" smooths before it samples
DEGRADATIONS: dict[str, Degradation] = (
    {"bsrgan": partial(_blind, degradation_fn_bsr), "bsrgan_light": partial(_blind, degradation_fn_bsr_light)}
    | {f"cv_{mode}": partial(_plain, mode) for mode in MODES}
    | {f"pil_{mode}": partial(_smoothed, mode) for mode in INTERPOLATIONS}
)


class ImageNetSR(SkipsBroken):
    """Square pictures with a degraded, smaller twin: the items of `get_base()` with `image` and `LR_image`.

    Both are (h, w, 3) float32 in [-1, 1]. A square of a random share of the shorter side is cut, then scaled to `size` by
    averaging. Shares and places come from numpy's generator, BSRGAN's choices from Python's, too.

    Args:
        size: side of `image`.
        degradation: a key of `DEGRADATIONS`.
        downscale_f: `LR_image` has side `size / downscale_f`.
        min_crop_f: smallest share of the shorter side.
        max_crop_f: largest share, up to 1.
        random_crop: cut anywhere instead of from the middle.
        on_error: "skip" broken pictures (logged, counted) or "raise".

    Raises:
        AssertionError: no size, one that `downscale_f` does not divide, or shares out of order (the published class).
        KeyError: an unknown degradation.
    """

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        if not size:
            raise AssertionError(f"size={size} must be the side of the pictures, such as 256")
        if size % downscale_f:
            raise AssertionError(f"size={size} is no multiple of downscale_f={downscale_f}; make it one")
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise AssertionError(f"0 < min_crop_f={min_crop_f} <= max_crop_f={max_crop_f} <= 1 does not hold")
        if degradation not in DEGRADATIONS:
            raise KeyError(f"degradation={degradation!r} is unknown; choose one of {sorted(DEGRADATIONS)}")
        self.size, self.downscale_f = size, downscale_f
        self.LR_size = size // downscale_f
        self.min_crop_f, self.max_crop_f = min_crop_f, max_crop_f
        self.center_crop = not random_crop
        self.degradation_process = DEGRADATIONS[degradation]
        self.base = self.get_base()

    def get_base(self) -> Any:
        """The pictures: a sequence of items with `file_path_`."""
        raise NotImplementedError(f"{type(self).__name__} must define get_base(), which names its pictures")

    def __len__(self) -> int:
        return len(self.base)

    def load(self, index: int) -> dict[str, Any]:
        """One picture, cut and scaled, and its degraded twin."""
        example = dict(self.base[index])
        image = self._cut(np.asarray(open_rgb(example["file_path_"])))
        image = resize(image, self.size, self.size, "area")
        degraded = self.degradation_process(image, self.downscale_f)
        return example | {"image": to_float(image), "LR_image": to_float(degraded)}

    def _cut(self, image: np.ndarray) -> np.ndarray:
        shorter = min(image.shape[:2])
        side = max(1, int(shorter * np.random.uniform(self.min_crop_f, self.max_crop_f)))
        room = [n - side for n in image.shape[:2]]
        top, left = (n // 2 if self.center_crop else np.random.randint(n + 1) for n in room)
        return image[top : top + side, left : left + side]


class _Numbers(pickle.Unpickler):
    """Reads pickled numbers and numpy arrays, and nothing that could run code."""

    ALLOWED = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_indices(path: str) -> Sequence[int]:
    """Numbers of the pictures that are large enough, as the published lists hold them."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no {path}, the pickled list of the indices of ImageNet's large pictures; it is part of the "
            "latent-diffusion repository (folder data/): put it there"
        )
    with open(path, "rb") as file:
        try:
            return [int(i) for i in _Numbers(file).load()]
        except (pickle.UnpicklingError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{path} should hold a pickled list of whole numbers: {error}") from error


class ImageNetSRTrain(ImageNetSR):
    """The large pictures of the training split; the options are those of `ImageNetSR`."""

    def get_base(self) -> Dataset:
        """Unopened pictures, chosen by `data/imagenet_train_hr_indices.p`."""
        indices = _read_indices("data/imagenet_train_hr_indices.p")
        return Subset(ImageNetTrain(process_images=False), indices)


class ImageNetSRValidation(ImageNetSR):
    """The large pictures of the validation split; the options are those of `ImageNetSR`."""

    def get_base(self) -> Dataset:
        """Unopened pictures, chosen by `data/imagenet_val_hr_indices.p`."""
        indices = _read_indices("data/imagenet_val_hr_indices.p")
        return Subset(ImageNetValidation(process_images=False), indices)
