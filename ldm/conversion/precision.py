"""Weights in another type, with the numbers beside them that must keep theirs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ldm.conversion.layouts import Schedule

# numbers of models beside those of a schedule: a denoiser's noise levels, and what latents are multiplied by
NUMBERS = ("sigmas", "scale_factor")


@cache
def tables() -> frozenset[str]:
    """The last parts of the names of entries that are no weights of networks: the tables of a noise schedule, and `NUMBERS`."""
    schedule = Schedule()
    schedule.register_schedule(None, "linear", 2)
    return frozenset(schedule.state_dict()) | frozenset(NUMBERS)


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights of networks in another floating-point type; None keeps theirs.

    Integers stay, and so do the tables of a noise schedule: in half precision ᾱ of the last steps is nothing but rounding.
    """
    if dtype is None:
        return dict(weights)
    kept = tables()
    return {
        k: v.to(dtype) if v.is_floating_point() and k.rpartition(".")[2] not in kept else v
        for k, v in weights.items()
    }
