"""Checkpoints of a run: through `taming.checkpoint` (no code runs, nothing is half-written), and always the latest state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.callbacks import Checkpoint
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


class LastCheckpoint(Checkpoint):
    """Keeps one file at the latest state, to resume from.

    Lightning's `save_last` moves its file only when a ranked checkpoint is written (2.6): a run past its best validation
    would lose everything since then, and one whose `max_steps` lies between two saves its last steps.

    Args:
        path: the file.
        every_n_train_steps: save every so many steps.
        every_n_epochs: save at the end of every so many epochs; of every one, if neither rhythm is given. 0 is never, of both:
            then the end of the training is saved alone.
        save_weights_only: leave the optimizers' state out, so that the file cannot be resumed from.
    """

    def __init__(
        self,
        path: str,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        save_weights_only: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.every_n_train_steps = every_n_train_steps or 0
        neither = every_n_train_steps is None and every_n_epochs is None
        self.every_n_epochs = 1 if neither else every_n_epochs or 0
        self.save_weights_only = save_weights_only
        self.saved_at = -1

    def save(self, trainer: Any) -> None:
        """Write the file, unless it holds this step already."""
        if trainer.global_step != self.saved_at and not trainer.fast_dev_run:
            self.saved_at = trainer.global_step
            trainer.save_checkpoint(self.path, self.save_weights_only)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Save if this step is due; before the first one (its gradients may be gathered from several batches) there is nothing to."""
        every, step = self.every_n_train_steps, trainer.global_step
        if every and step and step % every == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Save if this epoch is due."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the end."""
        self.save(trainer)
