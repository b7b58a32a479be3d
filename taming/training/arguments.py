"""Trainer arguments of yesterday and today: flags for all of them, and their translation to the installed Lightning."""

from __future__ import annotations

import argparse
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from pytorch_lightning import Trainer

from taming.util import ConfigError, nearest

logger = logging.getLogger(__name__)

# given by the command line itself
OWN_ARGUMENTS = {"logger", "callbacks", "plugins", "default_root_dir", "model_registry"}
CURRENT = [
    n for n in inspect.signature(Trainer.__init__).parameters if n != "self" and n not in OWN_ARGUMENTS
]

# arguments of Lightning 1 that only have another name today
RENAMED: dict[str, str] = {
    "weights_summary": "enable_model_summary",
    "checkpoint_callback": "enable_checkpointing",
    "replace_sampler_ddp": "use_distributed_sampler",
    "terminate_on_nan": "detect_anomaly",
    "reload_dataloaders_every_epoch": "reload_dataloaders_every_n_epochs",
}
AS_FLAG = {"enable_model_summary", "enable_checkpointing", "use_distributed_sampler", "detect_anomaly"}

# arguments of Lightning 1 that are gone, and why that is no loss
GONE: dict[str, str] = {
    "amp_backend": "torch's own mixed precision is the only one",
    "amp_level": "torch's own mixed precision has no levels",
    "auto_lr_find": "use pytorch_lightning.tuner.Tuner",
    "auto_scale_batch_size": "use pytorch_lightning.tuner.Tuner",
    "auto_select_gpus": "devices=auto chooses",
    "flush_logs_every_n_steps": "the loggers decide",
    "log_gpu_memory": "main.CUDACallback reports it",
    "move_metrics_to_cpu": "metrics are kept where they were made",
    "multiple_trainloader_mode": "there is one training loader",
    "prepare_data_per_node": "set it on the data module",
    "process_position": "progress bars find their place",
    "stochastic_weight_avg": "use pytorch_lightning.callbacks.StochasticWeightAveraging",
    "track_grad_norm": "log it in a callback",
    "truncated_bptt_steps": "no model here uses it",
    "weights_save_path": "checkpoints lie in the run's folder",
}
# handled one by one in `translate`
LEGACY = {
    "gpus",
    "tpu_cores",
    "distributed_backend",
    "progress_bar_refresh_rate",
    "resume_from_checkpoint",
    *RENAMED,
    *GONE,
}
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def add_trainer_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every argument of the installed Trainer, and (unlisted) for those of Lightning 1."""
    group = parser.add_argument_group("trainer", "arguments of pytorch_lightning.Trainer, values as in YAML")
    taken = {option for action in parser._actions for option in action.option_strings}
    for name in [*CURRENT, *sorted(LEGACY)]:
        if f"--{name}" not in taken:
            hidden = argparse.SUPPRESS if name in LEGACY else None
            group.add_argument(
                f"--{name}",
                type=_yaml_value,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                metavar="X",
                help=hidden,
            )


def _yaml_value(text: str) -> Any:
    # `--gpus 0,` is a list of one; YAML would read a string
    return text if "," in text and not text.startswith(("[", "{")) else yaml.safe_load(text)


def split_overrides(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """Separate `a.b=c` overrides from flags, before a flag with an optional value (`-t a.b=c`) can swallow one."""
    argv = list(argv)
    overrides = [a for a in argv if re.match(r"[A-Za-z_]\w*(\.\w+)+=", a)]
    return overrides, [a for a in argv if a not in overrides]


def trainer_options(section: Any, options: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """Arguments for the Trainer: the configuration's section, then flags over it, in today's names.

    Returns:
        The arguments, and the number of devices (for learning-rate scaling).

    Raises:
        ConfigError: an argument that no Lightning ever had.
    """
    container: Any = OmegaConf.to_container(section, resolve=True)
    given = dict(container)
    given |= {k: v for k, v in vars(options).items() if k in {*CURRENT, *LEGACY} and v is not None}
    kwargs = translate(given)
    if kwargs.get("precision") == "auto":
        kwargs["precision"] = best_precision(kwargs.get("accelerator", "auto"))
    return kwargs, device_count(kwargs)


def translate(given: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer arguments of any Lightning since 1.0 in the names of the installed one; what changed is logged.

    Raises:
        ConfigError: an unknown name.
    """
    kwargs: dict[str, Any] = {}
    for name, value in given.items():
        if name in CURRENT or name == "resume_from_checkpoint":
            kwargs[name] = value
        elif name in GONE:
            logger.warning("Trainer argument %s=%s is gone and ignored: %s.", name, value, GONE[name])
        elif name in RENAMED:
            kwargs[RENAMED[name]] = (
                value not in (None, False, "None", "null") if RENAMED[name] in AS_FLAG else int(value)
            )
        elif name not in LEGACY:
            raise ConfigError(
                f"lightning.trainer.{name}: the Trainer has no such argument. {nearest(name, CURRENT)}"
            )
    if (rate := given.get("progress_bar_refresh_rate")) is not None:
        kwargs["enable_progress_bar"] = bool(rate)
    _translate_devices(given, kwargs)
    if "precision" in kwargs:
        kwargs["precision"] = PRECISIONS.get(str(kwargs["precision"]), kwargs["precision"])
    return {k: v for k, v in kwargs.items() if v is not None}


def _translate_devices(given: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
    """`gpus: 0,1` and `accelerator: ddp` (or `distributed_backend`) into devices, accelerator and strategy."""
    backend = given.get("distributed_backend") or given.get("accelerator")
    if isinstance(backend, str) and backend.startswith(("ddp", "dp", "deepspeed", "fsdp")):
        kwargs["strategy"] = kwargs.get("strategy", "ddp" if backend == "dp" else backend)
        kwargs.pop("accelerator", None)
    gpus = given.get("gpus")
    if gpus in (None, 0, "", "0", False, []):
        return
    if isinstance(gpus, str):
        parts = [p for p in gpus.split(",") if p.strip()]
        # `--gpus 2` means two devices, `--gpus 2,` the third one
        gpus = [int(p) for p in parts] if "," in gpus else int(parts[0])
    if not torch.cuda.is_available():
        raise ConfigError(
            f"gpus={given['gpus']!r} was asked for, but no CUDA device is visible; use --accelerator cpu"
        )
    kwargs["accelerator"] = "gpu"
    kwargs["devices"] = gpus
    if (gpus if isinstance(gpus, int) else len(gpus)) not in (0, 1):
        kwargs.setdefault("strategy", "ddp")


def device_count(kwargs: Mapping[str, Any]) -> int:
    """How many devices a Trainer with these arguments uses, over all nodes."""
    devices, accelerator = kwargs.get("devices", "auto"), kwargs.get("accelerator", "auto")
    nodes = int(kwargs.get("num_nodes", 1))
    if isinstance(devices, list):
        return nodes * len(devices)
    if devices in ("auto", -1, "-1"):
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return nodes * (torch.cuda.device_count() if on_gpu else 1)
    if isinstance(devices, str) and "," in devices:
        return nodes * len([p for p in devices.split(",") if p.strip()])
    return nodes * int(devices)


def best_precision(accelerator: str) -> str:
    """The fastest training precision that needs no loss scaling: bfloat16 where the hardware computes in it."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16-mixed" if cpu_computes_bf16() else "32-true"
    return "32-true"


def cpu_computes_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them bfloat16 is slower than float32."""
    probes: list[Callable[[], bool]] = [
        getattr(torch.cpu, name)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if hasattr(torch.cpu, name)
    ]
    return any(probe() for probe in probes)
