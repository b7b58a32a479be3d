"""MNIST: 70,000 handwritten digits of 28×28 pixels (LeCun et al. 1998)."""

from __future__ import annotations

from torchvision.datasets import MNIST

from sgm.data.labelled import DataDictWrapper, LabelledLoader

__all__ = ["MNISTDataDictWrapper", "MNISTLoader"]


class MNISTDataDictWrapper(DataDictWrapper):
    """See `DataDictWrapper`."""


class MNISTLoader(LabelledLoader):
    """Digits as {"jpg": (1, 28, 28) in [-1, 1], "cls": 0 to 9}; arguments and errors are those of `LabelledLoader`."""

    kind = MNIST
    wrapper = MNISTDataDictWrapper
    files = tuple(
        f"MNIST/raw/{part}-idx{axes}-ubyte.gz"
        for split in ("train", "t10k")
        for part, axes in ((f"{split}-images", 3), (f"{split}-labels", 1))
    )
