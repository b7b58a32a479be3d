"""ImageNet (ILSVRC 2012): plain, with depth, shrunk and as edges."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from taming.data.base import (
    DelegatingDataset,
    ImagePaths,
    SkipsBroken,
    check_presence,
    existing_folder,
    read_list,
)
from taming.data.ilsvrc import (
    correct_index,
    fetch_checked,
    give_synsets_from_indices,
    str_to_indices,
    unpack_classes,
    unpack_sorted,
)
from taming.data.images import Preprocessor, imscale, open_rgb, open_stored, rgba_to_depth, to_float
from taming.data.utils import is_prepared, mark_prepared
from taming.util import atomic_path, download, retrieve, user_cache

__all__ = [
    "BaseWithDepth",
    "DRINExamples",
    "ImageNetBase",
    "ImageNetEdges",
    "ImageNetEdgesTrain",
    "ImageNetEdgesValidation",
    "ImageNetScale",
    "ImageNetScaleTrain",
    "ImageNetScaleValidation",
    "ImageNetTrain",
    "ImageNetTrainWithDepth",
    "ImageNetValidation",
    "ImageNetValidationWithDepth",
    "ImagePaths",
    "RINTrainWithDepth",
    "RINValidationWithDepth",
    "download",
    "get_preprocessor",
    "give_synsets_from_indices",
    "imscale",
    "retrieve",
    "rgba_to_depth",
    "str_to_indices",
]

BROKEN_FILES = {"n06596364_9591.JPEG"}  # in every copy of the data set
# frogs, turtles, dogs, cats, birds, primates, fish, crabs, insects: Tsipras et al. 2019, Table 1, whose ranges here,
# as published, lack their ends
RESTRICTED = "30-32, 33-37, 151-268, 281-285, 80-100, 365-382, 389-397, 118-121, 300-319"

# ----------------------------------------------------------------------------------------------------- the data set


class ImageNetBase(DelegatingDataset):
    """Pictures below `$XDG_CACHE_HOME` (or `~/.cache`)`/autoencoders/data/<NAME>`, unpacked there on first use.

    Items: `image` (h, w, 3) float32 in [-1, 1], `relpath`, `synsets`, `class_label` (index among the sorted synsets
    that are present), `human_label`, `file_path_`. In that folder: `data/<synset>/*.JPEG`, `filelist.txt`, `.ready`,
    `synset_human.txt` (fetched if absent) and `index_synset.yaml`, which is written from the sorted synsets when all
    1000 are there: a file that says otherwise, as the one once published did for 71 classes, is replaced.

    Args:
        config: `size` (the shorter side is scaled to it and a square cut; absent: whole pictures), `sub_indices` (such
            as "30-32, 5", or a list of indices: only these classes), `<class name>: {random_crop: …}`, `on_error` ("skip" or
            "raise" for broken files).

    Raises:
        FileNotFoundError: neither pictures nor the archive to unpack; the message says which file to put where.
        ValueError: an archive or synset file of the wrong size, or nothing left of `sub_indices`.
    """

    NAME: str
    NAMED: str  # the key of `config` with this class's own options
    RANDOM_CROP = False
    ARCHIVE: str
    ARCHIVE_SIZE: int
    TORRENT: str
    HUMAN_URL = "https://heibox.uni-heidelberg.de/f/9f28e956cd304264bb82/?dl=1"
    HUMAN_SIZE = 2655750

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: Any = {} if config is None else config
        self.root = os.path.join(user_cache(), "autoencoders/data", self.NAME)
        self.datadir = os.path.join(self.root, "data")
        self.txt_filelist = os.path.join(self.root, "filelist.txt")
        self.idx2syn = os.path.join(self.root, "index_synset.yaml")
        self._prepare()
        self._load()

    @property
    def random_crop(self) -> bool:
        """Whether squares are cut anywhere instead of from the middle."""
        return retrieve(self.config, f"{self.NAMED}/random_crop", default=self.RANDOM_CROP)

    def _prepare(self) -> None:
        if is_prepared(self.root):
            return
        if not os.path.isdir(self.datadir):
            self._unpack(self._archive())
        names = sorted(
            path.relative_to(self.datadir).as_posix() for path in Path(self.datadir).glob("*/*.JPEG")
        )
        if not names:
            raise FileNotFoundError(
                f"{self.datadir} holds no pictures; it needs <synset>/*.JPEG, one folder a class"
            )
        with atomic_path(self.txt_filelist) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        mark_prepared(self.root)

    def _archive(self) -> Path:
        path = Path(self.root) / self.ARCHIVE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} ({self.ARCHIVE_SIZE:,} bytes) is missing: fetch it from image-net.org (needs an account) or, with a "
                f"torrent program, from academictorrents.com/details/{self.TORRENT}, and put it there; or put the unpacked "
                f"classes, or a link to them, at {self.datadir}"
            )
        if (size := path.stat().st_size) != self.ARCHIVE_SIZE:
            raise ValueError(f"{path} has {size:,} bytes instead of {self.ARCHIVE_SIZE:,}: fetch it again")
        return path

    def _unpack(self, archive: Path) -> None:
        """Fill `datadir` with one folder a class; it appears only when complete."""
        raise NotImplementedError

    def _load(self) -> None:
        every = [name for name in read_list(self.txt_filelist) if os.path.basename(name) not in BROKEN_FILES]
        correct_index({name.split("/")[0] for name in every}, self.idx2syn)
        chosen = retrieve(self.config, "sub_indices", default="")
        if chosen:
            indices = str_to_indices(chosen) if isinstance(chosen, str) else list(chosen)
            wanted = set(give_synsets_from_indices(indices, self.idx2syn))
            every = [name for name in every if name.split("/")[0] in wanted]
            if not every:
                raise ValueError(f"sub_indices={chosen!r} leaves no picture of {self.txt_filelist}")
        self.relpaths = every
        self.synsets = [name.split("/")[0] for name in every]
        present, self.class_labels = np.unique(self.synsets, return_inverse=True)
        human = self._human_names(present.tolist())
        self.human_labels = [human[synset] for synset in self.synsets]
        self.abspaths = [os.path.join(self.datadir, name) for name in every]
        check_presence(self.abspaths, self.txt_filelist)
        self.data = ImagePaths(
            self.abspaths,
            size=retrieve(self.config, "size", default=0),
            random_crop=self.random_crop,
            labels={
                "relpath": np.array(self.relpaths),
                "synsets": np.array(self.synsets),
                "class_label": self.class_labels,
                "human_label": np.array(self.human_labels),
            },
            on_error=retrieve(self.config, "on_error", default="skip"),
        )

    def _human_names(self, synsets: list[str]) -> dict[str, str]:
        self.human_dict = str(fetch_checked("synset_human.txt", self.HUMAN_URL, self.HUMAN_SIZE, self.root))
        names = dict(
            line.split(maxsplit=1) for line in read_list(self.human_dict)
        )  # a blank or a tab between
        if absent := [synset for synset in synsets if synset not in names]:
            raise ValueError(
                f"{self.human_dict} has no name for {absent[0]}: is it the name of a class folder?"
            )
        return names


class ImageNetTrain(ImageNetBase):
    """The training split; squares are cut at random unless `config` says `ImageNetTrain: {random_crop: false}`."""

    NAME, NAMED, RANDOM_CROP = "ILSVRC2012_train", "ImageNetTrain", True
    ARCHIVE, ARCHIVE_SIZE = "ILSVRC2012_img_train.tar", 147897477120
    TORRENT = "a306397ccf9c2ead27155983c254227c0fd938e2"

    def _unpack(self, archive: Path) -> None:
        unpack_classes(archive, Path(self.datadir))


class ImageNetValidation(ImageNetBase):
    """The validation split, sorted into classes by `validation_synset.txt`."""

    NAME, NAMED = "ILSVRC2012_validation", "ImageNetValidation"
    ARCHIVE, ARCHIVE_SIZE = "ILSVRC2012_img_val.tar", 6744924160
    TORRENT = "5d6d0df7ed81efd49ca99ea4737e0ae5e3a5f2e5"
    SYNSET_URL = "https://heibox.uni-heidelberg.de/f/3e0f6e9c624e45f2bd73/?dl=1"
    SYNSET_SIZE = 1950000

    def _unpack(self, archive: Path) -> None:
        listing = fetch_checked("validation_synset.txt", self.SYNSET_URL, self.SYNSET_SIZE, self.root)
        unpack_sorted(archive, Path(self.datadir), dict(line.split() for line in read_list(listing)))


# ------------------------------------------------------------------------------------------------------- with depth


def get_preprocessor(
    size: int | None = None,
    random_crop: bool = False,
    additional_targets: Mapping[str, str] | None = None,
    crop_size: int | None = None,
) -> Preprocessor:
    """What scales and cuts `image` and further inputs alike; random crops are also mirrored, every second one.

    Args:
        size: of the shorter side; None or <= 0: no scaling, and cutting only if `crop_size` is given.
        random_crop: cut anywhere instead of from the middle.
        additional_targets: name → "image" (scaled bilinearly) or "mask" (nearest).
        crop_size: side of the square; `size` if None.

    Raises:
        ValueError: a target that is neither.
    """
    modes = {"image": "bilinear", "mask": "nearest"}
    targets = dict(additional_targets or {})
    for name, kind in targets.items():
        if kind not in modes:
            raise ValueError(f"additional_targets: {name} is {kind!r}; choose one of {list(modes)}")
    side = crop_size or size
    cuts = side is not None and side > 0
    return Preprocessor(
        size,
        side,
        random_crop=random_crop,
        random_flip=random_crop and cuts,
        interpolation={name: modes[kind] for name, kind in targets.items()},
    )


def _read_depth(path: str) -> np.ndarray:
    """Depth (h, w) float32, from -1 (smallest) to 1 (largest)."""
    depth = rgba_to_depth(open_stored(path, "RGBA"))
    depth = (depth - depth.min()) / max(1e-8, depth.max() - depth.min())
    return 2.0 * depth - 1.0


class BaseWithDepth(SkipsBroken):
    """ImageNet with a depth map: the items of `get_base_dset()` with `depth` (h, w) float32 in [-1, 1].

    Maps are `<root>/<synset>/<name>.png`, as `scripts/extract_depth.py` writes them.

    Args:
        config: of the pictures, see `ImageNetBase`; its `size` is not used.
        size: scale the shorter side to this; None: pictures stay as they are.
        random_crop: cut anywhere and mirror every second picture, instead of from the middle.
        crop_size: side of the square; `size` if None.
        root: folder of the maps; `DEFAULT_DEPTH_ROOT` if None.

    Raises:
        FileNotFoundError: the maps' folder or ImageNet is missing.
    """

    DEFAULT_DEPTH_ROOT = "data/imagenet_depth"

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        random_crop: bool = False,
        crop_size: int | None = None,
        root: str | None = None,
    ) -> None:
        self.config = {key: value for key, value in dict(config or {}).items() if key != "size"}
        super().__init__(self.config.get("on_error", "skip"))
        self.base_dset = self.get_base_dset()
        self.root = root if root is not None else self.DEFAULT_DEPTH_ROOT
        existing_folder(self.root, "make the depth maps with scripts/extract_depth.py")
        self.preprocessor = get_preprocessor(size, random_crop, {"depth": "image"}, crop_size)

    def get_base_dset(self) -> ImageNetBase:
        """The pictures."""
        raise NotImplementedError

    def get_depth_path(self, e: Mapping[str, Any]) -> str:
        """File of the map that belongs to an item."""
        return os.path.join(self.root, os.path.splitext(str(e["relpath"]))[0] + ".png")

    def __len__(self) -> int:
        return len(self.base_dset)

    def load(self, index: int) -> dict[str, Any]:
        """The picture's item, with its depth."""
        example = self.base_dset[index]
        depth = _read_depth(self.get_depth_path(example))
        return example | self.preprocessor(str(example["file_path_"]), image=example["image"], depth=depth)


