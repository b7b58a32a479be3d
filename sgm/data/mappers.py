"""What becomes of a sample on its way from a shard into a batch; configurations name these as `sdata.mappers.…`, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import Compose

from sgm.util import object_from
from taming.models.base import entry_of

Sample = MutableMapping[str, Any]
STORED_SIZE = "__size__"  # height and width of the picture as it lay in the shard


class TorchVisionImageTransforms:
    """torchvision's transforms, one after another, on one entry.

    Args:
        transforms: configurations of them, or they themselves.
        key: the entry.
    """

    def __init__(self, transforms: Sequence[Any], key: str = "jpg") -> None:
        self.key, self.transform = key, Compose([object_from(t) for t in transforms])

    def __call__(self, sample: Sample) -> Sample:
        """The sample with the entry transformed.

        Raises:
            KeyError: there is no such entry.
        """
        sample[self.key] = self.transform(entry_of(sample, self.key))
        return sample


class Rescaler:
    """From [0, 1] to [-1, 1].

    Args:
        key: the entry.
        isfloat: False for whole numbers from 0 to 255.
        strict: raise where the entry is missing; False leaves such samples as they are.
    """

    def __init__(self, key: str = "jpg", isfloat: bool = True, strict: bool = True) -> None:
        self.key, self.isfloat, self.strict = key, isfloat, strict

    def __call__(self, sample: Sample) -> Sample:
        """The sample with the entry rescaled.

        Raises:
            KeyError: there is no such entry (`strict`).
            TypeError: it is no tensor.
        """
        if self.key not in sample and not self.strict:
            return sample
        x = entry_of(sample, self.key)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self.key!r} is a {type(x).__name__}; put torchvision.transforms.ToTensor before Rescaler"
            )
        sample[self.key] = (x if self.isfloat else x.float() / 255.0) * 2.0 - 1.0
        return sample


class AddOriginalImageSizeAsTupleAndCropToSquare:
    """Cut a square along the longer side, anywhere, and say where and from what: SDXL's size and crop conditions.

    It adds `original_size_as_tuple` (height, width), of the picture before anything was scaled, and `crop_coords_top_left`
    (top, left), of the square in the scaled one.

    Args:
        h_key, w_key: entries with the original size; where a sample has none, it is that of the picture in the shard.
        image_key: the picture, a tensor (c, h, w).
        use_data_key: look for them among the meta data, under `data_key`; otherwise in the sample itself.
        data_key: the meta data's entry.
        random_crop: False cuts from the middle.

    Source: Podell et al. 2023 (SDXL), section 2.2.
    """

    def __init__(
        self,
        h_key: str = "original_height",
        w_key: str = "original_width",
        image_key: str = "jpg",
        use_data_key: bool = True,
        data_key: str = "json",
        random_crop: bool = True,
    ) -> None:
        self.h_key, self.w_key, self.image_key = h_key, w_key, image_key
        self.use_data_key, self.data_key, self.random_crop = use_data_key, data_key, random_crop

    def __call__(self, sample: Sample) -> Sample:
        """The sample with the square, and both entries, (2,) each.

        Raises:
            KeyError: there is no picture, or its original size is not known.
            TypeError: the picture is no tensor.
        """
        x = entry_of(sample, self.image_key)
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self.image_key!r} is a {type(x).__name__}; put torchvision.transforms.ToTensor first"
            )
        side = min(x.shape[-2:])
        room = [length - side for length in x.shape[-2:]]
        top, left = (
            (int(torch.randint(n + 1, ())) for n in room) if self.random_crop else (n // 2 for n in room)
        )
        sample[self.image_key] = x[..., top : top + side, left : left + side]
        sample["original_size_as_tuple"] = torch.tensor(self._original_size(sample))
        sample["crop_coords_top_left"] = torch.tensor([top, left])
        return sample

    def _original_size(self, sample: Mapping[str, Any]) -> list[int]:
        data = sample.get(self.data_key, {}) if self.use_data_key else sample
        if self.h_key in data and self.w_key in data:
            return [int(data[self.h_key]), int(data[self.w_key])]
        return list(entry_of(sample, STORED_SIZE))


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples as a batch: tensors, arrays and numbers are stacked, all else, such as texts, becomes a list.

    Entries that not all samples have, and those that begin with two underscores, are left out.

    Raises:
        ValueError: tensors of different shapes; names the entry.
    """
    shared = [key for key in samples[0] if not key.startswith("__") and all(key in s for s in samples)]
    batch: dict[str, Any] = {}
    for key in shared:
        values = [s[key] for s in samples]
        if isinstance(values[0], Tensor | np.ndarray | int | float):
            tensors = [torch.as_tensor(v) for v in values]
            if len(shapes := {tuple(t.shape) for t in tensors}) > 1:
                raise ValueError(
                    f"the entries {key!r} of a batch are of the shapes {sorted(shapes)}; cut them to one size first"
                )
            batch[key] = torch.stack(tensors)
        else:
            batch[key] = values
    return batch


def from_config(config: Any) -> Callable[[Sample], Sample]:
    """The mapper that a configuration describes; `sdata.mappers.…` are those of this file."""
    if isinstance(config, Mapping) and str(config.get("target", "")).startswith("sdata.mappers."):
        config = {**config, "target": f"{__name__}.{str(config['target']).rpartition('.')[2]}"}
    return object_from(config)
