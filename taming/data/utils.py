"""Fetching and unpacking data, marks of prepared folders, square cut-outs, batches."""

from __future__ import annotations

import math
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import default_collate
from tqdm import tqdm

from taming.data.helper_types import Annotation
from taming.util import download

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")

# --------------------------------------------------------------------------------------------- folders and downloads


def unpack(path: str | Path) -> None:
    """Unpack an archive into its own folder; no entry can land outside of it.

    Raises:
        NotImplementedError: not one of `ARCHIVES`.
    """
    if not str(path).endswith(ARCHIVES):
        raise NotImplementedError(f"{path}: archives may end in {', '.join(ARCHIVES)}; unpack it by hand")
    if zipfile.is_zipfile(path):
        shutil.unpack_archive(path, Path(path).parent, "zip")
    else:
        shutil.unpack_archive(path, Path(path).parent, filter="data")


def reporthook(bar: tqdm) -> Callable[[int, int, int], None]:
    """A progress callback for `urllib.request.urlretrieve` that drives a tqdm bar."""

    def report(blocks: int = 1, block_size: int = 1, total: int = -1) -> None:
        bar.total = total if total > 0 else None
        bar.update(blocks * block_size - bar.n)

    return report


def get_root(name: str) -> str:
    """The folder `data/<name>` of the working directory, made if it is absent."""
    root = Path("data") / name
    root.mkdir(parents=True, exist_ok=True)
    return str(root)


def is_prepared(root: str | Path) -> bool:
    """Whether `mark_prepared` was called on the folder."""
    return (Path(root) / ".ready").exists()


def mark_prepared(root: str | Path) -> None:
    """Leave the mark `.ready` in a folder whose content is complete."""
    (Path(root) / ".ready").touch()


def prompt_download(
    file_: str, source: str, target_dir: str | Path, content_dir: str | Path | None = None
) -> str:
    """Path of a file that a person must fetch, asking for it until it (or `content_dir`, its content) is there.

    Raises:
        FileNotFoundError: it is absent and nobody sits at the terminal.
    """
    target = Path(target_dir) / file_
    while not target.exists() and not (content_dir is not None and Path(content_dir).exists()):
        wish = f"{target} is missing; download it from {source} and put it there"
        if content_dir is not None:
            wish += f", or its content into {content_dir}"
        if not sys.stdin.isatty():
            raise FileNotFoundError(wish)
        input(f"{wish}, then press Enter.")
    return str(target)


def download_url(file_: str, url: str, target_dir: str | Path) -> str:
    """Fetch `url` as `target_dir/file_` with a progress bar and return that path; it appears only when complete.

    Raises:
        OSError: the address cannot be reached; the message says where the file may be put by hand.
    """
    target = Path(target_dir) / file_
    download(url, target)
    return str(target)


def download_urls(urls: Mapping[str, str], target_dir: str | Path) -> dict[str, str]:
    """`download_url` for each file name → address; returns file name → path."""
    return {file_: download_url(file_, url, target_dir) for file_, url in urls.items()}


# ------------------------------------------------------------------------------------------------ pictures and batches


def quadratic_crop(x: np.ndarray, bbox: Sequence[float], alpha: float = 1.0) -> np.ndarray:
    """A square around a box, reflected at the edges where it reaches beyond the picture.

    Args:
        x: picture (h, w) or (h, w, c).
        bbox: left, top, right, bottom in pixels.
        alpha: side of the square over the box's longer side; the side is rounded down and at least 2.
    """
    left, top, right, bottom = map(float, bbox)
    side = max(2, int(alpha * max(right - left, bottom - top)))
    x0, y0 = math.floor((left + right - side) / 2), math.floor((top + bottom - side) / 2)
    height, width = x.shape[:2]
    before = (max(0, -y0), max(0, -x0))
    after = (max(0, y0 + side - height), max(0, x0 + side - width))
    edges = [*zip(before, after, strict=True), *[(0, 0)] * (x.ndim - 2)]
    x0, y0 = x0 + before[1], y0 + before[0]
    return np.pad(x, edges, mode="reflect")[y0 : y0 + side, x0 : x0 + side]


def custom_collate(batch: list[Any]) -> Any:
    """A batch as torch makes it, except that lists of annotations stay lists, since their lengths differ."""
    first = batch[0]
    if isinstance(first, Mapping):
        return {key: custom_collate([item[key] for item in batch]) for key in first}
    if isinstance(first, list) and any(item and isinstance(item[0], Annotation) for item in batch):
        return batch
    if isinstance(first, list) or type(first) is tuple:
        return [custom_collate(list(group)) for group in zip(*batch, strict=True)]
    return default_collate(batch)
