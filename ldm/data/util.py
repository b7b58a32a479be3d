"""What data pipelines add to their samples."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from ldm.modules.midas.api import load_midas_transform


class AddMiDaS:
    """Adds `midas_in`, what a depth network of that type wants to see, to a sample with a picture under `jpg`.

    Args:
        model_type: a key of `ldm.modules.midas.api.TRANSFORMS`.
    """

    def __init__(self, model_type: str) -> None:
        self.transform = load_midas_transform(model_type)

    def __call__(self, sample: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """`jpg` (h, w, 3) in [-1, 1] stays; `midas_in` (3, h', w') float32 joins it, in the sample itself.

        Raises:
            KeyError: the sample has no `jpg`.
        """
        if "jpg" not in sample:
            raise KeyError(f"a sample needs a picture under 'jpg'; this one has: {', '.join(sample)}")
        picture = torch.as_tensor(sample["jpg"])
        sample["midas_in"] = self.transform({"image": ((picture + 1.0) * 0.5).numpy()})["image"]
        return sample