class _ClassesWithDepth(BaseWithDepth):
    """Adds the choice of classes (`sub_indices`)."""

    BASE: type[ImageNetBase]

    def __init__(self, sub_indices: str | None = None, **kwargs: Any) -> None:
        self.sub_indices = sub_indices
        super().__init__(**kwargs)

    def get_base_dset(self) -> ImageNetBase:
        """The pictures of the chosen classes."""
        return self.BASE(self.config | ({"sub_indices": self.sub_indices} if self.sub_indices else {}))


class ImageNetTrainWithDepth(_ClassesWithDepth):
    """The training split with depth; `**kwargs` as of `BaseWithDepth`."""

    BASE, DEFAULT_DEPTH_ROOT = ImageNetTrain, "data/imagenet_depth/train"

    def __init__(self, random_crop: bool = True, sub_indices: str | None = None, **kwargs: Any) -> None:
        super().__init__(sub_indices, random_crop=random_crop, **kwargs)


class ImageNetValidationWithDepth(_ClassesWithDepth):
    """The validation split with depth; `**kwargs` as of `BaseWithDepth`."""

    BASE, DEFAULT_DEPTH_ROOT = ImageNetValidation, "data/imagenet_depth/val"


class RINTrainWithDepth(ImageNetTrainWithDepth):
    """Restricted ImageNet (animals), training split."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        random_crop: bool = True,
        crop_size: int | None = None,
    ) -> None:
        super().__init__(random_crop, RESTRICTED, config=config, size=size, crop_size=crop_size)


class RINValidationWithDepth(ImageNetValidationWithDepth):
    """Restricted ImageNet (animals), validation split."""

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        size: int | None = None,
        random_crop: bool = False,
        crop_size: int | None = None,
    ) -> None:
        super().__init__(RESTRICTED, config=config, size=size, random_crop=random_crop, crop_size=crop_size)


class DRINExamples(SkipsBroken):
    """Example pictures with depth, 256 × 256: `data/drin_examples.txt`, `data/drin_images`, `data/drin_depth`.

    Items: `image` (256, 256, 3) and `depth` (256, 256), float32 in [-1, 1], and `file_path_`.
    """

    def __init__(self, on_error: str = "skip") -> None:
        super().__init__(on_error)
        images = existing_folder("data/drin_images", "put the example pictures there")
        depths = existing_folder(
            "data/drin_depth", "put the depth maps there: PNG files of the pictures' names"
        )
        names = read_list(
            "data/drin_examples.txt", "write the pictures' paths below data/drin_images, one a line"
        )
        self.image_paths = [str(images / name) for name in names]
        self.depth_paths = [str(depths / Path(name).with_suffix(".png")) for name in names]
        check_presence(self.image_paths, "data/drin_examples.txt")
        self.preprocessor = get_preprocessor(size=256, additional_targets={"depth": "image"})

    def __len__(self) -> int:
        return len(self.image_paths)

    def load(self, index: int) -> dict[str, Any]:
        """One picture with its depth."""
        path = self.image_paths[index]
        image = to_float(open_rgb(path))
        return self.preprocessor(path, image=image, depth=_read_depth(self.depth_paths[index])) | {
            "file_path_": path
        }


# ------------------------------------------------------------------------------------------------- shrunk, and edges


class ImageNetScale(DelegatingDataset):
    """ImageNet with a shrunk twin: the items of `get_base()` with `lr` (h, w, 3) float32 in [-1, 1].

    Args:
        size: scale the shorter side to this (after shrinking and enlarging); None: not.
        crop_size: cut a square of this side; pictures with a shorter side are scaled up to it first.
        random_crop: cut anywhere and mirror every second picture, instead of from the middle.
        up_factor: `lr` is the picture shrunk by this and enlarged again.
        hr_factor: the picture itself is shrunk by this first.
        keep_mode: interpolation of the enlarging.
        config: of the pictures, see `ImageNetBase`.
    """

    BASE: type[ImageNetBase]

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        random_crop: bool = False,
        up_factor: int | None = None,
        hr_factor: int | None = None,
        keep_mode: str = "bicubic",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.size, self.crop_size, self.random_crop = size, crop_size, random_crop
        self.up_factor, self.hr_factor, self.keep_mode = up_factor, hr_factor, keep_mode
        self.data = self.get_base()
        self.preprocessor = get_preprocessor(size, random_crop, {"lr": "image"}, crop_size)
        self.enlarge = Preprocessor(crop_size)

    def get_base(self) -> ImageNetBase:
        """The pictures."""
        return self.BASE(self.config)

    def low_resolution(self, image: np.ndarray) -> np.ndarray:
        """What goes under `lr`, of the picture's size."""
        return imscale(image, self.up_factor, keepshapes=True, keepmode=self.keep_mode)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = self.data[i]
        image = imscale(example["image"], self.hr_factor)
        if self.crop_size and min(image.shape[:2]) < self.crop_size:
            image = self.enlarge(image=image)["image"]
        return example | self.preprocessor(
            str(example["file_path_"]), image=image, lr=self.low_resolution(image)
        )


