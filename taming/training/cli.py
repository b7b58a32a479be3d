"""The training command line: YAML files and flags become a model, its data and a Lightning trainer.

`python main.py -b base.yaml [more.yaml …] [-t] [--max_epochs 10 …] [model.params.x=y …]`
"""

from __future__ import annotations

import argparse
import glob
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ProgressBar, TQDMProgressBar

from taming.checkpoint import CheckpointError
from taming.training.arguments import add_trainer_arguments, split_overrides, trainer_options
from taming.training.assembly import make_callbacks, make_loggers
from taming.training.checkpointing import SafeCheckpointIO
from taming.training.folders import RunFolder, UsageError
from taming.util import ConfigError, instantiate_from_config, nearest

logger = logging.getLogger(__name__)

SECTIONS = ("model", "data", "lightning", "trainer")


# ---------------------------------------------------------------------------------------------------------- arguments


def str2bool(text: str | bool) -> bool:
    """`yes/true/t/y/1` and `no/false/f/n/0`, in any case."""
    if isinstance(text, bool):
        return text
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected yes or no, not {text!r}")


def get_parser() -> argparse.ArgumentParser:
    """Every flag of the four published training scripts, and every argument of today's and yesterday's Trainer."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Further arguments `a.b=c` override the configuration, e.g. lightning.trainer.accelerator=gpu data.params.batch_size=8.",
    )
    switch: dict[str, Any] = {"type": str2bool, "nargs": "?", "const": True}
    parser.add_argument("-n", "--name", nargs="?", const=True, default="", help="postfix for the log folder")
    parser.add_argument(
        "-r",
        "--resume",
        nargs="?",
        const=True,
        default="",
        help="continue from a log folder or a checkpoint in it",
    )
    parser.add_argument(
        "-b",
        "--base",
        nargs="*",
        metavar="config.yaml",
        default=[],
        help="configurations, merged from left to right",
    )
    parser.add_argument(
        "-t", "--train", default=None, help="train (default: no; yes for configurations of sgm)", **switch
    )
    parser.add_argument("--no-test", default=False, help="do not run the test split afterwards", **switch)
    parser.add_argument(
        "-p", "--project", help="name of a new project, or path to an old one (accepted, unused)"
    )
    parser.add_argument(
        "-d", "--debug", default=False, help="post-mortem debugging; the run moves to debug_runs", **switch
    )
    parser.add_argument("-s", "--seed", type=int, default=23, help="for seed_everything")
    parser.add_argument("-f", "--postfix", default="", help="appended to the default name")
    parser.add_argument("-l", "--logdir", default="logs", help="folder for the runs")
    parser.add_argument(
        "--scale_lr",
        default=None,
        help="base_learning_rate × GPUs × batch size × accumulation (default: yes; no for configurations of sgm)",
        **switch,
    )
    parser.add_argument("--no_date", default=False, help="no time stamp in the log folder's name", **switch)
    parser.add_argument(
        "--no_base_name", default=False, help="no configuration name in the log folder's name", **switch
    )
    parser.add_argument(
        "--legacy_naming",
        default=False,
        help="name the log folder after the first configuration's path",
        **switch,
    )
    parser.add_argument(
        "--enable_tf32", default=False, help="TensorFloat-32 matrix products on GPUs", **switch
    )
    parser.add_argument(
        "--startup", default=None, help="time at which the job was started (accepted, unused)"
    )
    parser.add_argument("--wandb", default=False, help="log to Weights & Biases", **switch)
    parser.add_argument("--projectname", default="stablediffusion", help="project on Weights & Biases")
    parser.add_argument(
        "--resume_from_checkpoint",
        default=None,
        help="checkpoint to take weights, optimizers and counters from",
    )
    add_trainer_arguments(parser)
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Flags and dot-list overrides.

    Raises:
        UsageError: an argument that is neither.
    """
    overrides, flags = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = get_parser()
    options, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        raise UsageError(
            f"unknown argument {unknown[0]!r}. {nearest(unknown[0], known)} Overrides are written a.b=c."
        )
    return options, overrides


