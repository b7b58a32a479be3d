"""Checkpoints, read safely and written whole: the one place of the library that opens weight files.

Files from strangers are untrusted: `.safetensors` cannot carry code, and of a pickle nothing but data is read
(`taming.checkpoint_pickles`). `taming.checkpoint_files` knows the files that one checkpoint may consist of, and
`taming.checkpoint_loading` brings them into a model with little more memory than the model needs.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from taming.checkpoint_files import (
    INDEX,
    Weights,
    files_of,
    in_checkout,
    locate,
    read_index,
    read_safetensors,
    tensors_of,
)
from taming.checkpoint_loading import build_empty, load_into, load_model_from_config, stream_into
from taming.checkpoint_pickles import CheckpointError, Inert, read_pickle
from taming.util import atomic_path, nearest

__all__ = [
    "CheckpointError", "Inert", "Weights", "averaged_weights", "build_empty", "files_of", "find_run", "load_checkpoint", "load_data",
    "load_into", "load_model_from_config", "load_state_dict", "save_checkpoint", "save_safetensors", "save_shards", "stream_into", "tensors_of",
]  # fmt: skip

logger = logging.getLogger(__name__)

# what the folder of a run or of a published model holds, the best first
WEIGHT_FILES = (
    "checkpoints/last.ckpt",
    "last.ckpt",
    "model.ckpt",
    "model.safetensors",
    f"model.safetensors{INDEX}",
)

# ------------------------------------------------------------------------------------------------------------ reading


def load_data(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> Any:
    """Read whatever a file of weights or other tensors holds, without running any code in it.

    Args:
        path: `.safetensors`, a pickle written by torch or by Lightning 1 or 2, the index of either in several files
            (`.index.json`), or the folder of one network of diffusers' kind; a relative path is looked up in the
            working directory, then in the checkout that holds this package.
        map_location: where the tensors go.

    Returns:
        What was saved. A safetensors file comes as `{"state_dict": …, "metadata": …}`, an index as `{"state_dict": …}`.

    Raises:
        FileNotFoundError: no such file; neighbours with a similar name are suggested.
        CheckpointError: truncated, not a checkpoint, or it names something that would run code.
    """
    path = locate(path)
    if path.name.endswith(INDEX):
        state: dict[str, Tensor] = {}
        for file in sorted(set(read_index(path).values())):
            state |= load_state_dict(file, map_location)
        return {"state_dict": state}
    if path.suffix == ".safetensors":
        return read_safetensors(path, str(map_location))
    return read_pickle(path, map_location)


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """As `load_data`, for a file that holds a dict.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: see `load_data`, or it holds something else.
    """
    loaded = load_data(path, map_location)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dict of weights")
    return dict(loaded)


def load_state_dict(
    path: str | os.PathLike[str], map_location: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """The weights of a checkpoint: its `state_dict` entry if it has one, else the tensors of the file itself."""
    return tensors_of(load_checkpoint(path, map_location), path)


def averaged_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights with the moving averages (`model_ema.…`) in the place of the live ones, and without them.

    Raises:
        CheckpointError: there are no averages.
    """
    shadows = {k.removeprefix("model_ema."): v for k, v in state_dict.items() if k.startswith("model_ema.")}
    averages = {k: v for k, v in shadows.items() if k not in ("decay", "num_updates")}
    if not averages:
        raise CheckpointError("the checkpoint holds no moving averages (model_ema.…)")
    merged = {}
    for name, value in state_dict.items():
        if not name.startswith("model_ema."):
            # of a diffusion model the network alone is averaged, under its name within `model`; of a first stage everything
            keys = (name.removeprefix("model.").replace(".", ""), name.replace(".", ""))
            merged[name] = next((averages[k] for k in keys if k in averages), value)
    return merged


# ------------------------------------------------------------------------------------------------------------ writing


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """`torch.save` that replaces an older file only when the new one is complete."""
    with atomic_path(path) as temporary:
        torch.save(dict(checkpoint), temporary)


def save_safetensors(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        state_dict: names and tensors; tensors that share memory are written out separately.
        path: the file.
        metadata: strings to store beside them.
    """
    tensors = {
        k: v.detach().to("cpu").clone(memory_format=torch.contiguous_format) for k, v in state_dict.items()
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def save_shards(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    max_size: int,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """As `save_safetensors`, in several files and an index where one would be too large.

    Args:
        state_dict: names and tensors.
        path: `<stem>.safetensors`; several are `<stem>-00001-of-00002.safetensors`, … and `<stem>.safetensors.index.json`.
        max_size: of one file's tensors, in bytes.
        metadata: strings to store in each file.

    Returns:
        The files of tensors.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    path = Path(path)
    plan = split_torch_state_dict_into_shards(
        dict(state_dict), filename_pattern=f"{path.stem}{{suffix}}{path.suffix}", max_shard_size=max_size
    )
    for name, members in plan.filename_to_tensors.items():
        save_safetensors({member: state_dict[member] for member in members}, path.with_name(name), metadata)
    if plan.is_sharded:  # last: an index speaks of files that are there
        with atomic_path(f"{path}{INDEX}") as temporary:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    return [path.with_name(name) for name in plan.filename_to_tensors]


# ------------------------------------------------------------------------------------------------------- run folders


def find_run(path: str | os.PathLike[str]) -> tuple[Path, list[Path]]:
    """The checkpoint and configuration files of a training run or a published model folder.

    Args:
        path: a log folder (`logs/<run>`), a checkpoint inside one, a published folder with `config.yaml` and `model.ckpt`, or a
            folder of log folders (`logs`), whose newest checkpoint is taken; a path that is not there is looked for in the
            checkout, too.

    Returns:
        The checkpoint's path and the configurations to merge, in order (may be empty for a lone checkpoint).

    Raises:
        FileNotFoundError: nothing there to load.
    """
    path = in_checkout(path)
    if path.is_dir():
        folder, ckpt = path, next((path / c for c in WEIGHT_FILES if (path / c).is_file()), None)
        if ckpt is None and (runs := list(path.glob("*/checkpoints/last.ckpt"))):
            ckpt = max(runs, key=lambda run: run.stat().st_mtime)
            folder = ckpt.parents[1]
            logger.info("The newest run in %s is %s", path, folder.name)
        if ckpt is None:
            raise FileNotFoundError(
                f"{path} holds none of {', '.join(WEIGHT_FILES)}. Has the run saved a checkpoint yet?"
            )
    elif path.is_file():
        ckpt, folder = path, path.parent.parent if path.parent.name == "checkpoints" else path.parent
    else:
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no folder or file {str(path)!r}. {nearest(path.name, around)}")
    configs = sorted(folder.glob("configs/*-project.yaml")) or [
        c for c in (folder / "config.yaml", ckpt.with_suffix(".yaml")) if c.is_file()
    ]
    return ckpt, configs[-1:] if configs and configs[0].name.endswith("-project.yaml") else configs[:1]
