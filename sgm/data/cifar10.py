"""CIFAR-10: 60,000 photographs of 32×32 pixels in ten classes (Krizhevsky 2009)."""

from __future__ import annotations

from torchvision.datasets import CIFAR10

from sgm.data.labelled import ROOT, DataDictWrapper, LabelledLoader

__all__ = ["CIFAR10DataDictWrapper", "CIFAR10Loader"]


class CIFAR10DataDictWrapper(DataDictWrapper):
    """See `DataDictWrapper`."""


class CIFAR10Loader(LabelledLoader):
    """Photographs as {"jpg": (3, 32, 32) in [-1, 1], "cls": 0 to 9}; arguments and errors are those of `LabelledLoader`."""

    kind = CIFAR10
    wrapper = CIFAR10DataDictWrapper
    files = ("cifar-10-batches-py/ (unpack cifar-10-python.tar.gz)",)

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        root: str = ROOT,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, shuffle=shuffle, root=root, download=download)