# ------------------------------------------------------------------------------------------------------ configuration


def load_config(bases: Sequence[str], overrides: Sequence[str]) -> DictConfig:
    """Merge YAML files from left to right, then the overrides.

    Raises:
        UsageError: a file is missing or no YAML, or a section's name is unknown.
    """
    if not bases:
        raise UsageError("nothing to run: name a configuration with -b/--base, or a run with -r/--resume")
    parts: list[DictConfig | ListConfig] = []
    for base in bases:
        if not os.path.isfile(base):
            found = glob.glob("configs/**/*.yaml", recursive=True)
            raise UsageError(f"there is no configuration {base}. {nearest(base, found) if found else ''}")
        try:
            parts.append(OmegaConf.load(base))
        except Exception as error:  # yaml's errors carry line and column
            raise UsageError(f"{base} is no valid YAML: {error}") from error
    try:
        config = OmegaConf.merge(*parts, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise UsageError(f"cannot merge {', '.join([*bases, *overrides])}: {error}") from error
    assert isinstance(config, DictConfig)
    for name in config:
        if name not in SECTIONS:
            logger.warning(
                "the configuration's section %r is not used. %s", name, nearest(str(name), SECTIONS)
            )
    for section in ("model", "data"):
        if section not in config or not config[section].get("target"):
            raise UsageError(
                f"{', '.join(bases)} has no section `{section}` with a `target`; it has: {', '.join(map(str, config))}"
            )
    return config


def effective_learning_rate(config: DictConfig, scale: bool, devices: int, accumulate: int) -> float | None:
    """`base_learning_rate`, times accumulation × devices × batch size if `scale`; says what it did."""
    base = config.model.get("base_learning_rate")
    if base is None:
        return None
    if not scale:
        logger.info("Learning rate %.2e (not scaled).", base)
        return float(base)
    batch_size = config.data.params.batch_size
    rate = accumulate * devices * batch_size * base
    logger.info(
        "Learning rate %.2e = %d (accumulate_grad_batches) × %d (devices) × %d (batch size) × %.2e (base_learning_rate). Scaling is off with --scale_lr no.",
        rate, accumulate, devices, batch_size, base,
    )  # fmt: skip
    return float(rate)


# ---------------------------------------------------------------------------------------------------------------- run


def hand_over_manual_options(model: Any, kwargs: dict[str, Any]) -> None:
    """Give clipping and accumulation to a model that optimizes by hand: the trainer refuses them there."""
    if kwargs.get("strategy") == "ddp":
        # as in Lightning 1: some weights (the other player's, unused heads) get no gradient in a step
        kwargs["strategy"] = "ddp_find_unused_parameters_true"
    if getattr(model, "automatic_optimization", True):
        return
    for name in ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"):
        value = kwargs.pop(name, None)
        if value is not None:
            setattr(model, name, value)


def install_signal_handlers(save: Callable[[], None]) -> None:
    """SIGUSR1 saves a checkpoint, SIGUSR2 opens a debugger (where the system has these signals)."""

    def debug(*_: Any) -> None:
        import pdb

        pdb.set_trace()

    for name, action in (("SIGUSR1", lambda *_: save()), ("SIGUSR2", debug)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), action)


