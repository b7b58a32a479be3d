"""What the data sets of picture files share: reading lists, skipping broken files, pictures from paths."""

from __future__ import annotations

import bisect
import logging
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from taming.data.images import BrokenImageError, Preprocessor, open_array, open_rgb, to_float

logger = logging.getLogger(__name__)

ERROR_POLICIES = ("skip", "raise")
SAMPLED = 32  # files looked for before training starts


def read_list(path: str | Path, remedy: str = "write one path a line") -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        FileNotFoundError: no such file; the message ends with the remedy.
        ValueError: nothing in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no list {path}; {remedy}")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"the list {path} is empty; {remedy}")
    return lines


def existing_folder(path: str | Path, remedy: str) -> Path:
    """The path, if it is a folder.

    Raises:
        FileNotFoundError: it is not; the message ends with the remedy.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no folder {path}; {remedy}")
    return Path(path)


def check_presence(paths: Sequence[str], source: str) -> None:
    """Look for the first files of a list, so that a wrong folder shows before training and not as a flood of warnings.

    Raises:
        FileNotFoundError: none of them exists.
    """
    first = paths[:SAMPLED]
    if first and not any(Path(path).exists() for path in first):
        raise FileNotFoundError(
            f"none of the first {len(first)} files of {source} exists, such as {first[0]}; "
            f"relative paths start at the working directory, {Path.cwd()}"
        )


class SkipsBroken(Dataset):
    """A data set whose damaged or missing files are logged and counted, the next good item taking their place.

    One bad file then does not end a week of training. Subclasses define `load(index)`.

    Attributes:
        broken: path → reason, of the files skipped so far (each loader process has its own).

    Args:
        on_error: "skip" or "raise".
    """

    def __init__(self, on_error: str = "skip") -> None:
        if on_error not in ERROR_POLICIES:
            raise ValueError(f"on_error={on_error!r} is unknown; choose one of {ERROR_POLICIES}")
        self.on_error = on_error
        self.broken: dict[str, str] = {}

    def load(self, index: int) -> Any:
        """The item itself; may raise BrokenImageError or FileNotFoundError."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> Any:
        length = len(self)  # type: ignore[arg-type]
        if not -length <= i < length:
            raise IndexError(f"there is no item {i}: the data set has {length}")
        for step in range(length):
            try:
                return self.load((i + step) % length)
            except (BrokenImageError, FileNotFoundError) as error:
                self.note_broken(error)
        raise BrokenImageError(
            f"all {length} pictures are broken or missing; the first: {next(iter(self.broken.values()))}"
        )

    def note_broken(self, error: BrokenImageError | FileNotFoundError) -> None:
        """Count and log a file, or raise its error if the policy says so."""
        if self.on_error == "raise":
            raise error
        path = str(getattr(error, "path", "") or error.filename or error)
        if path not in self.broken:
            self.broken[path] = str(error)
            logger.warning("Skipping a broken picture (%d so far): %s", len(self.broken), error)


class ImagePaths(SkipsBroken):
    """Pictures from their paths, as `{image, **labels, file_path_}`; `image` is (h, w, 3) float32 in [-1, 1].

    Args:
        paths: of picture files, or of `.npy` files of (1, 3, h, w) uint8.
        size: scale the shorter side to this (bilinear, no smoothing, as published), then cut a square; None or <= 0:
            pictures stay as they are.
        random_crop: cut anywhere instead of from the middle.
        labels: name → one value a path. As published, this mapping itself gains the entry `file_path_`.
        on_error: "skip" or "raise", see `SkipsBroken`.

    Raises:
        ValueError: labels of another length than `paths`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None = None,
        random_crop: bool = False,
        labels: MutableMapping[str, Any] | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(on_error)
        self.size, self.random_crop = size, random_crop
        self.labels = {} if labels is None else labels
        self.labels["file_path_"] = paths
        for name, values in self.labels.items():
            if len(values) != len(paths):
                raise ValueError(
                    f"labels[{name!r}] has {len(values)} values for {len(paths)} paths; give one each"
                )
        self.preprocessor = Preprocessor(size, size, random_crop)

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def read(self, path: str) -> np.ndarray:
        """Pixels (h, w, 3) uint8 of a file."""
        return open_array(path) if str(path).endswith(".npy") else np.asarray(open_rgb(path))

    def preprocess_image(self, image_path: str) -> np.ndarray:
        """A file as (h, w, 3) float32 in [-1, 1], scaled and cut."""
        return to_float(self.preprocessor(str(image_path), image=self.read(image_path))["image"])

    def load(self, index: int) -> dict[str, Any]:
        """`{image, **labels}` of one path."""
        image = self.preprocess_image(self.labels["file_path_"][index])
        return {"image": image} | {name: values[index] for name, values in self.labels.items()}


class NumpyPaths(ImagePaths):
    """`ImagePaths` of files that are all `.npy`, whatever they are called."""

    def read(self, path: str) -> np.ndarray:
        """Pixels (h, w, 3) uint8 of a file."""
        return open_array(path)


class DelegatingDataset(Dataset):
    """A data set whose items are those of `self.data`."""

    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        return self.data[i]


class ConcatDatasetWithIndex(ConcatDataset):
    """Data sets one after the other; an item is `(item, number of its data set)`.

    Raises:
        ValueError: an index below -length, as published.
        IndexError: an index beyond the end.
    """

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        length = len(self)
        if idx < -length:
            raise ValueError(f"there is no item {idx}: the data sets together have {length}")
        if idx >= length:
            raise IndexError(f"there is no item {idx}: the data sets together have {length}")
        idx %= length
        number = bisect.bisect_right(self.cumulative_sizes, idx)
        start = self.cumulative_sizes[number - 1] if number else 0
        return self.datasets[number][idx - start], number
