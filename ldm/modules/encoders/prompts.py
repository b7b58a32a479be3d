"""Prompts for CLIP's text encoders: weights in brackets, and windows for prompts that are longer than one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.weights import PretrainedEncoder

logger = logging.getLogger(__name__)

EMPHASIS = 1.1  # of one pair of round brackets; square ones divide by it
PARTS = re.compile(r"\\[\\()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Pieces of a prompt with their weights.

    `(word)` weighs 1.1, `[word]` 1/1.1, `(word:1.3)` 1.3; brackets in brackets multiply. A backslash before a bracket
    or another backslash makes it plain text, and so is a bracket without its partner.

    >>> parse_weights(r"a (red:1.5) [cat] \(real\)")
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.9090909090909091), (' (real)', 1.0)]
    """
    pieces: list[list[Any]] = []
    opened: list[int] = []
    for part in PARTS.findall(prompt):
        top = pieces[opened[-1]][0] if opened else ""
        if part in ("(", "["):
            opened.append(len(pieces))  # plain text until its partner comes
            pieces.append([part, 1.0])
        elif (part[-1] == ")" and len(part) != 2 and top == "(") or (part == "]" and top == "["):
            factor = {")": EMPHASIS, "]": 1 / EMPHASIS}.get(part) or float(part[1:-1])
            _close(pieces, opened.pop(), factor)
        else:
            pieces.append([part[1:] if re.fullmatch(r"\\[\\()\[\]]", part) else part, 1.0])
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged


def _close(pieces: list[list[Any]], start: int, factor: float) -> None:
    pieces[start][0] = ""
    for piece in pieces[start + 1 :]:
        piece[1] *= factor


@lru_cache(4096)
def warn_of_cut(kept: int, words: str) -> None:
    """Say which words of a prompt were dropped; of the same words once, since a training meets them in each epoch."""
    logger.warning("The prompt is cut after %d tokens; without effect: %r", kept, words)


@dataclass
class PromptReader:
    """Texts into rows of ids of a fixed length: start, words, end, padding.

    Args:
        encode: ids of a text, without start and end.
        decode: the text behind ids.
        start, end, pad: special ids.
        length: ids a window, start and end included.
        windows: windows a prompt; words that do not fit into them are dropped, and a warning says which.
        weighted: brackets are weights (see `parse_weights`) rather than text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start: int
    end: int
    pad: int
    length: int = 77
    windows: int = 1
    weighted: bool = False

    def __call__(self, text: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """b texts → ids (b, windows, length) and the weight of each, of the same shape."""
        texts = [text] if isinstance(text, str) else list(text)
        if any(not isinstance(t, str) for t in texts):
            kinds = sorted({type(t).__name__ for t in texts})
            raise TypeError(f"prompts must be strings, not {', '.join(kinds)}")
        shape = (len(texts), self.windows, self.length)
        ids, weights = torch.full(shape, self.pad, dtype=torch.long), torch.ones(shape)
        for row, row_weights, words in zip(ids, weights, texts, strict=True):
            self._fill(row, row_weights, words)
        return ids, weights

    def _fill(self, row: Tensor, row_weights: Tensor, words: str) -> None:
        pieces = parse_weights(words) if self.weighted else [(words, 1.0)]
        tokens = [(i, weight) for piece, weight in pieces for i in self.encode(piece)]
        room = self.length - 2
        if dropped := [i for i, _ in tokens[room * self.windows :]]:
            warn_of_cut(room * self.windows, self.decode(dropped))
        for window in range(self.windows):
            part = tokens[room * window : room * (window + 1)]
            row[window, : len(part) + 2] = torch.tensor([self.start, *(i for i, _ in part), self.end])
            row_weights[window, 1 : len(part) + 1] = torch.tensor([weight for _, weight in part])


class PromptEncoder(PretrainedEncoder):
    """A text encoder of the CLIP family.

    Args:
        prompt_weights: brackets in prompts are weights: `(word:1.3)`, `(word)`, `[word]`, see `parse_weights`. A
            weight w moves a token's vector from that of the empty prompt, w = 0, through its own, w = 1, and beyond.
        windows: windows of tokens a prompt, encoded one by one and laid side by side. Every prompt, the empty one of
            guidance too, then has windows · 77 vectors.

    Raises:
        ValueError: windows is not a positive number.
    """

    def __init__(self, prompt_weights: bool = False, windows: int = 1) -> None:
        super().__init__()
        if windows < 1:
            raise ValueError(f"windows={windows} must be at least 1")
        self.prompt_weights, self.windows = prompt_weights, windows

    def reader(self) -> PromptReader:
        """What turns prompts into ids."""
        raise NotImplementedError(f"{type(self).__name__} does not define reader")

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Ids (b, n) → vectors (b, n, d)."""
        raise NotImplementedError(f"{type(self).__name__} does not define encode_tokens")

    def encode_pooled(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids (b, n) → vectors (b, n, d), and one for the whole, (b, p), of encoders that have it."""
        return self.encode_tokens(ids), None

    def forward(self, text: str | Sequence[str]) -> Any:
        """Prompts, a string or b strings → (b, windows · n, d).

        Raises:
            OSError: weights or tokenizer are neither here nor downloadable; the message says what to do.
        """
        return self.encode_prompts(text)[0]

    def encode_prompts(self, text: str | Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and the vector of each prompt's first window as a whole, which no bracket weighs."""
        self.ensure_weights()
        read = self.reader()
        ids, weights = read(text)
        device = next(self.network().parameters()).device
        vectors, pooled = self.encode_pooled(ids.flatten(0, 1).to(device))
        if self.prompt_weights and bool((weights != 1).any()):
            empty = self.encode_tokens(read("")[0][:, 0].to(device))
            factor = weights.flatten(0, 1)[..., None].to(vectors)
            vectors = empty + factor * (vectors - empty)
        pooled = None if pooled is None else pooled[:: self.windows]
        return vectors.unflatten(0, ids.shape[:2]).flatten(1, 2), pooled

    def encode(self, text: Any) -> Any:
        """As `forward`."""
        return self(text)
