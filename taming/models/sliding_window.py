"""Maps of codes larger than a transformer was trained on: a window of attention slides over them.

Source: Esser et al. 2021, section 3.2, "Generating High-Resolution Images".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from taming.modules.transformer.cache import NextToken
from taming.modules.transformer.permuter import Identity
from taming.modules.transformer.sampling import Draw, check_room, guide

# tokens (b, n) of the condition for the window whose upper left code is at (top, left)
ConditionAt = Callable[[int, int], Tensor]


def window_start(position: int, size: int, window: int, lead: int) -> int:
    """Where the window for a row or column begins: `lead` before it, but inside the map."""
    return min(max(position - lead, 0), size - window)


@torch.no_grad()
def sample_windows(
    model: Any,
    codes: Tensor,
    condition: Tensor | ConditionAt,
    *,
    mask: Tensor | None = None,
    first_row: int = 0,
    window: int = 16,
    lead: int | None = None,
    guidance: float = 1.0,
    progress: bool = False,
    callback: Callable[[int, int, Tensor], Any] | None = None,
    **options: Any,
) -> Tensor:
    """Draw a map of codes row by row, each code from the part of its window that is before it.

    As long as the window stands still, what the transformer has computed is kept.

    Args:
        model: a Net2NetTransformer in eval mode that reads codes row by row.
        codes: (b, h, w), h and w at least `window`; what is given stays where nothing is drawn. Not modified.
        condition: tokens (b, h, w), of which each window sees its part; tokens (b, n) that every window sees whole
            (a class, a start token); or a function of the window's top and left that returns tokens (b, n).
        mask: True where to draw, (h, w) or (b, h, w); everywhere unless given.
        first_row: draw from this row on, h // 2 to complete the lower half.
        window: side of the window, that of the training images' code maps.
        lead: rows and columns of the window before the code that is drawn, where the map has them; window // 2 unless
            given ((window - 1) // 2 for scene layouts, as published).
        guidance: strength of classifier-free guidance, 1 for none; needs the model's `null_cond`.
        progress: show a bar.
        callback: called after each code with its row, its column and the map so far.
        options: `temperature`, `top_k`, `top_p`, `sample`, `generator` of `taming.modules.transformer.sampling.Draw`.

    Returns:
        (b, h, w)

    Raises:
        ValueError: a map smaller than the window, a condition of another size, or a model with another order of codes.
        ContextError: condition and window exceed the transformer's block.
    """
    _, height, width = codes.shape
    _check(model, codes, condition, window, first_row)
    drawn = (
        torch.ones(codes.shape, dtype=torch.bool) if mask is None else mask.cpu().bool().expand(codes.shape)
    )
    places = [(i, j) for i, j in drawn.any(dim=0).nonzero().tolist() if i >= first_row]
    drawn = drawn.to(codes.device)
    lead = window // 2 if lead is None else lead
    draw = Draw(vocabulary=model.n_codes, **options)
    codes = codes.clone()
    guided = guidance != 1.0
    length = window**2 - 1
    stream: NextToken | None = None
    seen: tuple[int, int] | None = None
    for i, j in tqdm(places, desc="codes", disable=not progress):
        top, left = window_start(i, height, window, lead), window_start(j, width, window, lead)
        if seen != (top, left):
            cond = _condition(condition, top, left, window)
            if guided:
                cond = torch.cat([cond, model.null_tokens(cond)])
            if stream is None:
                check_room(model.transformer, cond.shape[1] + length)
                stream = NextToken(model.transformer, len(cond), cond.shape[1] + length)
            stream.forget()
            seen = (top, left)
        inside = codes[:, top : top + window, left : left + window].flatten(1)
        before = inside[:, : (i - top) * window + j - left]
        logits = stream(torch.cat([cond, before.repeat(1 + guided, 1)], dim=1))  # type: ignore[misc]
        if guided:
            logits = guide(logits, guidance)
        codes[:, i, j] = torch.where(drawn[:, i, j], draw(logits)[:, 0], codes[:, i, j])
        if callback is not None:
            callback(i, j, codes)
    return codes


def _condition(condition: Tensor | ConditionAt, top: int, left: int, window: int) -> Tensor:
    if not isinstance(condition, Tensor):
        return condition(top, left)
    if condition.ndim == 2:
        return condition
    return condition[:, top : top + window, left : left + window].flatten(1)


def _check(model: Any, codes: Tensor, condition: Tensor | ConditionAt, window: int, first_row: int) -> None:
    batch, height, width = codes.shape
    if model.transformer.training:
        raise AssertionError("sampling needs the model in eval mode: call model.eval() first")
    if not isinstance(model.permuter, Identity):
        raise ValueError(
            f"a sliding window reads codes row by row; this model reads them in the order {type(model.permuter).__name__}"
        )
    if min(height, width) < window:
        raise ValueError(
            f"the map of codes is {height}x{width}, smaller than the window of {window}: draw a larger image, or choose "
            "a smaller window"
        )
    if not 0 <= first_row <= height:
        raise ValueError(f"first_row={first_row} must lie between 0 and the map's {height} rows")
    if isinstance(condition, Tensor) and not (
        condition.shape == codes.shape or (condition.ndim == 2 and len(condition) == batch)
    ):
        raise ValueError(
            f"the condition's tokens {tuple(condition.shape)} must be a map of the codes' size {tuple(codes.shape)}, or "
            f"({batch}, n)"
        )
