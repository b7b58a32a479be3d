"""Loggers and callbacks of a run: the published ones, with a configuration's sections merged over them."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from taming.training.folders import RunFolder
from taming.util import instantiate_from_config

logger = logging.getLogger(__name__)

# what `last.ckpt` has in common with the ranked checkpoints
LAST_OPTIONS = ("every_n_train_steps", "every_n_epochs", "save_weights_only")


def _default(target: str, **params: Any) -> Any:
    return OmegaConf.create({"target": target, "params": params})


def make_loggers(lightning: DictConfig, run: RunFolder, options: argparse.Namespace) -> list[Any]:
    """TensorBoard where it is installed, and always CSV; a `logger` section replaces or completes the first."""
    section = lightning.get("logger") or OmegaConf.create()
    if options.wandb:
        chosen = _default(
            "pytorch_lightning.loggers.WandbLogger",
            name=run.name,
            save_dir=run.logdir,
            project=options.projectname,
        )
    else:
        try:
            import tensorboard  # noqa: F401

            chosen = _default(
                "pytorch_lightning.loggers.TensorBoardLogger", name="testtube", save_dir=run.logdir
            )
        except ImportError:
            chosen = _default("pytorch_lightning.loggers.CSVLogger", name="testtube", save_dir=run.logdir)
    target = section.get("target", "")
    if target.endswith(("TestTubeLogger", "testtube.TestTubeLogger")):
        logger.warning(
            "TestTubeLogger no longer exists; logging with %s instead.", chosen.target.rpartition(".")[2]
        )
        section.pop("target")
    elif target and target != chosen.target:
        # another logger's parameters are its own
        chosen = _default(target, save_dir=run.logdir)
    loggers = [instantiate_from_config(OmegaConf.merge(chosen, section))]
    if not chosen.target.endswith("CSVLogger"):
        loggers.append(pl.loggers.CSVLogger(save_dir=run.logdir, name="csv", version=run.now))
    return loggers


def make_callbacks(lightning: DictConfig, config: DictConfig, model: Any, run: RunFolder) -> list[Any]:
    """The published callbacks with the `callbacks` and `modelcheckpoint` sections merged over them, and ours."""
    checkpoint: Any = _default(
        "pytorch_lightning.callbacks.ModelCheckpoint",
        dirpath=run.ckptdir,
        filename="{epoch:06}",
        verbose=True,
        save_last=True,
    )
    if getattr(model, "monitor", None) is not None:
        logger.info("Checkpoints are ranked by %s.", model.monitor)
        checkpoint.params.update({"monitor": model.monitor, "save_top_k": 3})
    checkpoint = OmegaConf.merge(checkpoint, lightning.get("modelcheckpoint") or {})
    if "period" in checkpoint.params:  # Lightning 1's name
        checkpoint.params.every_n_epochs = checkpoint.params.pop("period")
    last = _last_checkpoint(checkpoint, run)
    defaults = OmegaConf.create(
        {
            "setup_callback": {"target": "main.SetupCallback"},
            "image_logger": _default("main.ImageLogger", batch_frequency=750, max_images=4, clamp=True),
            "learning_rate_logger": _default("main.LearningRateMonitor", logging_interval="step"),
            "cuda_callback": {"target": "main.CUDACallback"},
            "random_state": {"target": "main.RandomState"},
            "loss_curve": _default("main.LossCurve", path=os.path.join(run.logdir, "loss_curve.png")),
            "checkpoint_callback": checkpoint,
            **({"last_checkpoint": last} if last is not None else {}),
        }
    )
    section = lightning.get("callbacks") or OmegaConf.create()
    if "metrics_over_trainsteps_checkpoint" in section:
        logger.warning(
            "Saving weights every n training steps without deleting older ones: this needs disk space."
        )
        defaults.metrics_over_trainsteps_checkpoint = _default(
            "pytorch_lightning.callbacks.ModelCheckpoint",
            dirpath=os.path.join(run.ckptdir, "trainstep_checkpoints"), filename="{epoch:06}-{step:09}", verbose=True,
            save_top_k=-1, every_n_train_steps=10000, save_weights_only=True,
        )  # fmt: skip
    merged: Any = OmegaConf.merge(defaults, section)
    if "ignore_keys_callback" in merged:
        if run.checkpoint:
            merged.ignore_keys_callback.params.ckpt_path = run.checkpoint
        else:
            merged.pop("ignore_keys_callback")
    setup = merged.pop("setup_callback")
    made = instantiate_from_config(
        {
            "target": setup.target,
            "params": {
                "resume": run.checkpoint or "", "now": run.now, "logdir": run.logdir, "ckptdir": run.ckptdir,
                "cfgdir": run.cfgdir, "config": config, "lightning_config": lightning, **(setup.get("params") or {}),
            },
        }
    )  # fmt: skip
    return [made, *(instantiate_from_config(merged[name]) for name in merged)]


def _last_checkpoint(checkpoint: DictConfig, run: RunFolder) -> DictConfig | None:
    """Our own keeper of `last.ckpt`, at the ranked checkpoints' rhythm and place, instead of Lightning's `save_last`.

    Where `dirpath: null` leaves the ranked ones' place to Lightning, this file lies where a run is resumed from.
    """
    params = checkpoint.params
    ours = checkpoint.target.endswith(".ModelCheckpoint") and params.get("train_time_interval") is None
    if not (ours and params.get("save_last")):
        return None
    params.save_last = False
    options = {k: params[k] for k in LAST_OPTIONS if params.get(k) is not None}
    path = os.path.join(params.get("dirpath") or run.ckptdir, "last.ckpt")
    return _default("taming.training.checkpointing.LastCheckpoint", path=path, **options)
