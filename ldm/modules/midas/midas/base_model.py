"""What the depth networks share: loading their published files."""

from __future__ import annotations

import os

from torch import nn

from taming.checkpoint import load_into, load_state_dict


class BaseModel(nn.Module):
    """A network that can load its weights from a file."""

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take weights from a published file (or a training's, under `model`).

        Raises:
            CheckpointError: unreadable, or of another network.
        """
        load_into(self, load_state_dict(path), source=path, strict=True)
