"""Where a training run writes: a new folder, or that of the run it resumes."""

from __future__ import annotations

import argparse
import datetime
import glob
import os
from pathlib import Path

from taming.util import nearest


class UsageError(Exception):
    """A command line or configuration that cannot be run; the message is all a user needs to see."""


class RunFolder:
    """Where a run writes: new, or that of the run it resumes.

    Args:
        options: parsed flags.

    Raises:
        UsageError: name and resume together, or nothing to resume from.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        self.checkpoint: str | None = options.resume_from_checkpoint
        self.bases: list[str] = list(options.base)
        if options.resume:
            self._resume(options)
        else:
            self.logdir = os.path.join(options.logdir, self._name(options))
        self.name = os.path.basename(self.logdir.rstrip("/"))
        self.ckptdir = os.path.join(self.logdir, "checkpoints")
        self.cfgdir = os.path.join(self.logdir, "configs")

    def _name(self, options: argparse.Namespace) -> str:
        if options.name and options.name is not True:
            name = f"_{options.name}"
        elif self.bases and not options.no_base_name:
            first = Path(self.bases[0])
            name = f"_{first.stem}"
            if options.legacy_naming and "configs" in first.parts:
                name = "_" + "_".join(first.with_suffix("").parts[first.parts.index("configs") + 1 :])
        else:
            name = ""
        stem = f"{name.removeprefix('_')}" if options.no_date else f"{self.now}{name}"
        return (stem + options.postfix) or self.now

    def _resume(self, options: argparse.Namespace) -> None:
        if options.name:
            raise UsageError(
                "-n/--name and -r/--resume cannot be used together: a resumed run keeps its folder. To start a new run from "
                "old weights, use -n with --resume_from_checkpoint or model.params.ckpt_path."
            )
        path = Path("" if options.resume is True else options.resume)
        if not path.exists() or options.resume is True:
            runs = sorted(p.name for p in Path(options.logdir).glob("*") if (p / "checkpoints").is_dir())
            raise UsageError(f"cannot resume: there is no {str(path)!r}. {nearest(path.name, runs)}")
        if path.is_file():
            # logs/<run>/checkpoints/x.ckpt: the run's folder is two levels up
            self.logdir, self.checkpoint = str(path.parent.parent), str(path)
        else:
            self.logdir = str(path)
            self.checkpoint = str(path / "checkpoints" / "last.ckpt")
            if not os.path.isfile(self.checkpoint):
                raise UsageError(
                    f"cannot resume: {path} has no checkpoints/last.ckpt; the run ended before it saved one"
                )
        self.bases = sorted(glob.glob(os.path.join(self.logdir, "configs/*.yaml"))) + self.bases
