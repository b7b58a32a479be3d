"""Weights into models: with a report of what does not match, and without a second copy of them in memory."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taming.checkpoint_files import Weights
from taming.checkpoint_pickles import CheckpointError
from taming.util import instantiate_from_config

logger = logging.getLogger(__name__)


def load_into(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    ignore_keys: Sequence[str] = (),
    source: str | os.PathLike[str] = "the checkpoint",
    strict: bool = False,
    assign: bool = False,
) -> tuple[list[str], list[str]]:
    """Load weights into a module and say what did not match.

    Args:
        module: receives the weights.
        state_dict: names and tensors.
        ignore_keys: entries whose names begin with one of these are left out.
        source: the file's name, for messages.
        strict: raise on missing or unexpected names, too.
        assign: take the tensors themselves instead of copying their numbers.

    Returns:
        Missing and unexpected names.

    Raises:
        CheckpointError: shapes differ, or not one name fits, or (`strict`) any name is missing or left over.
    """
    ignored = {k for k in state_dict if k.startswith(tuple(ignore_keys))} if ignore_keys else set()
    if ignored:
        logger.info(
            "%s: left out %d entries that begin with %s.", source, len(ignored), ", ".join(ignore_keys)
        )
    weights = {k: v for k, v in state_dict.items() if k not in ignored}
    own = module.state_dict()
    wrong = [
        f"{k} is {tuple(v.shape)} there and {tuple(own[k].shape)} here"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(wrong[:4])}{more}. "
            "Is it a checkpoint of another configuration? Entries can be left out with ignore_keys."
        )
    fitting = own.keys() & weights.keys()
    if weights and own and not fitting:
        raise CheckpointError(
            f"No entry of {source} belongs to {type(module).__name__}: it holds {', '.join(sorted(weights)[:3])}, … "
            f"while {', '.join(sorted(own)[:3])}, … are wanted."
        )
    missing, unexpected = module.load_state_dict(weights, strict=False, assign=assign)
    missing = [k for k in missing if k not in ignored]
    report = "; ".join(
        f"{len(names)} {what} ({_by_submodule(names)})"
        for what, names in (("missing", missing), ("left over", unexpected))
        if names
    )
    if report and strict:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {report}")
    logger.info("%s: restored %d entries%s.", source, len(fitting), f"; {report}" if report else "")
    return missing, list(unexpected)


def _by_submodule(names: Iterable[str]) -> str:
    """`first_stage_model 3, cond_stage_model 120`: which part of a model a list of names belongs to."""
    counts: dict[str, int] = {}
    for name in names:
        top = name.split(".")[0]
        counts[top] = counts.get(top, 0) + 1
    return ", ".join(f"{k} {v}" for k, v in counts.items())


# ---------------------------------------------------------------------------------------------------------- streaming


class _WithoutMemory(TorchFunctionMode):
    """Lets layers make their weights, which `torch.empty` gives them, on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def build_empty() -> Iterator[None]:
    """What is built inside has no memory for its parameters; buffers, such as a noise schedule, are there with their numbers."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        with _WithoutMemory(), warnings.catch_warnings():
            # initial numbers are copied into weights that have no memory: that is what is wanted
            warnings.filterwarnings("ignore", message=".*is a no-op", category=UserWarning)
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def stream_into(
    module: nn.Module,
    weights: Weights,
    ignore_keys: Sequence[str] = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    strict: bool = False,
) -> tuple[list[str], list[str]]:
    """As `load_into`, tensor by tensor from the file to the device, so that no second copy of all weights is ever there.

    Args:
        module: any part of it may be on the meta device.
        weights: of a file.
        ignore_keys: entries whose names begin with one of these are left out.
        device: where the weights go.
        dtype: of the parameters; their own if None. Buffers keep theirs, since a noise schedule in half precision is none.
        strict: raise on missing or unexpected names, too.

    Returns:
        Missing and unexpected names.

    Raises:
        CheckpointError: see `load_into`.
    """
    match = _match(module, weights, ignore_keys, strict)
    match.fill(device, dtype)
    return match.report


Place = tuple[dict[str, Any], str, str]  # a layer's dict, the name in it and the full name


@dataclass
class _Match:
    """Where the tensors of a file go in a model.

    Args:
        module: holds stand-ins.
        weights: of the file.
        ignore_keys: what of them is left out.
        dtypes: of the module's tensors, before.
        report: missing and unexpected names.
        places: for each weight.
        changed: places that the module's own rules filled with something that they made of the weights.
        empty: names of parameters and buffers without memory that no weight of the file will fill.
    """

    module: nn.Module
    weights: Weights
    ignore_keys: Sequence[str]
    dtypes: dict[str, torch.dtype]
    report: tuple[list[str], list[str]]
    places: dict[str, list[Place]] = field(default_factory=dict)
    changed: list[Place] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)

    def fill(self, device: str | torch.device, dtype: torch.dtype | None) -> None:
        """Replace the stand-ins by numbers, in the order of the file."""
        if self.changed:  # the rules want all numbers at once
            numbers = {k: v for k, v in self.weights.items() if not k.startswith(tuple(self.ignore_keys))}
            self.module.load_state_dict(numbers, strict=False, assign=True)
            for place in chain(self.changed, *self.places.values()):
                self._put(place, place[0][place[1]], device, dtype)
            return
        for name in self.weights:
            for place in self.places.get(name, ()):
                self._put(place, self.weights[name], device, dtype)

    def _put(
        self, place: Place, numbers: Tensor, device: str | torch.device, dtype: torch.dtype | None
    ) -> None:
        entries, leaf, full = place
        value, wanted = entries[leaf], self.dtypes[full]
        parameter = isinstance(value, nn.Parameter)
        if dtype is not None and parameter and wanted.is_floating_point:
            wanted = dtype
        # a copy, since the numbers may lie in the file's pages
        real = torch.empty(value.shape, device=device, dtype=wanted).copy_(numbers.detach())
        entries[leaf] = nn.Parameter(real, value.requires_grad) if parameter else real


def _match(
    module: nn.Module, weights: Weights, ignore_keys: Sequence[str] = (), strict: bool = False
) -> _Match:
    """Load stand-ins, so that a module's own rules for older names apply, and see where each of them went."""
    dtypes = {k: v.dtype for k, v in _tensors(module)}
    stand_ins = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    source = {_identity(tensor): name for name, tensor in stand_ins.items()}
    report = load_into(module, stand_ins, ignore_keys, weights.path, strict, assign=True)
    match = _Match(module, weights, ignore_keys, dtypes, report)
    missing = set(report[0])
    for path, owner in module.named_modules():
        for entries in (owner._parameters, owner._buffers):
            for leaf, value in entries.items():
                if value is None or not value.is_meta:
                    continue
                full = f"{path}.{leaf}" if path else leaf
                name = source.get(_identity(value))
                if name is not None:
                    match.places.setdefault(name, []).append((entries, leaf, full))
                elif full in missing or leaf in owner._non_persistent_buffers_set:
                    match.empty.append(full)
                else:
                    match.changed.append((entries, leaf, full))
    return match


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )


