"""Whole models ⇄ the parts of a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.conversion.autoencoder import autoencoder_table
from ldm.conversion.table import KeyTable
from ldm.conversion.text import clip_table, openclip_table
from ldm.conversion.unet import unet_table
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import CLIPTextModel
from taming.util import nearest


class Network(NamedTuple):
    """A part of a model that the other libraries have, too."""

    part: str  # its folder in a pipeline: unet, vae, text_encoder, text_encoder_2
    path: str  # where it stands in the model, "" for the model itself
    module: nn.Module


def is_openclip(module: nn.Module) -> bool:
    """Whether it is open_clip's `CLIP`, told without importing it."""
    return hasattr(module, "ln_final") and hasattr(getattr(module, "transformer", None), "resblocks")


def networks(model: nn.Module) -> Iterator[Network]:
    """The UNet, the first stage and the text encoders of a model, in this order; the first of each kind, texts all.

    Works for `LatentDiffusion`, for models of the same make with several text encoders, and for one of the networks alone.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {"unet": [], "vae": [], "text_encoder": []}
    for path, module in model.named_modules():
        if isinstance(module, UNetModel):
            found["unet"].append((path, module))
        elif isinstance(module, CLIPTextModel) or is_openclip(module):
            found["text_encoder"].append((path, module))
        elif all(hasattr(module, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")):
            found["vae"].append((path, module))
    for part, places in found.items():
        for i, (path, module) in enumerate(places if part == "text_encoder" else places[:1]):
            yield Network(part if i == 0 else f"{part}_{i + 1}", path, module)


def network_table(module: nn.Module, **options: Any) -> KeyTable:
    """The table for a network: a UNet, a first stage or a text transformer.

    Args:
        module: the network.
        options: of the function for its kind: `vector` of `unet_table`, `skip_last` and `projection` of `openclip_table`.
    """
    if isinstance(module, UNetModel):
        return unet_table(module, **options)
    if isinstance(module, CLIPTextModel):
        return clip_table(module, **options)
    return (openclip_table if is_openclip(module) else autoencoder_table)(module, **options)


def to_diffusers(
    model: nn.Module,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """A model's weights as those of a pipeline's parts: `{"unet": …, "vae": …, "text_encoder": …}`.

    Args:
        model: on any device; its structure is what counts.
        options: `network_table`'s for each part, `{"text_encoder": {"skip_last": 1}}`.
        state: the weights; the model's own if None.

    Raises:
        CheckpointError: names are missing or left over.
        ValueError: an option that the other libraries do not have.
    """
    own = model.state_dict() if state is None else state
    converted = {}
    for part, path, module in networks(model):
        prefix = f"{path}." if path else ""
        inside = {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}
        table = network_table(module, **(options or {}).get(part, {}))
        converted[part] = table.to_diffusers(inside)
    return converted


def from_diffusers(
    model: nn.Module,
    parts: Mapping[str, Mapping[str, Tensor]],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """The way back: a pipeline's weights under the names of a model, for `taming.checkpoint.load_into`.

    Args:
        model: the model that they are for.
        parts: weights by part; parts that are not given are not in the result.
        options: see `to_diffusers`.

    Raises:
        CheckpointError: names are missing or left over.
        ValueError: a part that the model does not have.
    """
    known = {network.part: network for network in networks(model)}
    state: dict[str, Tensor] = {}
    for part, weights in parts.items():
        if part not in known:
            raise ValueError(f"{type(model).__name__} has no part {part!r}. {nearest(part, known)}")
        _, path, module = known[part]
        table = network_table(module, **(options or {}).get(part, {}))
        prefix = f"{path}." if path else ""
        state |= {f"{prefix}{k}": v for k, v in table.from_diffusers(weights).items()}
    return state
