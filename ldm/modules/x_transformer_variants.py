"""Parts that a token transformer can be built from otherwise: positions, norms, residuals, and the order of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming.util import nearest

SELF, CROSS, FEED = "a", "c", "f"  # letters of the layers, as the published `custom_layers` has them


# --------------------------------------------------------------------------------------------------------- positions


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector for each position, counted from 0 at each call.

    Args:
        dim: width.
        max_seq_len: number of positions.
    """

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (b, n, …) → (1, n, dim).

        Raises:
            ValueError: more tokens than positions.
        """
        n = x.shape[1]
        if n > self.emb.num_embeddings:
            raise ValueError(
                f"{n} tokens for {self.emb.num_embeddings} positions (max_seq_len); shorten the text or build a longer model"
            )
        return self.emb(torch.arange(n, device=x.device))[None]


class FixedPositionalEmbedding(nn.Module):
    """Sines, then cosines, of positions at frequencies from 1 to about 1/10000.

    Args:
        dim: width, an even number.

    Source: Vaswani et al. 2017, section 3.5.
    """

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(
                f"dim={dim} must be even: half of the position embedding are sines, half cosines"
            )
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, dim, 2).float() / dim))

    def forward(self, x: Tensor, seq_dim: int = 1, offset: int = 0) -> Tensor:
        """Positions offset, offset + 1, … along x's axis `seq_dim` → (1, n, dim)."""
        positions = torch.arange(offset, offset + x.shape[seq_dim], device=x.device)
        angles = positions.type_as(self.inv_freq)[:, None] * self.inv_freq
        return torch.cat([angles.sin(), angles.cos()], dim=-1)[None]


# ------------------------------------------------------------------------------------------------------------- norms


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    """x divided by the root mean square of its last axis, which counts as at least `eps`."""
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / rms.clamp(min=eps)


class ScaleNorm(nn.Module):
    """Vectors brought to one learned length: g times a root mean square of 1.

    Source: Nguyen & Salazar 2019, "Transformers without Tears", section 2.2.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        return _unit_rms(x, self.eps) * self.g


class RMSNorm(nn.Module):
    """Layer normalisation without the mean: a root mean square of 1, times a learned factor for each channel.

    Source: Zhang & Sennrich 2019, equation 4.
    """

    def __init__(self, dim: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        return _unit_rms(x, self.eps) * self.g


# ------------------------------------------------------------------------------------------- around a layer and after


def _times(out: Any, factor: float | Tensor) -> Any:
    """What a layer gave, times a factor; of a tuple only the first entry."""
    return (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor


class Scale(nn.Module):
    """A layer whose result is multiplied by a number.

    Args:
        value: the number.
        fn: the layer.
    """

    def __init__(self, value: float, fn: nn.Module) -> None:
        super().__init__()
        self.value, self.fn = value, fn

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """As the layer; of a tuple only the first entry is multiplied."""
        return _times(self.fn(x, **kwargs), self.value)


class Rezero(nn.Module):
    """A layer whose result is multiplied by a learned number that begins at 0.

    Source: Bachlechner et al. 2020, "ReZero is All You Need", equation 1.
    """

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.g = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        """As the layer; of a tuple only the first entry is multiplied."""
        return _times(self.fn(x, **kwargs), self.g)


class Residual(nn.Module):
    """The sum of a layer's result and its input."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Both (…, dim) → (…, dim)."""
        return x + residual


class GRUGating(nn.Module):
    """A gated recurrent unit instead of the sum: the layer's input is its state, the result what it reads.

    Source: Parisotto et al. 2019, "Stabilizing Transformers for Reinforcement Learning", section 3.2.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Both (…, dim) → (…, dim)."""
        return self.gru(x.flatten(0, -2), residual.flatten(0, -2)).reshape(x.shape)


# ------------------------------------------------------------------------------------------------------------ layouts


def sandwich(block: str, depth: int, coefficient: int) -> str:
    """Attention first and feed-forward networks last, `coefficient` of each, the usual order between.

    Raises:
        ValueError: a coefficient that is not between 1 and depth.

    Source: Press et al. 2020, "Improving Transformer Models by Reordering their Sublayers", section 4.
    """
    if not 1 <= coefficient <= depth:
        raise ValueError(f"sandwich_coef={coefficient} must lie between 1 and depth={depth}")
    return block[:-1] * coefficient + block * (depth - coefficient) + FEED * coefficient


def attention_where_required(block: str, depth: int, ratio: int) -> str:
    """As many layers as usual, one in `ratio` of them attention, evenly spread over the first two thirds.

    Where that is a single attention, the layers are a third more, as published.

    Raises:
        ValueError: a ratio of 1 or below or above the number of layers, or so small that attention does not fit there.

    Source: Mandava et al. 2020, "Pay Attention when Required" (PAR).
    """
    total = depth * len(block)
    if not 1 < ratio <= total:
        raise ValueError(
            f"par_ratio={ratio} must be more than 1 and at most {total}, the layers of depth={depth}"
        )
    looking = block.replace(FEED, "")
    groups = total // ratio
    first_part = total * 2 // 3
    spacing = (first_part + first_part // groups) // groups
    if len(looking) > spacing:
        raise ValueError(
            f"par_ratio={ratio} leaves {spacing} layers for each {looking!r} block; choose a larger one"
        )
    head = looking.ljust(spacing, FEED) * groups
    return head.ljust(total, FEED)


def layer_types(
    block: str,
    depth: int,
    custom_layers: Sequence[str] | None = None,
    par_ratio: int | None = None,
    sandwich_coef: int | None = None,
) -> str:
    """The letters of all layers, in order.

    Args:
        block: letters that repeat: a self-attention, c cross-attention, f feed-forward.
        depth: how often.
        custom_layers: the letters themselves, over everything else.
        par_ratio: see `attention_where_required`.
        sandwich_coef: see `sandwich`.

    Raises:
        ValueError: an unknown letter, or a number that does not fit.
    """
    if custom_layers is not None:
        for letter in custom_layers:
            if letter not in (SELF, CROSS, FEED):
                raise ValueError(
                    f"custom_layers has a layer {letter!r}. {nearest(letter, (SELF, CROSS, FEED))}"
                )
        return "".join(custom_layers)
    if par_ratio is not None:
        return attention_where_required(block, depth, par_ratio)
    return block * depth if sandwich_coef is None else sandwich(block, depth, sandwich_coef)
