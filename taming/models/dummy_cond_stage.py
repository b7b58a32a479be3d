"""A condition that is tokens already."""

from __future__ import annotations

from torch import Tensor


class DummyCondStage:
    """Hands tokens through, with the interface of a first stage; it has nothing to learn.

    Args:
        conditional_key: entry of a batch that holds the tokens, such as `objects_bbox`.
    """

    train: object = None

    def __init__(self, conditional_key: str) -> None:
        self.conditional_key = conditional_key

    def eval(self) -> DummyCondStage:
        """Itself."""
        return self

    def encode(self, c: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Tokens → tokens, None, (None, None, tokens)."""
        return c, None, (None, None, c)

    def decode(self, c: Tensor) -> Tensor:
        """Tokens → tokens."""
        return c

    def to_rgb(self, c: Tensor) -> Tensor:
        """Tokens → tokens."""
        return c
