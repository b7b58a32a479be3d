"""Low-rank adaptation: small additions to the weights of the UNet and the text encoder (Hu et al. 2021).

    lora = load_lora(model, "style.safetensors", scale=0.8)   # any layout; several at once add up
    lora.scale = 0.5                                          # at any time
    lora.merge(); lora.unmerge()                              # into the weights, and out again to the bit
    lora.detach()

A layer W then computes Wx + scale · (α/r) · B(Ax). Adapters hang on the layers as hooks: the model's own weights keep their
names, and its `state_dict` does not know of adapters that were loaded so. To train, give a `LatentDiffusion` a `lora_config`.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import lora_keys
from ldm.lora_keys import Place, places
from taming.checkpoint import CheckpointError, load_checkpoint, save_safetensors, tensors_of
from taming.checkpoint_files import locate
from taming.util import nearest

logger = logging.getLogger(__name__)

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# the projections of attention: of the UNet and of BERT, and of CLIP
TARGETS = ("to_q", "to_k", "to_v", "to_out", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
LAYOUTS = ("kohya", "kohya-ldm", "diffusers")
PEFT_CONFIG = "adapter_config.json"


class Adapter(nn.Module):
    """The addition to one weight, B·A, which begins as zero.

    Args:
        place: the weight.
        rank: r, rows of A.
        alpha: α; the addition is multiplied by α/r. As the rank if None.
        dropout: rate on what comes in.

    Raises:
        ValueError: the rank is not a positive number.

    Source: Hu et al. 2021, section 4.1. Of a convolution, A has the kernel and B is 1×1.
    """

    alpha: Tensor

    def __init__(self, place: Place, rank: int, alpha: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"a LoRA's rank must be at least 1, not {rank}")
        out, width, *kernel = place.weight.shape
        if kernel:
            make, base = CONVOLUTIONS[len(kernel) - 1], place.holder
            self.lora_down = make(width, rank, kernel, base.stride, base.padding, base.dilation, bias=False)
            self.lora_up = make(rank, out, 1, bias=False)
        else:
            self.lora_down = nn.Linear(width, rank, bias=False)
            self.lora_up = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(rank if alpha is None else alpha)))
        self.dropout = nn.Dropout(dropout)
        self.place, self.rank, self.strength = place, rank, 1.0
        self.to(place.weight.device)

    @property
    def factor(self) -> Tensor:
        """scale · α/r."""
        return self.alpha * (self.strength / self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output for its input."""
        self.follow(x)
        x = self.dropout(x).to(self.lora_down.weight.dtype)
        return self.lora_up(self.lora_down(x)) * self.factor

    def delta(self) -> Tensor:
        """What is added to the layer's weight, in its shape."""
        self.follow(self.place.weight)
        product = self.lora_up.weight.flatten(1) @ self.lora_down.weight.flatten(1)
        return (product * self.factor).reshape(self.place.weight.shape)

    def follow(self, tensor: Tensor) -> None:
        """Move to a tensor's device: a model that moves does not know of loaded adapters."""
        if self.alpha.device != tensor.device:
            self.to(tensor.device)

    def attach(self) -> list[Any]:
        """Begin to add; the handles end it."""
        return [self.place.layer.register_forward_hook(self._add)]

    def _add(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + self(args[0]).to(output.dtype)


class WeightAdapter(Adapter):
    """For an attention of PyTorch's own, which computes with weights and calls no layers: its weight is exchanged meanwhile.

    With dropout, a feature of the input is dropped for all tokens at once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kept: list[Any] = []

    def attach(self) -> list[Any]:
        """As `Adapter`. The last to come is the first to go, so that several unwind to the weight itself."""
        layer = self.place.layer
        after = layer.register_forward_hook(self._restore, prepend=True, always_call=True)
        return [layer.register_forward_pre_hook(self._exchange), after]

    def _exchange(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        holder, name = self.place.holder, self.place.name
        delta = self.delta() * self.dropout(torch.ones_like(self.lora_down.weight[0]))
        if self.place.third is not None:
            rows = len(delta)
            delta = F.pad(delta, (0, 0, rows * self.place.third, rows * (2 - self.place.third)))
        self._kept.append(holder._parameters[name])
        holder._parameters[name] = self._kept[-1] + delta.to(self._kept[-1].dtype)

    def _restore(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.place.holder._parameters[self.place.name] = self._kept.pop()


def make_adapter(place: Place, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Adapter:
    """The adapter for a place, see `Adapter`."""
    kind = WeightAdapter if isinstance(place.layer, nn.MultiheadAttention) else Adapter
    return kind(place, rank, alpha, dropout)


@dataclass
class Merged:
    """A weight with adapters merged into it."""

    base: Tensor
    adapters: list[Adapter] = field(default_factory=list)


class Lora(nn.ModuleDict):
    """Adapters of a model that belong together: what one file holds. Its `state_dict` is in kohya's layout.

    Args:
        adapters: by the name that `lora_keys.key` gives.
        unused: entries of the file that fitted nowhere.
    """

    def __init__(self, adapters: Mapping[str, Adapter], unused: Iterable[str] = ()) -> None:
        super().__init__(adapters)
        self.unused = list(unused)
        self.merged = False
        self._scale = 1.0
        self._handles: list[Any] = []

    @property
    def scale(self) -> float:
        """How strong it is: 0 nothing, 1 as trained."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = float(scale)
        for adapter in self._adapters():
            adapter.strength = self._scale
            if self.merged:
                _write(adapter.place)

    def _adapters(self) -> list[Any]:
        return list(self.values())

    def attach(self) -> Lora:
        """Add to the layers' outputs from now on; returns itself.

        Raises:
            RuntimeError: it is merged already.
        """
        if self.merged:
            raise RuntimeError("this LoRA is merged into the weights; unmerge it before attaching it")
        if not self._handles:
            self._handles = [handle for adapter in self._adapters() for handle in adapter.attach()]
        return self

    def detach(self) -> Lora:
        """Add to the layers' outputs no longer; returns itself."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self

    def merge(self) -> Lora:
        """Add to the weights themselves, which costs nothing afterwards; returns itself. Several may be merged at once."""
        self.detach()
        for adapter in self._adapters() if not self.merged else ():
            place = adapter.place
            kept = vars(place.holder).setdefault("_merged_lora", {})
            whole = getattr(place.holder, place.name)
            kept.setdefault(place.name, Merged(whole.detach().clone())).adapters.append(adapter)
            _write(place)
        self.merged = True
        return self

    def unmerge(self) -> Lora:
        """Take it out of the weights, exactly and in any order; returns itself."""
        for adapter in self._adapters() if self.merged else ():
            adapter.place.holder._merged_lora[adapter.place.name].adapters.remove(adapter)
            _write(adapter.place)
        self.merged = False
        return self

    # ------------------------------------------------------------------------------------------- files

    def weights(self, layout: str = "kohya") -> dict[str, Tensor]:
        """The tensors of a file.

        Args:
            layout: "kohya" (`lora_unet_down_blocks_….lora_down.weight`), "kohya-ldm" (`lora_unet_input_blocks_…`, as SDXL's
                are), or "diffusers" (`unet.….lora_A.weight`), which has no place for α: α/r goes into B there.

        Raises:
            ValueError: unknown layout, or one that has no name for a layer.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r} is unknown. {nearest(layout, LAYOUTS)}")
        two = any(adapter.place.part == "text_encoder_2" for adapter in self._adapters())
        state: dict[str, Tensor] = {}
        for adapter in self._adapters():
            down, up = adapter.lora_down.weight.detach(), adapter.lora_up.weight.detach()
            if layout == "diffusers":
                name = lora_keys.diffusers_key(adapter.place)
                state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (adapter.alpha / adapter.rank)}  # fmt: skip
            else:
                name = lora_keys.key(adapter.place, two, ldm_blocks=layout == "kohya-ldm")
                state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": adapter.alpha}  # fmt: skip
        return state

    def save(self, path: str | os.PathLike[str], layout: str = "kohya") -> None:
        """Write a `.safetensors`, whole or not at all; its scale is not part of it.

        Args:
            path: the file.
            layout: see `weights`.
        """
        ranks = {adapter.rank for adapter in self._adapters()}
        alphas = {float(adapter.alpha) for adapter in self._adapters()}
        notes = {"ss_network_module": "networks.lora"} if layout != "diffusers" else {}
        if notes and len(ranks) == len(alphas) == 1:
            notes |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": str(alphas.pop())}
        save_safetensors(self.weights(layout), path, notes)


