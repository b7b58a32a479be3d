"""Small labelled picture sets of torchvision as data modules: what MNIST and CIFAR-10 have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

logger = logging.getLogger(__name__)

ROOT = ".data/"


def to_pixels(picture: Image.Image) -> Tensor:
    """A picture as (c, h, w) in [-1, 1]."""
    return to_tensor(picture) * 2.0 - 1.0


class DataDictWrapper(Dataset):
    """Pairs of picture and label as {"jpg": picture, "cls": label}.

    Args:
        dset: a sequence of such pairs.
    """

    def __init__(self, dset: Any) -> None:
        super().__init__()
        self.dset = dset

    def __getitem__(self, i: int) -> dict[str, Any]:
        x, y = self.dset[i]
        return {"jpg": x, "cls": y}

    def __len__(self) -> int:
        return len(self.dset)


class LabelledLoader(pl.LightningDataModule):
    """A training and a test set, the latter for validation, too; a subclass names the set.

    Args:
        batch_size: of every loader.
        num_workers: loader processes.
        prefetch_factor: batches that each of them holds ready.
        shuffle: all three loaders, as published.
        root: folder of the files; relative to the working directory, as published.
        download: fetch the files if they are not there.

    Raises:
        FileNotFoundError: they are not there, and not to be had; the message says where they belong.
    """

    kind: Callable[..., Any]
    wrapper: type[DataDictWrapper] = DataDictWrapper
    files: Sequence[str]  # what to put where by hand, below root

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        shuffle: bool = True,
        root: str = ROOT,
        download: bool = True,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.shuffle = batch_size, num_workers, shuffle
        self.prefetch_factor = prefetch_factor if num_workers > 0 else None
        self.root, self.download = root, download
        self.train_dataset = self.wrapper(self._open(train=True))
        self.test_dataset = self.wrapper(self._open(train=False))

    def _open(self, train: bool) -> Any:
        kind = type(self).kind
        try:
            return kind(self.root, train=train, download=False, transform=to_pixels)
        except RuntimeError as missing:
            problem: Exception = missing
        if self.download:
            logger.info("Fetching %s into %s.", kind.__name__, self.root)
            try:
                return kind(self.root, train=train, download=True, transform=to_pixels)
            except (OSError, RuntimeError) as error:
                problem = error
        raise FileNotFoundError(
            f"{kind.__name__} is not in {Path(self.root).absolute()} and cannot be fetched ({problem}). Put these files there: "
            f"{', '.join(self.files)}"
        ) from problem

    def prepare_data(self) -> None:
        """Nothing: the constructor has opened the files."""

    def setup(self, stage: str | None = None) -> None:
        """Nothing, likewise."""

    def _loader(self, dataset: Dataset) -> DataLoader:
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=self.shuffle, num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        """Batches of the training set."""
        return self._loader(self.train_dataset)

    def test_dataloader(self) -> DataLoader:
        """Batches of the test set."""
        return self._loader(self.test_dataset)

    def val_dataloader(self) -> DataLoader:
        """Batches of the test set."""
        return self._loader(self.test_dataset)
