"""Tools of chapter two: those of `taming.util`, pictures of text, questions about tensors, parallel prefetching."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming.models.condition_pictures import log_txt_as_img
from taming.util import count_params, default, exists, get_obj_from_str, instantiate_from_config

__all__ = [
    "AdamWwithEMAandWings", "autocast", "count_params", "default", "exists", "get_obj_from_str", "instantiate_from_config", "isimage",
    "ismap", "log_txt_as_img", "mean_flat", "parallel_data_prefetch",
]  # fmt: skip

logger = logging.getLogger(__name__)


def ismap(x: Any) -> bool:
    """A batch of maps: four axes, more than three channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """A batch of images: four axes, one or three channels."""
    return isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def autocast(f: Callable[..., Any], enabled: bool = True) -> Callable[..., Any]:
    """Decorator: run under CUDA autocast with its current settings, or without it."""

    @wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(
            "cuda",
            enabled=enabled and torch.cuda.is_available(),
            dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=torch.is_autocast_cache_enabled(),
        ):
            return f(*args, **kwargs)

    return run


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Any,
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply a function to chunks of data in parallel, and put the results together in order.

    Args:
        func: takes a chunk (and the worker's number, with `use_worker_id`).
        data: an array, or anything iterable; of a dict the values are taken.
        n_proc: workers, and chunks.
        target_data_type: "ndarray" to concatenate arrays, "list" to join lists of results.
        cpu_intensive: processes rather than threads.

    Raises:
        TypeError: data that cannot be iterated over.
        ValueError: an array with target "list", or an unknown target.
    """
    if target_data_type not in ("ndarray", "list"):
        raise ValueError(f"target_data_type={target_data_type!r} must be 'ndarray' or 'list'")
    if isinstance(data, np.ndarray) and target_data_type == "list":
        raise ValueError("an array cannot become a list here; pass list(data)")
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be an array or iterable, not {type(data).__name__}")
    if isinstance(data, dict):
        logger.warning("parallel_data_prefetch takes only the values of a dict")
        data = list(data.values())
    if target_data_type == "ndarray":
        chunks = [c for c in np.array_split(np.asarray(data), n_proc)]
    else:
        data = list(data)
        step = max(1, math.ceil(len(data) / n_proc))
        chunks = [data[i : i + step] for i in range(0, len(data), step)]
    pool: Executor = ProcessPoolExecutor(n_proc) if cpu_intensive else ThreadPoolExecutor(n_proc)
    with pool as workers:
        ids = [range(len(chunks))] if use_worker_id else []
        results = list(workers.map(func, chunks, *ids))
    if target_data_type == "ndarray":
        return np.concatenate([r if isinstance(r, np.ndarray) else np.asarray(r) for r in results])
    return [item for part in results for item in part]


class AdamWwithEMAandWings(torch.optim.AdamW):
    """AdamW that keeps a float32 average of the weights in its state, as `param_exp_avg`.

    Args:
        ema_decay: largest share of the average that stays at a step.
        ema_power: the share at step n is min(ema_decay, 1 - n^-ema_power).
        param_names: accepted and kept, as published.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        ema_decay: float = 0.9999,
        ema_power: float = 1.0,
        param_names: Sequence[str] = (),
    ) -> None:
        if not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay={ema_decay} must lie between 0 and 1")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        extra = {"ema_decay": ema_decay, "ema_power": ema_power, "param_names": param_names}
        self.defaults.update(extra)
        for group in self.param_groups:
            group.update(extra)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW, then one of the average."""
        # the average starts from the weights before the first step
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and "param_exp_avg" not in self.state[p]:
                    self._averages()[p] = p.detach().float().clone()
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "step" not in state:
                    continue
                if "param_exp_avg" not in state:
                    state["param_exp_avg"] = self._averages().pop(p)
                decay = min(group["ema_decay"], 1 - float(state["step"]) ** -group["ema_power"])
                state["param_exp_avg"].mul_(decay).add_(p.float(), alpha=1 - decay)
        return loss

    def _averages(self) -> dict[Tensor, Tensor]:
        """Averages that AdamW's own lazy state cannot hold yet: it takes a non-empty state for a started one."""
        if not hasattr(self, "_waiting"):
            self._waiting: dict[Tensor, Tensor] = {}
        return self._waiting