@torch.no_grad()
def _write(place: Place) -> None:
    """Compute a weight anew from what it was and what is merged into it."""
    record: Merged = place.holder._merged_lora[place.name]
    weight = getattr(place.holder, place.name)
    if not record.adapters:
        weight.copy_(record.base)
        del place.holder._merged_lora[place.name]
        return
    precise = torch.promote_types(weight.dtype, torch.float32)
    total = record.base.to(weight.device, precise, copy=True)
    for adapter in record.adapters:
        third = adapter.place.third
        (total if third is None else total.chunk(3)[third]).add_(adapter.delta())
    weight.copy_(total)


# ------------------------------------------------------------------------------------------------------- make and load


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    text_encoder: bool = False,
    unet: bool = True,
    dropout: float = 0.0,
) -> Lora:
    """Fresh adapters for a model, attached; they change nothing until they are trained.

    Args:
        model: a diffusion model, or a network alone. Its weights stay trainable: freeze them before.
        rank, alpha, dropout: see `Adapter`.
        targets: which layers, by the end of their path here or in diffusers, with wildcards: "to_q", "attn2.*", "conv1",
            "ff.net.*"; the projections of attention if None.
        text_encoder, unet: which networks.

    Raises:
        ValueError: a target that no layer has, or no layer at all.
    """
    chosen = [p for p in places(model) if (unet if p.part == "unet" else text_encoder)]
    for target in targets or ():
        if not any(_matches(p, target) for p in chosen):
            ends = {p.ours.rpartition(".")[2] for p in chosen if not p.ours[-1].isdigit()}
            raise ValueError(f"no layer's path ends with {target!r}. {nearest(target, ends)}")
    chosen = [p for p in chosen if any(_matches(p, target) for target in targets or TARGETS)]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no layer to adapt with unet={unet}, text_encoder={text_encoder}"
        )
    return _lora(chosen, {p: make_adapter(p, rank, alpha, dropout) for p in chosen}).attach()


