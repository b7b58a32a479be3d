"""Tables of names: which weight of ours is which weight of another library, and in which layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from taming.checkpoint import CheckpointError


class Layout(NamedTuple):
    """How a weight is written on the other side."""

    there: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


SAME = Layout(lambda w: w, lambda w: w)
TRANSPOSED = Layout(lambda w: w.mT.contiguous(), lambda w: w.mT.contiguous())
# a 1×1 convolution of ours is a linear layer there
POINTWISE = Layout(lambda w: w.flatten(1), lambda w: w.flatten(1)[..., None, None])


@dataclass(frozen=True)
class Row:
    """One weight.

    Args:
        ours: its name here.
        theirs: its name there, or None if that library has no such layer.
        layout: how its numbers lie there.
        third: 0, 1 or 2 if it is one of three that are stacked here under one name.
    """

    ours: str
    theirs: str | None
    layout: Layout = SAME
    third: int | None = None


@dataclass(frozen=True)
class KeyTable:
    """All weights of a network, both ways and exactly: from there and back again gives the same bits.

    Args:
        rows: the weights.
        unpaired: beginnings of our names that the other side has no place for.
        constants: entries of ours with known contents that the other side does not store.
        spell: brings a name of the other side, which changed over its versions, to the form in `rows`; None drops it.
    """

    rows: tuple[Row, ...]
    unpaired: tuple[str, ...] = ()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    spell: Callable[[str], str | None] = str

    @property
    def modules(self) -> dict[str, str]:
        """Paths of our layers and of theirs; of stacked weights, which are several layers there, there is none."""
        pairs = ((r.ours, str(r.theirs)) for r in self.rows if r.third is None)
        return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in pairs}

    def to_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our weights under their names.

        Raises:
            CheckpointError: names are missing or left over.
        """
        free = (*self.unpaired, *self.constants)
        given = [k for k in state if not (free and k.startswith(free))]
        _compare(given, [r.ours for r in self.rows], "the weights to convert")
        return {
            str(r.theirs): r.layout.there(
                state[r.ours] if r.third is None else state[r.ours].chunk(3)[r.third]
            )
            for r in self.rows
        }

    def from_diffusers(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their weights under our names.

        Raises:
            CheckpointError: names are missing or left over.
        """
        given = {name: v for k, v in state.items() if (name := self.spell(k)) is not None}
        _compare(given, [str(r.theirs) for r in self.rows], "the weights of diffusers' kind")
        parts: dict[str, list[Tensor]] = {}
        for row in self.rows:
            parts.setdefault(row.ours, []).append(row.layout.back(given[str(row.theirs)]))
        joined = {name: p[0] if len(p) == 1 else torch.cat(p) for name, p in parts.items()}
        return joined | dict(self.constants)


def _compare(given: Iterable[str], wanted: Iterable[str], what: str) -> None:
    given, wanted = set(given), set(wanted)
    complaints = [
        f"{len(names)} {how} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})"
        for how, names in (("missing", wanted - given), ("left over", given - wanted))
        if names
    ]
    if complaints:
        raise CheckpointError(
            f"{what} do not fit the network: {'; '.join(complaints)}. Was it built with the options they belong to?"
        )


def blended(spatial: Mapping[str, str], temporal: Mapping[str, str]) -> dict[str, str]:
    """Names within a residual block over pixels that holds one over frames, from those of the two."""
    return {k: f"spatial_res_block.{v}" for k, v in spatial.items()} | {
        f"time_stack.{k}": f"temporal_res_block.{v}" for k, v in temporal.items()
    }


def inner_rows(
    names: Iterable[str],
    ours: str,
    theirs: str | None,
    renamed: Mapping[str, str],
    pointwise: tuple[str, ...] = (),
) -> list[Row]:
    """Rows of one layer.

    Args:
        names: of its `state_dict`.
        ours, theirs: where it stands in the two networks.
        renamed: modules within it that have another name there.
        pointwise: those of them whose 1×1 convolutions are linear layers there.
    """
    rows = []
    for name in names:
        module, _, leaf = name.rpartition(".")
        there = theirs and ".".join(filter(None, (theirs, renamed.get(module, module), leaf)))
        layout = POINTWISE if module in pointwise and leaf == "weight" else SAME
        rows.append(Row(f"{ours}.{name}", there, layout))
    return rows
