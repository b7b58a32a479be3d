"""Lightning's checkpoints through `taming.checkpoint`: read without running code, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.plugins.io import TorchCheckpointIO

from taming.checkpoint import load_checkpoint, save_checkpoint


class SafeCheckpointIO(TorchCheckpointIO):
    """Saves beside the old file and renames; reads with stand-ins instead of pickled classes."""

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a training checkpoint; an older file of that name stays until the new one is complete."""
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a training checkpoint of Lightning 1 or 2."""
        return load_checkpoint(
            path, map_location="cpu" if map_location is None or callable(map_location) else map_location
        )
