"""Copies of models whose network has its linear layers in 8 bits, by torchao: made, written and read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from taming.checkpoint import build_empty, load_checkpoint, load_into, save_safetensors
from taming.util import instantiate_from_config, nearest

# names in torchao.quantization: weights alone are quantised, and multiplied in the precision of their inputs
KINDS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
KEY = "quantization"  # of a file's metadata
LEAST_FEATURES = 16  # below, there is nothing to gain


def _torchao() -> tuple[Any, Any]:
    """torchao's quantisers, and what writes their tensors.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from torchao import quantization
        from torchao.prototype.safetensors import safetensors_support
    except ImportError as error:
        raise ImportError("quantised models need python -m pip install torchao") from error
    return quantization, safetensors_support


def quantize(model: Any, kind: str) -> Any:
    """Quantise the linear layers of a model's network, in place; returns the model.

    Args:
        model: with its network as `model`.
        kind: a key of `KINDS`.

    Raises:
        ValueError: another kind.
        ImportError: torchao is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no quantisation {kind!r}. {nearest(kind, KINDS)}")
    tools, _ = _torchao()

    def wanted(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and min(module.weight.shape) >= LEAST_FEATURES

    tools.quantize_(model.model, getattr(tools, KINDS[kind])(), filter_fn=wanted)
    return model


def _parted(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The network's tensors, and the others; torchao takes no names without a dot, such as a schedule's."""
    network = {name: value for name, value in state.items() if name.startswith("model.")}
    return network, {name: value for name, value in state.items() if name not in network}


def save_quantized(
    model: nn.Module, path: str | os.PathLike[str], kind: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a quantised model as safetensors, which says how it is quantised."""
    _, support = _torchao()
    network, rest = _parted(model.state_dict())
    tensors, layout = support.flatten_tensor_state_dict(network)
    save_safetensors({**rest, **tensors}, path, {**(metadata or {}), KEY: kind, **layout})


def quantization_of(path: str | os.PathLike[str]) -> str | None:
    """How the model of a file is quantised, None if it is not."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(KEY)
    except SafetensorError:  # reading its weights says what is wrong
        return None


def load_quantized(
    config: Any, path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> nn.Module:
    """A model as `save_quantized` left it, in eval mode, without gradients.

    Args:
        config: with a `model` section.
        path: of the weights.
        device: where the model goes.

    Raises:
        ImportError: torchao is not installed.
        CheckpointError: the weights do not fit the configuration.
    """
    _, support = _torchao()
    loaded = load_checkpoint(path)
    tensors, rest = _parted(loaded["state_dict"])
    network, _left = support.unflatten_tensor_state_dict(tensors, loaded["metadata"])
    with build_empty():
        model = instantiate_from_config(config.model).requires_grad_(False)
    load_into(model, {**rest, **network}, source=path, strict=True, assign=True)
    return model.to(device).eval()
