"""The names that low-rank adapters have in files: kohya's, and those of diffusers and peft."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.conversion.checkpoint import Network, is_openclip, networks
from ldm.conversion.table import Row
from ldm.conversion.text import THIRDS, openclip_rows
from ldm.conversion.unet import unet_rows
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from taming.checkpoint import CheckpointError

# ------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """A weight that an adapter can be added to.

    Args:
        part: "unet", "text_encoder" or "text_encoder_2".
        ours: the layer's path in our network.
        theirs: its path in diffusers' or transformers' network, None if there is none.
        layer: what is called; an attention of PyTorch's own does not call the layers within it.
        holder: what has the weight …
        name: … under this name.
        third: 0, 1 or 2 if it is one of three stacked weights.
    """

    part: str
    ours: str
    theirs: str | None
    layer: Any
    holder: Any
    name: str = "weight"
    third: int | None = None

    @property
    def weight(self) -> Tensor:
        """The weight, of which a change changes the layer, (out, in, …)."""
        whole: Tensor = getattr(self.holder, self.name)
        return whole if self.third is None else whole.chunk(3)[self.third]


def places(model: nn.Module) -> list[Place]:
    """All linear layers and convolutions of a model's UNet and text encoders, in their order.

    Raises:
        ValueError: there is neither.
    """
    found = [p for network in _networks(model) for p in _places(network)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no UNet and no text encoder to adapt")
    return found


def _networks(model: nn.Module) -> Iterator[Network]:
    known = [n for n in networks(model) if n.part not in ("vae", "image_encoder")]
    yield from known
    encoder = getattr(model, "cond_stage_model", None)
    if isinstance(encoder, nn.Module) and all(n.part == "unet" for n in known):
        yield Network("text_encoder", "cond_stage_model", encoder)  # of another kind, BERT or T5


def _rows(network: Network) -> Iterator[Row]:
    module = network.module
    if isinstance(module, UNetModel):
        return unet_rows(module)
    if is_openclip(module):
        return openclip_rows(module)
    named = any(name == "text_model" for name, _ in module.named_children())
    return (Row(name, name if named else None) for name, _ in module.named_parameters())


def _places(network: Network) -> Iterator[Place]:
    modules = dict(network.module.named_modules())
    for row in _rows(network):
        path, _, name = row.ours.rpartition(".")
        holder, parent = modules[path], modules[path.rpartition(".")[0]]
        theirs = row.theirs and row.theirs.rpartition(".")[0]
        if isinstance(holder, nn.MultiheadAttention) and name == "in_proj_weight":
            third = row.third or 0
            ours = f"{path}.{THIRDS[third]}"
            yield Place(network.part, ours, theirs, holder, holder, name, third)
        elif name == "weight" and _adaptable(holder):
            layer = parent if isinstance(parent, nn.MultiheadAttention) else holder
            yield Place(network.part, path, theirs, layer, holder)


def _adaptable(layer: nn.Module) -> bool:
    convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1
    return isinstance(layer, nn.Linear) or convolution


# ------------------------------------------------------------------------------------------------------------ writing

# beginnings of kohya's names; the first is what we write
KOHYA = {"unet": ("lora_unet",), "text_encoder": ("lora_te", "lora_te1"), "text_encoder_2": ("lora_te2",)}


def key(place: Place, two_texts: bool = False, ldm_blocks: bool = True) -> str:
    """Kohya's name of a layer.

    Args:
        place: the layer.
        two_texts: the model has two text encoders, so that the first has a number, too.
        ldm_blocks: the UNet's blocks as here (`input_blocks`) rather than as in diffusers (`down_blocks`).
    """
    ours = place.theirs is None or (ldm_blocks and place.part == "unet")
    begin = KOHYA[place.part][two_texts and place.part == "text_encoder"]
    return f"{begin}_{place.ours if ours else place.theirs}".replace(".", "_")


def diffusers_key(place: Place) -> str:
    """diffusers' name of a layer.

    Raises:
        ValueError: its network has no such layer.
    """
    if place.theirs is None:
        raise ValueError(
            f"{place.part}.{place.ours} has no counterpart in diffusers; save in layout 'kohya-ldm'"
        )
    return f"{place.part}.{place.theirs}"


# ------------------------------------------------------------------------------------------------------------ reading


def spellings(place: Place) -> Iterator[str]:
    """All names by which files are known to call a layer."""
    paths = [p for p in (place.theirs, place.ours) if p]
    if place.part != "unet":
        paths += [p.removeprefix("text_model.") for p in paths]  # transformers 5 has no such level
    for path in dict.fromkeys(paths):
        yield from (f"{begin}_{path}".replace(".", "_") for begin in KOHYA[place.part])
        yield f"{place.part}.{path}"
        if place.part == "unet":
            yield from (f"{begin}{path}" for begin in ("", "diffusion_model.", "model.diffusion_model."))


# endings of names, and what of a layer they hold
ROLES = {
    "down": r"\.(?:lora_down|lora_A(?:\.\w+)?|lora(?:_linear_layer)?\.down)\.weight$",
    "up": r"\.(?:lora_up|lora_B(?:\.\w+)?|lora(?:_linear_layer)?\.up)\.weight$",
    "alpha": r"\.alpha$",
}
# attention processors named their adapters after the projections: `attn1.processor.to_q_lora.down.weight`
PROCESSOR = re.compile(r"\.(?:processor\.)?to_(q|k|v|out)_lora\.(down|up)\.weight$")
# what other methods leave in a file; to apply the rest of it without them would be wrong
OTHER_METHODS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_mid": "LoCon with a Tucker core", "hada_": "LoHa", "lokr_": "LoKr",
}  # fmt: skip


PEFT = "base_model.model."  # what peft puts before the names of its own files


def read_layers(
    state: Mapping[str, Tensor], notes: Mapping[str, Any], source: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The layers of a file: `{name: {"down": …, "up": …, "alpha": …}}`, and the entries that belong to none.

    Args:
        state: its tensors.
        notes: peft's configuration, which has the alphas; diffusers puts "unet." and the like before its names.
        source: its name, for messages.

    Raises:
        CheckpointError: it holds another kind of adapter, or half of a layer, or the notes a pattern that is none.
    """
    layers: dict[str, dict[str, Any]] = {}
    strange = []
    for name, value in state.items():
        if method := next((m for mark, m in OTHER_METHODS.items() if mark in name), None):
            raise CheckpointError(f"{source} holds {method} ({name}); only LoRA can be read")
        layer, role = _split(name.removeprefix(PEFT))
        if role is None:
            strange.append(name)
        else:
            layers.setdefault(layer, {})[role] = value
    for layer, parts in list(layers.items()):
        if parts.keys() == {"alpha"}:
            strange.append(f"{layer}.alpha")
            del layers[layer]
        elif lost := {"down", "up"} - parts.keys():
            raise CheckpointError(f"{source} is incomplete: {layer} has no {lost.pop()} weight")
        else:
            parts.setdefault("alpha", _noted_alpha(notes, layer, len(parts["down"]), source))
    return layers, strange


