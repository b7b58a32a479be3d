"""The one door to scaled dot-product attention, and its linear cousin."""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.util import user_cache

logger = logging.getLogger(__name__)

# PyTorch's own ways, by name; "explicit" is the one that writes all scores out
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}  # fmt: skip
EXPLICIT = "explicit"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int = 1,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax(q kᵀ / √d) v over several heads, without ever holding the full score matrix where PyTorch can avoid it.

    Args:
        q: queries, (b, n, heads * d); heads are the slow index of the last axis.
        k: keys, (b, m, heads * d).
        v: values, (b, m, heads * e).
        heads: number of heads.
        mask: True where a query may look, or numbers to add to the scores; broadcastable to (b, heads, n, m). A query
            that may look nowhere gets the mean of all values.
        causal: query i sees keys up to i only.
        dropout: share of the attention weights that are dropped, in [0, 1).

    Returns:
        (b, n, heads * e)

    Source: Vaswani et al. 2017, equation 1.
    """
    # a last axis that is not dense makes PyTorch's CPU kernel write all scores out, and a map rearranged to tokens has one
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    # not einops: drawing tokens one by one comes here with so little work that its 10 µs a call show
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (b, heads, n, d)
    bias = None
    if mask is not None and mask.is_floating_point():
        bias = mask.to(q.dtype)
    elif mask is not None:
        # a finite floor instead of -inf: a fully masked row stays a mean, never NaN
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.finfo(q.dtype).max)
    backend = None if causal or dropout or bias is not None else recorded_backend(q, k)
    if backend == EXPLICIT or (dropout == 0.0 and _explicit_is_faster(q, k, causal)):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.finfo(scores.dtype).max)
        out = scores.softmax(dim=-1) @ v
    elif backend is not None:
        # the others stay allowed: another batch size may be more than the chosen one takes
        order = [BACKENDS[backend], *(b for name, b in BACKENDS.items() if name != backend)]
        with sdpa_kernel(order, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def _explicit_is_faster(q: Tensor, k: Tensor, causal: bool) -> bool:
    """Whether to write the few scores out: training in half precision on a CPU with short sequences.

    The backward pass of PyTorch's fused CPU kernel is five to ten times slower there (2.15, AMX and AVX-512 machines);
    from about 256 tokens on (causal: 180, it skips half), and without gradients, the fused kernel wins.
    """
    short = q.shape[-2] * k.shape[-2] <= (1 << 15 if causal else 1 << 16)
    return (
        short
        and q.device.type == "cpu"
        and q.dtype != torch.float32
        and torch.is_grad_enabled()
        and q.requires_grad
    )


# ------------------------------------------------------------------------------- what scripts/optimize wrote down


def choices_file() -> Path:
    """Where scripts/optimize/optimize_attention.py records its choices: $TAMING_ATTENTION, or a file in the user's cache."""
    given = os.environ.get("TAMING_ATTENTION")
    return Path(given).expanduser() if given else user_cache() / "latent-generative-models" / "attention.json"


def machine_name(device: torch.device) -> str:
    """What a record holds for: the device, and the PyTorch that drives it."""
    cpu = f"{platform.machine()} CPU with {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}, torch {torch.__version__}"


def call_name(q: Tensor, k: Tensor) -> str:
    """The name of a call in a record: type, heads and their channels, queries × keys."""
    return f"{str(q.dtype).removeprefix('torch.')} {q.shape[1]}x{q.shape[3]} {q.shape[2]}x{k.shape[2]}"


@functools.cache
def recorded_choices(device_type: str) -> dict[str, str]:
    """The choices for this machine's device of that type; none if there is no record, or one of another machine."""
    path = choices_file()
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
        choices = record.get(machine_name(torch.device(device_type)), {})
        return {name: backend for name, backend in choices.items() if backend in (*BACKENDS, EXPLICIT)}
    except (ValueError, AttributeError) as error:
        logger.warning("%s is no record of attention back-ends, and is ignored: %s", path, error)
        return {}


def recorded_backend(q: Tensor, k: Tensor) -> str | None:
    """The recorded choice for a call without gradients; None is PyTorch's own."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    choices = recorded_choices(q.device.type)
    return choices.get(call_name(q, k)) if choices else None


class LinearAttention(nn.Module):
    """Attention in time linear in the number of pixels: softmax over the keys' positions, no softmax of the scores.

    Args:
        dim: channels in and out.
        heads: number of heads.
        dim_head: channels a head.

    Source: Shen et al. 2018, "Efficient Attention" (without the queries' softmax).
    """

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        hidden = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, hidden * 3, 1, bias=False)
        self.to_out = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c, h, w)."""
        height, width = x.shape[-2:]
        q, k, v = rearrange(
            self.to_qkv(x), "b (three heads c) h w -> three b heads c (h w)", three=3, heads=self.heads
        )
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (b, heads, d, e)
        out = context.transpose(-1, -2) @ q  # (b, heads, e, n)
        return self.to_out(rearrange(out, "b heads c (h w) -> b (heads c) h w", h=height, w=width))