def _identity(tensor: Tensor) -> int:
    """The same for a tensor and for a parameter that was made of it."""
    return tensor.untyped_storage()._cdata


def load_model_from_config(
    config: Any,
    ckpt: str | os.PathLike[str] | None,
    device: str | torch.device = "cpu",
    verbose: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the model a configuration describes, put a checkpoint's weights into it, and set it to eval.

    The weights go straight from the file to where they are wanted: there is no second copy of them.

    Args:
        config: a configuration with a `model` section, or that section itself.
        ckpt: the weights; None keeps the fresh ones.
        device: where the model goes.
        verbose: list the names that are missing or left over.
        dtype: of the parameters; as the model has them if None.

    Raises:
        CheckpointError: see `load_checkpoint` and `load_into`.
    """
    section = config.get("model", config)
    if ckpt is None:
        model = instantiate_from_config(section)
    else:
        model, (missing, unexpected) = _build_and_fill(section, Weights(ckpt), device, dtype)
        for name in missing if verbose else ():
            logger.warning("missing in %s: %s", ckpt, name)
        for name in unexpected if verbose else ():
            logger.warning("left over in %s: %s", ckpt, name)
        # weights that stay random give noise for pictures: never silently
        trained = [
            k
            for k in missing
            if not k.startswith(("model_ema.", "loss."))
            and k.split(".")[-1] not in ("position_ids", "attn_mask")
        ]
        if trained:
            logger.warning(
                "%s has no weights for %d entries (%s); they keep their initial values.",
                ckpt,
                len(trained),
                _by_submodule(trained),
            )
    if dtype is not None:  # those that no checkpoint filled
        for parameter in filter(Tensor.is_floating_point, model.parameters()):
            parameter.data = parameter.data.to(dtype)
    return model.to(device).eval()


def _build_and_fill(
    section: Any, weights: Weights, device: str | torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, tuple[list[str], list[str]]]:
    """A model with a file's weights: without memory first; where that is not all it needs, with initial numbers."""
    for prepare in (build_empty, nullcontext):
        try:
            with prepare():
                model = instantiate_from_config(section)
            match = _match(model, weights)
        except (NotImplementedError, RuntimeError) as error:
            if prepare is nullcontext:
                raise
            logger.debug("the constructor looks at its weights (%s)", error)
            continue
        if not match.empty or prepare is nullcontext:
            break
        logger.debug("%s does not hold all weights: %s", weights.path, match.empty[:4])
    match.fill(device, dtype)
    return model, match.report