def _split(name: str) -> tuple[str, str | None]:
    """The layer that an entry belongs to, and its role there."""
    if match := PROCESSOR.search(name):
        projection, role = match.groups()
        text = name.startswith("text_encoder")
        layer = f"{projection}_proj" if text else "to_out.0" if projection == "out" else f"to_{projection}"
        return f"{name[: match.start()]}.{layer}", role
    for role, ending in ROLES.items():
        if match := re.search(ending, name):
            return name[: match.start()], role
    return name, None


def _noted_alpha(notes: Mapping[str, Any], layer: str, rank: int, source: str) -> float:
    """peft's α for a layer: its rank if the notes say nothing."""
    part, _, path = layer.partition(".")
    begin, path = (f"{part}.", path) if part in KOHYA else ("", layer)
    alpha = notes.get(f"{begin}lora_alpha", rank)
    for pattern, own in (notes.get(f"{begin}alpha_pattern") or {}).items():
        try:
            fits = re.fullmatch(rf"(.*\.)?({pattern})", path)
        except re.error as error:
            raise CheckpointError(f"{source}: alpha_pattern {pattern!r} is no pattern ({error})") from error
        if fits:
            alpha = own
            break
    # rank-stabilised LoRA divides by √r (Kalajdzievski 2023)
    return alpha * math.sqrt(rank) if notes.get(f"{begin}use_rslora") else alpha
