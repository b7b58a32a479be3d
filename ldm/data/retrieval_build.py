"""A retrieval database from one's own pictures, in the published layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from taming.data.base import existing_folder
from taming.data.images import EXTENSIONS, BrokenImageError, open_rgb, resize_and_crop, to_float
from taming.util import atomic_path

logger = logging.getLogger(__name__)

PART = 1 << 17  # vectors a file
SIZE = 224  # of the squares that CLIP sees

Square = tuple[
    np.ndarray, str, tuple[int, int, int, int]
]  # pixels or their vector, the picture's name, the square in it


def build_database(
    pictures: str | Path,
    folder: str | Path,
    encode: Callable[[Tensor], Tensor],
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> int:
    """Write a vector of the middle square of each picture; broken pictures are skipped with a warning.

    Args:
        pictures: folder of them, with any folders in it.
        folder: for `part-00000.npz`, …: `img_id` is a picture's path below its folder, `patch_coords` the left, top, right
            and bottom of the square in its own pixels.
        encode: (b, 3, 224, 224) in [-1, 1] → (b, d), such as `ClipImageEmbedder`.
        batch_size: pictures encoded at once.
        device: of the encoder.

    Returns:
        The number of vectors.

    Raises:
        FileExistsError: the folder is a database already.
        FileNotFoundError: no folder of pictures, or no picture in it.
        ValueError: none of the pictures could be read.
    """
    if there := next(Path(folder).glob("*.npz"), None):
        raise FileExistsError(f"{there} is there already; name an empty folder for the new database")
    root = existing_folder(pictures, "name a folder of pictures")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    if not files:
        raise FileNotFoundError(f"{root} holds no pictures ({', '.join(EXTENSIONS)})")
    rows = _encoded(_squares(files, root), encode, batch_size, device)
    total = part = 0
    while rest := list(islice(rows, PART)):
        vectors, names, boxes = zip(*rest, strict=True)
        with atomic_path(Path(folder) / f"part-{part:05}.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, embedding=np.stack(vectors), img_id=np.array(names), patch_coords=np.array(boxes))
        total, part = total + len(rest), part + 1
    if not total:
        raise ValueError(f"none of the {len(files)} pictures in {root} could be read")
    return total


def _squares(files: Sequence[Path], root: Path) -> Iterator[Square]:
    """The middle square of each picture, (224, 224, 3) in [-1, 1]."""
    for path in tqdm(files, desc="Encoding", unit="picture"):
        try:
            image = open_rgb(path)
        except BrokenImageError as error:
            logger.warning("Skipping a broken picture: %s", error)
            continue
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        pixels = to_float(resize_and_crop(image, SIZE, "bicubic"))
        yield pixels, path.relative_to(root).as_posix(), (left, top, left + side, top + side)


@torch.no_grad()
def _encode(
    squares: Sequence[np.ndarray], encode: Callable[[Tensor], Tensor], device: torch.device | str
) -> np.ndarray:
    batch = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    return encode(batch.to(device)).float().cpu().numpy()


def _encoded(
    squares: Iterator[Square],
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device | str,
) -> Iterator[Square]:
    """Squares with vectors in place of their pixels."""
    while batch := list(islice(squares, batch_size)):
        vectors = _encode([pixels for pixels, *_ in batch], encode, device)
        for vector, (_, name, box) in zip(vectors, batch, strict=True):
            yield vector, name, box
