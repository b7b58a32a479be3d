"""Whole models ⇄ the parts of a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ldm.conversion.autoencoder import autoencoder_table
from ldm.conversion.picture import is_openclip_picture, picture_table
from ldm.conversion.table import KeyTable
from ldm.conversion.text import clip_table, openclip_table
from ldm.conversion.unet import looks_at_frames, unet_table
from ldm.conversion.video import VideoFirstStage
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import CLIPTextModel
from taming.util import nearest


class Network(NamedTuple):
    """A part of a model that the other libraries have, too."""

    part: str  # its folder in a pipeline: unet, vae, text_encoder, text_encoder_2, image_encoder
    path: str  # where it stands in the model, "" for the model itself
    module: nn.Module
    elsewhere: Mapping[str, str] = {}  # where its own parts stand, if they do not stand together

    @property
    def prefixes(self) -> dict[str, str]:
        """Beginnings of its own names, and what they are in the model."""
        if self.elsewhere:
            return {f"{own}.": f"{path}." for own, path in self.elsewhere.items()}
        return {"": f"{self.path}." if self.path else ""}

    def inside(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its weights under its own names, from those of the model."""
        places = self.prefixes.items()
        return {own + k.removeprefix(p): v for own, p in places for k, v in state.items() if k.startswith(p)}

    def outside(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back."""
        places = self.prefixes.items()
        return {
            p + k.removeprefix(own): v for own, p in places for k, v in weights.items() if k.startswith(own)
        }


def is_openclip(module: nn.Module) -> bool:
    """Whether it is open_clip's `CLIP`, told without importing it."""
    return hasattr(module, "ln_final") and hasattr(getattr(module, "transformer", None), "resblocks")


def networks(model: nn.Module) -> Iterator[Network]:
    """The UNet, the first stage, the text encoders and, of a model of video, the picture encoder, in this order; the first
    of each kind, texts all.

    Works for `LatentDiffusion`, for models of the same make with several text encoders, and for one of the networks alone.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {
        "unet": [],
        "vae": [],
        "text_encoder": [],
        "image_encoder": [],
    }
    for path, module in model.named_modules():
        if isinstance(module, UNetModel):
            found["unet"].append((path, module))
        elif is_openclip_picture(module):
            found["image_encoder"].append((path, module))
        elif isinstance(module, CLIPTextModel) or is_openclip(module):
            found["text_encoder"].append((path, module))
        elif all(hasattr(module, name) for name in ("encoder", "decoder", "quant_conv", "post_quant_conv")):
            found["vae"].append((path, module))
    video = found["unet"] and looks_at_frames(found["unet"][0][1])
    for part, places in found.items():
        if part == "vae" and video:
            yield from _first_stage_of_video(model, places)
            continue
        if part == "image_encoder" and not video:
            continue
        for i, (path, module) in enumerate(places if part == "text_encoder" else places[:1]):
            yield Network(part if i == 0 else f"{part}_{i + 1}", path, module)


def _first_stage_of_video(model: Any, autoencoders: list[tuple[str, nn.Module]]) -> Iterator[Network]:
    """The encoder of the picture that a clip continues, and the decoder of the clip."""
    first_stage = getattr(model, "first_stage_model", None)
    condition = next((p for p in autoencoders if p[1] is not first_stage), None)
    if first_stage is None or condition is None:
        return
    path, module = condition
    halves = VideoFirstStage(module, first_stage)
    places = {
        name: f"{path}.{name}" if name in ("encoder", "quant_conv") else f"first_stage_model.{name}"
        for name, _ in halves.named_children()
    }
    yield Network("vae", "", halves, places)


def network_table(module: nn.Module, **options: Any) -> KeyTable:
    """The table for a network: a UNet, a first stage, a text transformer or a picture tower.

    Args:
        module: the network.
        options: of the function for its kind: `vector` of `unet_table`, `skip_last` and `projection` of `openclip_table`.
    """
    if isinstance(module, UNetModel):
        return unet_table(module, **options)
    if isinstance(module, CLIPTextModel):
        return clip_table(module, **options)
    if is_openclip_picture(module):
        return picture_table(module)
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
    for network in networks(model):
        table = network_table(network.module, **(options or {}).get(network.part, {}))
        converted[network.part] = table.to_diffusers(network.inside(own))
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
        table = network_table(known[part].module, **(options or {}).get(part, {}))
        state |= known[part].outside(table.from_diffusers(weights))
    return state
