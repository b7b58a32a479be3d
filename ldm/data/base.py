"""The interface of text-to-image data sets that can be chained."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import IterableDataset

logger = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """A stream of pictures with texts; `torch.utils.data.ChainDataset` puts several one after the other.

    Subclasses define `__iter__`.

    Attributes:
        sample_ids: the same as `valid_ids`.

    Args:
        num_records: its length.
        valid_ids: names of the samples, if they have any.
        size: of the square pictures.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size
        logger.info("%s has %d samples.", type(self).__name__, len(self))

    def __len__(self) -> int:
        return self.num_records

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError(f"{type(self).__name__} must define __iter__, which yields its samples")