class ImageNetScaleTrain(ImageNetScale):
    """The training split; `**kwargs` as of `ImageNetScale`."""

    BASE = ImageNetTrain

    def __init__(self, random_crop: bool = True, **kwargs: Any) -> None:
        super().__init__(random_crop=random_crop, **kwargs)


class ImageNetScaleValidation(ImageNetScale):
    """The validation split."""

    BASE = ImageNetValidation


class ImageNetEdges(ImageNetScale):
    """ImageNet with its edges (Canny, sigma 2) as `lr` (h, w, 3), 1 on edges and 0 elsewhere; needs scikit-image.

    Args:
        up_factor: not used: edges are those of the picture itself.
        **kwargs: as of `ImageNetScale`.
    """

    def __init__(self, up_factor: int = 1, **kwargs: Any) -> None:
        super().__init__(up_factor=1, **kwargs)

    def low_resolution(self, image: np.ndarray) -> np.ndarray:
        """Edges, the same in three channels."""
        try:
            from skimage.color import rgb2gray
            from skimage.feature import canny
        except ImportError as error:
            raise ImportError("edges need scikit-image: python -m pip install scikit-image") from error
        edges = canny(rgb2gray(image), sigma=2).astype(np.float32)
        return np.repeat(edges[..., None], 3, axis=2)


class ImageNetEdgesTrain(ImageNetEdges):
    """The training split; `**kwargs` as of `ImageNetEdges`."""

    BASE = ImageNetTrain

    def __init__(self, random_crop: bool = True, **kwargs: Any) -> None:
        super().__init__(random_crop=random_crop, **kwargs)


class ImageNetEdgesValidation(ImageNetEdges):
    """The validation split."""

    BASE = ImageNetValidation