def _matches(place: Place, target: str) -> bool:
    return any(fnmatchcase(f".{path}", f"*.{target}") for path in (place.ours, place.theirs) if path)


def _lora(all_places: Iterable[Place], adapters: Mapping[Place, Adapter], unused: Iterable[str] = ()) -> Lora:
    two = any(p.part == "text_encoder_2" for p in all_places)
    return Lora({lora_keys.key(place, two): adapter for place, adapter in adapters.items()}, unused)


def load_lora(
    model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Tensor], scale: float = 1.0
) -> Lora:
    """Adapters from a file, attached to a model.

    Args:
        model: a diffusion model, or a network alone.
        source: a file or its tensors, in the layout of kohya (blocks named as here or as in diffusers), of peft, or of any
            version of diffusers. peft writes α into `adapter_config.json` beside its file, where it is looked for.
        scale: how strong.

    Returns:
        The adapters; `unused` names what fitted nowhere, which is logged, too.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: no LoRA, one for another model, or one of another kind.
    """
    tensors, notes, name = _read(source)
    layers, strange = lora_keys.read_layers(tensors, notes, name)
    all_places = places(model)
    spelled = {s: p for p in reversed(all_places) for s in lora_keys.spellings(p)}
    fitting = {layer: spelled[layer] for layer in layers if layer in spelled}
    if not fitting:
        raise CheckpointError(
            f"No layer of {name} belongs to {type(model).__name__}: it holds {', '.join(sorted(layers or tensors)[:3])}, … while "
            f"{', '.join(lora_keys.key(p, ldm_blocks=False) for p in all_places[:2])}, … are known."
        )
    _refuse_shapes(name, layers, fitting)
    adapters: dict[Place, Adapter] = {}
    unused = [*strange, *(layer for layer in layers if layer not in fitting)]
    for layer, place in fitting.items():
        if place in adapters:
            unused.append(layer)  # the same layer under a second name
        else:
            adapters[place] = _filled(place, layers[layer])
    if unused:
        logger.warning("%s: %d entries fit nowhere (%s).", name, len(unused), ", ".join(unused[:4]))
    logger.info("%s: %d layers adapted.", name, len(adapters))
    lora = _lora(all_places, adapters, unused).attach()
    lora.requires_grad_(False).scale = scale
    return lora