def run(options: argparse.Namespace, overrides: Sequence[str], run_folder: RunFolder) -> None:
    """Train and test as the flags and configurations say."""
    pl.seed_everything(options.seed)
    config = load_config(run_folder.bases, overrides)
    lightning = config.pop("lightning", None) or OmegaConf.create()
    lightning.trainer = OmegaConf.merge(lightning.get("trainer") or {}, config.pop("trainer", None) or {})
    is_sgm = str(config.model.get("target", "")).startswith("sgm.")
    train = options.train if options.train is not None else is_sgm
    scale = options.scale_lr if options.scale_lr is not None else not is_sgm
    kwargs, devices = trainer_options(lightning.trainer, options)
    lightning.trainer = OmegaConf.create(
        {k: v for k, v in kwargs.items() if isinstance(v, str | int | float | bool | list)}
    )
    if options.enable_tf32:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

    model = instantiate_from_config(config.model)
    accumulate = kwargs.get("accumulate_grad_batches") or 1
    rate = effective_learning_rate(config, scale, devices, accumulate)
    if rate is not None:
        model.learning_rate = rate
    hand_over_manual_options(model, kwargs)
    resume = kwargs.pop("resume_from_checkpoint", None) or run_folder.checkpoint
    run_folder.checkpoint = resume
    callbacks = make_callbacks(lightning, config, model, run_folder)
    if kwargs.get("enable_progress_bar", True) and not any(isinstance(c, ProgressBar) for c in callbacks):
        callbacks.append(TQDMProgressBar())
    trainer = Trainer(
        **kwargs,
        logger=make_loggers(lightning, run_folder, options),
        callbacks=callbacks,
        default_root_dir=run_folder.logdir,
        plugins=[SafeCheckpointIO()],
    )
    data = instantiate_from_config(config.data)
    data.prepare_data()
    data.setup()
    for name, dataset in getattr(data, "datasets", {}).items():
        logger.info(
            "%s: %s of %s",
            name,
            type(dataset).__name__,
            len(dataset) if hasattr(dataset, "__len__") else "unknown length",
        )

    def save_last() -> None:
        if trainer.global_rank == 0:
            logger.info("Saving a checkpoint.")
            trainer.save_checkpoint(os.path.join(run_folder.ckptdir, "last.ckpt"))

    install_signal_handlers(save_last)
    if train:
        started = time.time()
        try:
            trainer.fit(model, data, ckpt_path=resume)
        except Exception:
            if trainer.global_step > 0 and not options.debug:
                save_last()
            raise
        if trainer.interrupted:
            logger.warning("Stopped. Continue with: python main.py -t -r %s", run_folder.logdir)
            return
        logger.info(
            "Trained %d steps in %s. %s",
            trainer.global_step,
            _clock(time.time() - started),
            _what_next(model, run_folder.logdir),
        )
    if not options.no_test and "test" in getattr(data, "datasets", {}):
        trainer.test(model, data, verbose=True)


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _what_next(model: Any, logdir: str) -> str:
    lines = [
        f"\n  pictures     {os.path.join(logdir, 'images')}",
        f"  loss curve   {os.path.join(logdir, 'loss_curve.png')}",
        f"  weights      {os.path.join(logdir, 'checkpoints', 'last.ckpt')}",
        f"  go on        python main.py -t -r {logdir}",
    ]
    if hasattr(model, "next_steps"):
        lines.append(model.next_steps(logdir))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # nothing a user could act on
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings(
        "ignore", message=".*module.s. in eval mode at the start of training.*"
    )  # frozen on purpose
    warnings.filterwarnings(
        "ignore", message=".*Checkpoint directory .* exists and is not empty.*"
    )  # a resumed run
    warnings.filterwarnings("ignore", message=".*no pre-optimization state was saved.*")
    # a discriminator that rests before `disc_start` has a multiplier that moves and an optimizer that does not yet
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    sys.path.append(os.getcwd())  # users' own targets lie beside their configurations
    options, run_folder = argparse.Namespace(debug=False), None
    try:
        options, overrides = parse(argv)
        run_folder = RunFolder(options)
        run(options, overrides, run_folder)
    except (UsageError, ConfigError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:
        if not options.debug:
            raise
        import pdb
        import traceback

        traceback.print_exc()
        pdb.post_mortem()
        return 1
    finally:
        if (
            options.debug
            and not options.resume
            and run_folder is not None
            and os.path.isdir(run_folder.logdir)
        ):
            target = Path(run_folder.logdir).parent / "debug_runs" / run_folder.name
            target.parent.mkdir(exist_ok=True)
            shutil.move(run_folder.logdir, target)
    return 0
