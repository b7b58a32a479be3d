"""Weights for a module, named in a configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import nn

from taming.checkpoint import load_into, load_state_dict


class CheckpointEngine:
    """Called with a module, it loads a file's weights into it; names that either side lacks are reported, not refused.

    Args:
        ckpt_path: .ckpt or .safetensors.
        ignore_keys: entries whose names begin with one of these are left out.
    """

    def __init__(self, ckpt_path: str | os.PathLike[str], ignore_keys: Sequence[str] = ()) -> None:
        self.ckpt_path, self.ignore_keys = ckpt_path, list(ignore_keys)

    def __call__(self, module: nn.Module) -> None:
        """Load.

        Raises:
            CheckpointError: unreadable, of other shapes, or not one name fits.
        """
        load_into(module, load_state_dict(self.ckpt_path), self.ignore_keys, source=self.ckpt_path)
