"""The conditioner: a list of embedders, and what becomes of their outputs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgm.util import count_params, disabled_train, expand_dims_like, instantiate_from_config
from taming.util import freeze, nearest

logger = logging.getLogger(__name__)


class AbstractEmbModel(nn.Module):
    """An embedder: a module that makes a condition, or several, from an entry of a batch.

    The conditioner fills these in from its configuration.

    Attributes:
        is_trainable: its weights are trained along.
        ucg_rate: share of the samples whose condition is dropped, for guidance.
        input_key: entry of the batch that it reads.
        input_keys: several of them, its arguments, instead.
        legacy_ucg_val: what a dropped sample's entry is replaced by, instead of zeros in place of its embedding.
    """

    is_trainable: bool | None = None
    ucg_rate: Any = None
    input_key: str | None = None
    input_keys: Sequence[str] | None = None
    legacy_ucg_val: Any = None


class GeneralConditioner(nn.Module):
    """Turns a batch into the network's conditions.

    What an embedder gives is told by its number of axes: one or two are a `vector`, three a sequence for `crossattn`, four
    or five maps for `concat`; the entries `cond_view` and `cond_motion` keep their own names. Several of the same kind are
    joined: sequences along their channels, so that text encoders go side by side, all others along the second axis.

    Args:
        emb_models: configurations of embedders: `target` and `params`, and beside them
            input_key, or input_keys: entries of the batch, the embedder's arguments;
            is_trainable (False): train it; otherwise it is frozen and runs without gradients;
            ucg_rate (0): probability of dropping its output, drawn for each sample and output, also in eval mode;
            legacy_ucg_value: dropped samples get this value *in the batch* instead of zeros in their embedding.

    Raises:
        AssertionError: an embedder does not derive from `AbstractEmbModel`.
        KeyError: an entry has no `target`, or neither input_key nor input_keys.
        ValueError: legacy_ucg_value for an embedder of several entries.

    Source: Podell et al. 2023 (SDXL), section 2.2; Ho and Salimans 2022 (dropping, for guidance).
    """

    OUTPUT_DIM2KEYS = {1: "vector", 2: "vector", 3: "crossattn", 4: "concat", 5: "concat"}
    KEY2CATDIM = {"vector": 1, "crossattn": 2, "concat": 1, "cond_view": 1, "cond_motion": 1}
    OWN_NAMES = ("cond_view", "cond_motion")
    OPTIONS = ("input_key", "input_keys", "is_trainable", "legacy_ucg_value", "params", "target", "ucg_rate")

    def __init__(self, emb_models: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(self._build(n, config) for n, config in enumerate(emb_models))

    def _build(self, n: int, config: Mapping[str, Any]) -> AbstractEmbModel:
        embedder = instantiate_from_config(config)
        kind = type(embedder).__name__
        if not isinstance(embedder, AbstractEmbModel):
            raise AssertionError(f"emb_models[{n}]: {kind} must derive from AbstractEmbModel")
        for name in config:
            if name not in self.OPTIONS:
                logger.warning(
                    "emb_models[%d].%s has no effect. %s", n, name, nearest(str(name), self.OPTIONS)
                )
        embedder.is_trainable = config.get("is_trainable", False)
        embedder.ucg_rate = config.get("ucg_rate", 0.0)
        embedder.legacy_ucg_val = config.get("legacy_ucg_value")
        if "input_key" in config:
            embedder.input_key = config["input_key"]
        elif "input_keys" in config:
            embedder.input_keys = list(config["input_keys"])
        else:
            raise KeyError(
                f"emb_models[{n}] ({kind}) needs input_key, or input_keys: the entry of a batch that it reads"
            )
        if embedder.legacy_ucg_val is not None and embedder.input_key is None:
            raise ValueError(f"emb_models[{n}] ({kind}): legacy_ucg_value needs one input_key")
        if not embedder.is_trainable:
            _freeze(embedder)
        logger.info(
            "emb_models[%d]: %s, %d weights, %s", n, kind, count_params(embedder),
            "trained" if embedder.is_trainable else "frozen",
        )  # fmt: skip
        return embedder

    def possibly_get_ucg_val(
        self, embedder: AbstractEmbModel, batch: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Replace dropped samples of an embedder's entry by its `legacy_ucg_val`, in the batch itself.

        The draws follow numpy's seed, and leave torch's random numbers where they were.
        """
        (key,) = _keys(embedder)
        if not embedder.ucg_rate:
            return batch
        dropped = np.flatnonzero(np.random.random(len(batch[key])) < embedder.ucg_rate)
        if len(dropped) and isinstance(batch[key], tuple):
            batch[key] = list(batch[key])
        for i in dropped:
            batch[key][i] = embedder.legacy_ucg_val
        return batch

    def forward(
        self, batch: MutableMapping[str, Any], force_zero_embeddings: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The conditions of a batch.

        Args:
            batch: the embedders' entries, and others, which are ignored.
            force_zero_embeddings: entries whose embeddings become zero.

        Returns:
            vector (b, d), crossattn (b, n, d), concat (b, c, h, w), cond_view and cond_motion, as far as they occur.

        Raises:
            KeyError: the batch lacks an entry.
            TypeError: an embedder gives something other than tensors.
            ValueError: an output of no known kind, or outputs that cannot be joined.
        """
        parts: dict[str, list[Tensor]] = {}
        for n, embedder in enumerate(self.embedders):
            assert isinstance(embedder, AbstractEmbModel)
            for emb in self._embed(n, embedder, batch):
                name = self._name(n, embedder, emb)
                if embedder.ucg_rate > 0.0 and embedder.legacy_ucg_val is None:
                    kept = torch.bernoulli(
                        (1.0 - embedder.ucg_rate) * torch.ones(len(emb), device=emb.device)
                    )
                    emb = expand_dims_like(kept, emb).to(emb.dtype) * emb
                if embedder.input_key in (force_zero_embeddings or ()):
                    emb = torch.zeros_like(emb)
                parts.setdefault(name, []).append(emb)
        return {name: self._join(name, found) for name, found in parts.items()}

    def _embed(self, n: int, embedder: AbstractEmbModel, batch: MutableMapping[str, Any]) -> Sequence[Tensor]:
        who = f"emb_models[{n}] ({type(embedder).__name__})"
        for key in _keys(embedder):
            if key not in batch:
                raise KeyError(f"the batch has no {key!r}, which {who} reads. {nearest(key, batch)}")
        with contextlib.nullcontext() if embedder.is_trainable else torch.no_grad():
            if embedder.legacy_ucg_val is not None:
                batch = self.possibly_get_ucg_val(embedder, batch)
            out = embedder(*(batch[key] for key in _keys(embedder)))
        outputs = out if isinstance(out, list | tuple) else [out]
        for emb in outputs:
            if not isinstance(emb, Tensor):
                raise TypeError(f"{who} gives a {type(emb).__name__}; a condition must be a tensor")
        return outputs

    def _name(self, n: int, embedder: AbstractEmbModel, emb: Tensor) -> str:
        if embedder.input_key in self.OWN_NAMES:
            return embedder.input_key
        if emb.ndim not in self.OUTPUT_DIM2KEYS:
            raise ValueError(
                f"emb_models[{n}] ({type(embedder).__name__}) gives a tensor {tuple(emb.shape)}; a condition has "
                f"{min(self.OUTPUT_DIM2KEYS)} to {max(self.OUTPUT_DIM2KEYS)} axes"
            )
        return self.OUTPUT_DIM2KEYS[emb.ndim]

    def _join(self, name: str, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        axis = self.KEY2CATDIM[name]
        try:
            return torch.cat(parts, axis)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"the outputs for {name!r} must agree in all axes but axis {axis}; they are {shapes}"
            ) from error

    def get_unconditional_conditioning(
        self,
        batch_c: MutableMapping[str, Any],
        batch_uc: MutableMapping[str, Any] | None = None,
        force_uc_zero_embeddings: Sequence[str] | None = None,
        force_cond_zero_embeddings: Sequence[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The two conditions of guidance, with and without; nothing is dropped at random.

        Args:
            batch_c: a batch.
            batch_uc: a batch for the other one, such as one with empty prompts; batch_c itself if None.
            force_uc_zero_embeddings, force_cond_zero_embeddings: see `forward`.
        """
        with self.without_dropout():
            c = self(batch_c, force_cond_zero_embeddings)
            uc = self(batch_c if batch_uc is None else batch_uc, force_uc_zero_embeddings)
        return c, uc

    @contextlib.contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Inside, no embedder, and none within another, drops anything."""
        embedders = [m for m in self.modules() if isinstance(m, AbstractEmbModel)]
        rates = [m.ucg_rate for m in embedders]
        try:
            for m in embedders:
                m.ucg_rate = 0.0
            yield
        finally:
            for m, rate in zip(embedders, rates, strict=True):
                m.ucg_rate = rate


def _keys(embedder: AbstractEmbModel) -> Sequence[str]:
    """Entries of the batch that an embedder reads."""
    return (embedder.input_keys or ()) if embedder.input_key is None else (embedder.input_key,)


def _freeze(embedder: AbstractEmbModel) -> None:
    """No gradients, and eval mode for all inside it; its own flag stays as it is (on record: True)."""
    for part in embedder.children():
        freeze(part)
    embedder.requires_grad_(False)
    object.__setattr__(embedder, "train", disabled_train.__get__(embedder))
