"""Tools of chapter three: those of the chapters below, and a few for tensors, attributes by path and partial objects."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.sampling_util import append_dims
from ldm.util import autocast, isimage, ismap, log_txt_as_img, mean_flat
from taming import checkpoint
from taming.util import (
    count_params,
    default,
    disabled_train,
    exists,
    get_obj_from_str,
    instantiate_from_config,
)

__all__ = [
    "append_dims", "append_zero", "autocast", "count_params", "default", "disabled_train", "exists", "expand_dims_like",
    "get_configs_path", "get_nested_attribute", "get_obj_from_str", "get_string_from_tuple", "instantiate_from_config",
    "is_power_of_two", "isheatmap", "isimage", "ismap", "isneighbors", "load_model_from_config", "load_partial_from_config",
    "log_txt_as_img", "make_path_absolute", "mean_flat", "object_from", "partialclass",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ tensors


def append_zero(x: Tensor) -> Tensor:
    """A vector (n,) with a 0 behind it."""
    return torch.cat([x, x.new_zeros(1)])


def expand_dims_like(x: Tensor, y: Tensor) -> Tensor:
    """Append axes of length 1 to x until it has as many as y.

    Raises:
        ValueError: it has more already.
    """
    return append_dims(x, y.ndim)


def isheatmap(x: Any) -> bool:
    """A map without batch and channels: two axes."""
    return isinstance(x, Tensor) and x.ndim == 2


def isneighbors(x: Any) -> bool:
    """A batch of several images each: five axes, the third with one or three channels."""
    return isinstance(x, Tensor) and x.ndim == 5 and x.shape[2] in (1, 3)


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, …"""
    return n > 0 and n & (n - 1) == 0


# ------------------------------------------------------------------------------------------------------------ objects


def partialclass(cls: type, *args: Any, **kwargs: Any) -> type:
    """A subclass whose constructor has some arguments filled in."""
    return type(cls.__name__, (cls,), {"__init__": functools.partialmethod(cls.__init__, *args, **kwargs)})  # type: ignore[misc]


def load_partial_from_config(config: Mapping[str, Any]) -> Any:
    """The target of a `{target, params}` configuration with its parameters filled in, not called yet."""
    return functools.partial(get_obj_from_str(config["target"]), **(config.get("params") or {}))


def object_from(config: Any) -> Any:
    """What a configuration describes, or the object itself where one is given."""
    return instantiate_from_config(config) if isinstance(config, Mapping) else config


def get_nested_attribute(
    obj: Any, attribute_path: str, depth: int | None = None, return_key: bool = False
) -> Any:
    """The object at a dotted path such as `layers.0.weight`; a number counts the entries of a list.

    Args:
        obj: where the path begins.
        attribute_path: attributes, joined by dots.
        depth: follow only the first so many.
        return_key: return the followed part of the path, too.

    Raises:
        AttributeError, IndexError: nothing is there; a note says on which path.
    """
    parts = attribute_path.split(".")[:depth]
    try:
        for part in parts:
            is_index = part.isdigit() and isinstance(obj, Sequence)
            obj = obj[int(part)] if is_index else getattr(obj, part)
    except (AttributeError, IndexError) as error:
        error.add_note(f"on the path {attribute_path!r}")
        raise
    return (obj, ".".join(parts)) if return_key else obj


def get_string_from_tuple(s: str) -> Any:
    """The first entry of a tuple written as text, `"('a', 2)"` → `"a"`; any other text as it is."""
    try:
        found = ast.literal_eval(s) if s.startswith("(") and s.endswith(")") else None
    except (SyntaxError, ValueError):
        return s
    return found[0] if isinstance(found, tuple) and found else s


# -------------------------------------------------------------------------------------------------------------- files


def make_path_absolute(path: str) -> str:
    """The absolute form of a local path; an address such as s3://… as it is."""
    return path if "://" in path else os.path.abspath(path)


def get_configs_path() -> str:
    """The folder of the shipped configurations: in the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    here = Path(__file__).resolve().parent
    places = (here / "configs", here.parent / "configs")
    for place in places:
        if place.is_dir():
            return str(place)
    raise FileNotFoundError(
        f"there is no folder {places[0]} or {places[1]}; install the package again, or work in a checkout of it"
    )


def load_model_from_config(
    config: Any, ckpt: str | os.PathLike[str] | None, verbose: bool = True, freeze: bool = True
) -> nn.Module:
    """Build `config.model`, put a checkpoint's weights into it, and set it to eval; see `taming.checkpoint`.

    Args:
        config: a configuration with a `model` section.
        ckpt: .ckpt or .safetensors; None keeps the fresh weights.
        verbose: list the names that are missing or left over.
        freeze: switch off all gradients.

    Raises:
        KeyError: there is no `model` section.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if not isinstance(config, Mapping) or "model" not in config:
        raise KeyError(
            "load_model_from_config needs a configuration with a `model` section; wrap it: {'model': …}"
        )
    model = checkpoint.load_model_from_config(config, ckpt, verbose=verbose)
    return model.requires_grad_(False) if freeze else model