def _read(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], dict[str, Any], str]:
    """Tensors, what stands beside them, and a name for messages."""
    tensors, notes, name = source, {}, "the LoRA"
    config: Path | None = None
    if not isinstance(tensors, Mapping):
        path, name = locate(tensors), str(source)
        loaded, config = load_checkpoint(path), path.with_name(PEFT_CONFIG)
        tensors = tensors_of(loaded, path)
        notes = _parsed((loaded.get("metadata") or {}).get("lora_adapter_metadata", "{}"), name)
    if any(key.startswith(lora_keys.PEFT) for key in tensors):
        if config is not None and config.is_file():
            notes = _parsed(config.read_text(encoding="utf-8"), config) | notes
        if "lora_alpha" not in notes and not any(key.endswith(".alpha") for key in tensors):
            logger.warning(
                "%s does not say its α, and there is no %s beside it that does: α is taken to be the rank.", name, PEFT_CONFIG
            )  # fmt: skip
    return tensors, notes, name


def _parsed(text: str, source: str | Path) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: its notes on the LoRA are no JSON object ({error})") from error


def _refuse_shapes(name: str, layers: Mapping[str, Mapping[str, Any]], fitting: Mapping[str, Place]) -> None:
    wrong = [
        f"{layer} is {_product(layers[layer])} there and {tuple(place.weight.shape)} here"
        for layer, place in fitting.items()
        if _product(layers[layer]) != tuple(place.weight.shape[:2])
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"{name} was made for another model: {'; '.join(wrong[:3])}{more}. SD 1, SD 2 and SDXL have LoRAs of their own."
        )


def _product(parts: Mapping[str, Any]) -> tuple[int, ...]:
    """Rows and columns of B·A."""
    return parts["up"].shape[0], parts["down"].shape[1]


@torch.no_grad()
def _filled(place: Place, parts: Mapping[str, Any]) -> Adapter:
    down, up = parts["down"], parts["up"]
    adapter = make_adapter(place, len(down), float(parts["alpha"]))
    for own, given in ((adapter.lora_down.weight, down), (adapter.lora_up.weight, up)):
        if own.numel() != given.numel():
            raise CheckpointError(
                f"a LoRA for {place.part}.{place.ours} has a weight {tuple(given.shape)} where {tuple(own.shape)} is wanted"
            )
        own.copy_(
            given.reshape(own.shape)
        )  # a 1×1 convolution may be written as a matrix, and the other way round
    return adapter


# ------------------------------------------------------------------------------------------------------------ training


def train_lora(model: nn.Module, config: Mapping[str, Any]) -> Lora:
    """Freeze a model and give it adapters to train.

    Args:
        model: the model.
        config: arguments of `inject`.

    Raises:
        ValueError: an unknown option.
    """
    options = list(inspect.signature(inject).parameters)[1:]
    for name in config:
        if name not in options:
            raise ValueError(f"lora_config has no option {name!r}. {nearest(name, options)}")
    model.requires_grad_(False)
    return inject(model, **config)
