"""Callbacks of a training run: its folders, pictures, loss curve, clock and random state."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from taming.util import atomic_path

logger = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Makes a run's folders, saves its configuration, and saves a checkpoint when the user interrupts it.

    Args:
        resume: path that the run was resumed from, or empty.
        now: time stamp of the run, in the saved configurations' names.
        logdir, ckptdir, cfgdir: folders of the run.
        config: the merged project configuration.
        lightning_config: the `lightning` section in effect.
        debug: do not save a checkpoint on interruption.
        ckpt_name: name of that checkpoint.
    """

    def __init__(
        self,
        resume: Any,
        now: str,
        logdir: str,
        ckptdir: str,
        cfgdir: str,
        config: Any,
        lightning_config: Any,
        debug: bool = False,
        ckpt_name: str | None = None,
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = logdir, ckptdir, cfgdir
        self.config, self.lightning_config = config, lightning_config
        self.debug = debug
        self.ckpt_name = ckpt_name or "last.ckpt"

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was learned when Ctrl-C ends the run."""
        if isinstance(exception, KeyboardInterrupt) and not self.debug and trainer.global_rank == 0:
            path = os.path.join(self.ckptdir, self.ckpt_name)
            logger.warning("Interrupted: saving %s", path)
            trainer.save_checkpoint(path)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make the folders and write `<now>-project.yaml` and `<now>-lightning.yaml`."""
        if trainer.global_rank != 0 or stage != "fit":
            return
        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            os.makedirs(folder, exist_ok=True)
        parts = {"project": self.config, "lightning": OmegaConf.create({"lightning": self.lightning_config})}
        for name, part in parts.items():
            with atomic_path(os.path.join(self.cfgdir, f"{self.now}-{name}.yaml")) as temporary:
                OmegaConf.save(part, temporary)


class ImageLogger(Callback):
    """Writes what a model's `log_images` returns as picture grids under `images/train` and `images/val`.

    Pictures are drawn at steps 1, 2, 4, 8, … up to `batch_frequency` and then at its multiples.

    Args:
        batch_frequency: steps between pictures.
        max_images: at most so many of a batch.
        clamp: cut values to [-1, 1].
        increase_log_steps: draw at the powers of two, too.
        rescale: the values lie in [-1, 1]; False if they lie in [0, 1].
        disabled: draw nothing.
        log_on_batch_idx: count batches of the epoch instead of training steps.
        log_first_step: draw at step 0, too.
        log_images_kwargs: further arguments for `log_images`.
        log_before_first_step: draw before the first step.
        enable_autocast: draw under the precision that training uses.

    Raises:
        ValueError: `batch_frequency` is below 1.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        log_before_first_step: bool = False,
        enable_autocast: bool = True,
    ) -> None:
        super().__init__()
        if batch_frequency < 1:
            raise ValueError(
                f"batch_frequency={batch_frequency} must be at least 1; disabled=true switches pictures off"
            )
        self.batch_freq = batch_frequency
        self.max_images = max_images
        self.log_steps = (
            [2**n for n in range(int(math.log2(batch_frequency)) + 1)]
            if increase_log_steps
            else [batch_frequency]
        )
        self.clamp, self.rescale = clamp, rescale
        self.disabled = disabled
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.log_before_first_step = log_before_first_step
        self.enable_autocast = enable_autocast

    def check_frequency(self, check_idx: int) -> bool:
        """Whether pictures are due at this count; a hit uses up the first of the remaining powers of two."""
        due = check_idx % self.batch_freq == 0 or check_idx in self.log_steps
        due = due and (check_idx > 0 or self.log_first_step)
        if due and self.log_steps:
            self.log_steps.pop(0)
        return due

    @rank_zero_only
    def log_local(
        self,
        save_dir: str,
        split: str,
        images: Mapping[str, Tensor],
        global_step: int,
        current_epoch: int,
        batch_idx: int,
    ) -> None:
        """Write `images/{split}/{key}_gs-{step}_e-{epoch}_b-{batch}.png`, a grid of four columns for each entry.

        Args:
            save_dir: the run's folder.
            split: "train" or "val".
            images: batches (n, c, h, w), or single grids (c, h, w), in [-1, 1] (or [0, 1] without `rescale`).
            global_step, current_epoch, batch_idx: for the names.
        """
        root = Path(save_dir) / "images" / split
        root.mkdir(parents=True, exist_ok=True)
        for key, value in images.items():
            grid = torchvision.utils.make_grid(value, nrow=4)
            grid = (grid + 1.0) / 2.0 if self.rescale else grid
            pixels = (grid.permute(1, 2, 0).float().numpy() * 255).astype(np.uint8)
            name = f"{key}_gs-{global_step:06}_e-{current_epoch:06}_b-{batch_idx:06}.png"
            with atomic_path(root / name) as temporary:
                Image.fromarray(pixels).save(temporary, format="PNG")

    @rank_zero_only
    def log_img(self, pl_module: Any, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Draw the pictures of a batch, if they are due and the model knows how; its mode stays as it was."""
        check_idx = batch_idx if self.log_on_batch_idx else pl_module.global_step
        draw = getattr(pl_module, "log_images", None)
        if not (callable(draw) and self.max_images > 0 and self.check_frequency(check_idx)):
            return
        was_training = pl_module.training
        if was_training:
            pl_module.eval()
        images: Mapping[str, Any] = {}
        try:
            with torch.no_grad(), self._precision(pl_module):
                images = draw(batch, split=split, **self.log_images_kwargs)
        except FloatingPointError as error:  # a sampler met infinite latents: no reason to end the training
            logger.warning("No pictures at step %d: %s", pl_module.global_step, error)
        kept = {}
        for key, value in images.items():
            if not isinstance(value, Tensor):
                continue
            # a grid (c, h, w) must not lose channels to max_images
            value = value[: self.max_images] if value.ndim > 3 else value
            value = value.detach().cpu()
            kept[key] = value.clamp(-1.0, 1.0) if self.clamp else value
        folder = (
            pl_module.logger.save_dir if pl_module.logger is not None else pl_module.trainer.default_root_dir
        )
        self.log_local(folder, split, kept, pl_module.global_step, pl_module.current_epoch, batch_idx)
        if was_training:
            pl_module.train()

    @contextlib.contextmanager
    def _precision(self, pl_module: Any) -> Iterator[None]:
        trainer = getattr(pl_module, "_trainer", None)
        if self.enable_autocast and trainer is not None:
            with trainer.precision_plugin.forward_context():
                yield
        else:
            yield

    @rank_zero_only
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Pictures of the untrained model, on request."""
        if self.log_before_first_step and pl_module.global_step == 0 and not self.disabled:
            logger.info("%s: drawing before training", type(self).__name__)
            self.log_img(pl_module, batch, batch_idx, split="train")

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Pictures of training batches."""
        if not self.disabled and (pl_module.global_step > 0 or self.log_first_step):
            self.log_img(pl_module, batch, batch_idx, split="train")

    @rank_zero_only
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Pictures of validation batches, and gradient norms where the model calibrates them."""
        if not self.disabled and pl_module.global_step > 0:
            self.log_img(pl_module, batch, batch_idx, split="val")
        if (
            hasattr(pl_module, "calibrate_grad_norm")
            and pl_module.calibrate_grad_norm
            and batch_idx % 25 == 0
            and batch_idx > 0
        ):
            self.log_gradients(trainer, pl_module, batch_idx=batch_idx)

    def log_gradients(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Hook for subclasses that record gradient norms."""


class CUDACallback(Callback):
    """Reports each epoch's time and peak GPU memory; does nothing on a CPU."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            torch.cuda.synchronize(pl_module.device)
            self.start_time = time.time()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop it and say what was used, averaged over the processes."""
        if pl_module.device.type != "cuda":
            return
        torch.cuda.synchronize(pl_module.device)
        seconds = trainer.strategy.reduce(
            torch.tensor(time.time() - self.start_time, device=pl_module.device)
        )
        memory = trainer.strategy.reduce(
            torch.tensor(torch.cuda.max_memory_allocated(pl_module.device) / 2**20, device=pl_module.device)
        )
        if trainer.is_global_zero:
            logger.info(
                "Average epoch time: %.2f s, average peak memory: %.0f MiB", float(seconds), float(memory)
            )


class RandomState(Callback):
    """Saves the random generators' states in the checkpoint, so that a resumed run draws what the first would have drawn."""

    def state_dict(self) -> dict[str, Any]:
        """States of Python's, numpy's and torch's generators, as plain data."""
        version, internal, gauss = random.getstate()
        state: Any = np.random.get_state()
        name, keys, position, has_gauss, cached = state
        return {
            "python": [version, list(internal), gauss],
            "numpy": [
                str(name),
                torch.from_numpy(keys.astype(np.int64)),
                int(position),
                int(has_gauss),
                float(cached),
            ],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states back."""
        version, internal, gauss = state_dict["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state_dict["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state_dict["torch"].cpu())
        if state_dict["cuda"] and len(state_dict["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([s.cpu() for s in state_dict["cuda"]])


class LossCurve(Callback):
    """Draws the course of the losses into `loss_curve.png`; the points travel in the checkpoint.

    Args:
        path: the picture.
        every_n_steps: steps between points; a point is the mean of those steps.
        keys: metrics to draw; None takes the training losses that the progress bar shows, and the validation's monitor.
    """

    def __init__(self, path: str, every_n_steps: int = 10, keys: list[str] | None = None) -> None:
        super().__init__()
        self.path = path
        self.every_n_steps = every_n_steps
        self.keys = keys
        self.points: dict[str, list[list[float]]] = {}
        self._sums: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the curve of an earlier run."""
        self.points = {k: [list(p) for p in v] for k, v in state_dict["points"].items()}

    def _wanted(self, name: str) -> bool:
        return (
            name in self.keys
            if self.keys is not None
            else name.startswith(("train/", "val")) and "loss" in name
        )

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Add this step's losses to the running means."""
        for name, value in trainer.progress_bar_metrics.items():
            if (
                self._wanted(name)
                and name.startswith("train/")
                and not name.endswith("_epoch")
                and math.isfinite(value)
            ):
                self._sums.setdefault(name.removesuffix("_step"), []).append(float(value))
        if trainer.global_step % self.every_n_steps == 0:
            for name, values in self._sums.items():
                self.points.setdefault(name, []).append([trainer.global_step, sum(values) / len(values)])
            self._sums = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Add the validation's losses, and draw."""
        if trainer.sanity_checking:
            return
        shown = {
            getattr(pl_module, "monitor", None),
            "val/rec_loss",
            "val/loss_simple",
            "val/loss_simple_ema",
        }
        for name, value in trainer.callback_metrics.items():
            if name in shown and self._wanted(name):
                self.points.setdefault(name, []).append([trainer.global_step, float(value)])
        self.draw()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the whole course."""
        self.draw()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Draw what there is."""
        self.draw()

    @rank_zero_only
    def draw(self) -> None:
        """Write the picture; without matplotlib, say how to get one."""
        curves: dict[str, np.ndarray] = {}
        for name, values in sorted(self.points.items()):
            # a total that consists of one term is that term's curve again
            points = np.array(values)
            if values and not any(
                c.shape == points.shape and np.allclose(c, points) for c in curves.values()
            ):
                curves[name] = points
        if not curves:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            logger.warning(
                "No loss curve: it needs matplotlib (python -m pip install 'latent-generative-models[quickstart]')."
            )
            return
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for name, points in curves.items():
            style = (
                {"marker": "o", "markersize": 4} if name.startswith("val") else {"alpha": 0.8, "linewidth": 1}
            )
            axes.plot(points[:, 0], points[:, 1], label=name, **style)
        axes.set(xlabel="training step", ylabel="loss")
        if min(points[:, 1].min() for points in curves.values()) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(self.path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
