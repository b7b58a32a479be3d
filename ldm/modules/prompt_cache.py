"""What follows from the prompt alone is computed once a run of a sampler, not once a step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

R = TypeVar("R")


class Kept(NamedTuple):
    """A result, and what has to be as it was for it to hold."""

    others: tuple[Tensor, ...]
    state: tuple[Any, ...]
    result: Any


# first input → owner → result: entries go with their input, so that contexts which are new at every step do not pile up
_run: ContextVar[WeakTensorKeyDictionary | None] = ContextVar("prompt_cache", default=None)


@contextmanager
def prompt_cache() -> Iterator[None]:
    """A run of a sampler, as a context or as a decorator: within it `once` remembers, at its end all is forgotten.

    The samplers of `ldm` open one by themselves. Another sampling loop gains by it if it hands the network the same tensor as
    context at every step; `once` can join conditions, too. The network's weights must not change within. Runs may be nested, and
    other threads are not concerned.
    """
    token = _run.set(WeakTensorKeyDictionary())
    try:
        yield
    finally:
        _run.reset(token)


def once(owner: Hashable, compute: Callable[..., R], *inputs: Tensor) -> R:
    """`compute(*inputs)`, or its result of before if it is certain to be the same.

    That is within `prompt_cache`, without gradients, for the same owner and the same tensors (not only equal ones), unchanged since
    and under the same autocast. Each owner has one result for each first input. Tensors made in inference mode, which do not tell
    whether they changed, and compiled graphs compute anew.

    Args:
        owner: whose result it is, mostly a module.
        compute: a function of the inputs and of the owner's weights; its result must not be changed in place.
        inputs: tensors, one at least.
    """
    run = None if torch.compiler.is_compiling() else _run.get()
    if run is None or torch.is_grad_enabled() or any(t.is_inference() or t.is_meta for t in inputs):
        return compute(*inputs)
    first, *others = inputs
    device = first.device.type
    state = (
        *(t._version for t in inputs),
        torch.is_autocast_enabled(device),
        torch.get_autocast_dtype(device),
    )
    results: dict[Hashable, Kept] = run.setdefault(first, {})
    kept = results.get(owner)
    if (
        kept is None
        or kept.state != state
        or any(a is not b for a, b in zip(kept.others, others, strict=True))
    ):
        kept = results[owner] = Kept(tuple(others), state, compute(*inputs))
    return kept.result
