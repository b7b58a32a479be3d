"""Encoders of conditions: classes, text, images at a lower resolution. (Hub libraries are imported where first used.)"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.openclip import FrozenCLIPTextEmbedder, FrozenOpenCLIPEmbedder
from ldm.modules.encoders.t5 import FrozenCLIPT5Encoder, FrozenT5Embedder
from ldm.modules.encoders.tokenizers import BERTTokenizer, BPETokenizer
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from taming.modules.util import AbstractEncoder
from taming.util import disabled_train, nearest

__all__ = [
    "AbstractEncoder", "BERTEmbedder", "BERTTokenizer", "BPETokenizer", "CLIPEmbeddingNoiseAugmentation", "ClassEmbedder",
    "ClipImageEmbedder", "FrozenCLIPEmbedder", "FrozenCLIPT5Encoder", "FrozenCLIPTextEmbedder", "FrozenClipImageEmbedder",
    "FrozenOpenCLIPEmbedder", "FrozenOpenCLIPImageEmbedder", "FrozenT5Embedder", "IdentityEncoder", "SpatialRescaler",
    "TransformerEmbedder", "disabled_train",
]  # fmt: skip


class IdentityEncoder(AbstractEncoder):
    """A condition used as it is."""

    def encode(self, x: Any) -> Any:
        """x itself."""
        return x


def checked_labels(labels: Tensor, n_classes: int) -> Tensor:
    """Labels as integers.

    Raises:
        ValueError: one is outside 0 … n_classes - 1.
    """
    labels = labels.long()
    if labels.device.type != "cpu" or not len(labels):
        return labels  # on a GPU the look-up itself complains; asking there would stall it
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < n_classes:
        raise ValueError(f"labels from {low} to {high} for {n_classes} classes")
    return labels


class ClassEmbedder(nn.Module):
    """A learned vector for each class, as a context of one token.

    Args:
        embed_dim: width.
        n_classes: number of classes; with guidance the last one stands for "no class".
        key: entry of a batch that holds the labels.
        ucg_rate: probability of replacing a label by the last class (also in eval mode, as published).
    """

    def __init__(
        self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.key = key
        self.n_classes = n_classes
        self.ucg_rate = ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(
        self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False
    ) -> Tensor:
        """Labels (b,) in batch[key] → (b, 1, embed_dim).

        Raises:
            KeyError: the batch has no such entry.
            ValueError: a label outside 0 … n_classes - 1.
        """
        key = self.key if key is None else key
        if key not in batch:
            raise KeyError(f"the batch has no labels under {key!r}. {nearest(key, batch)}")
        labels = checked_labels(batch[key], self.n_classes)[:, None]
        if self.ucg_rate > 0.0 and not disable_dropout:
            kept = 1 - torch.bernoulli(torch.ones_like(labels, dtype=torch.float32) * self.ucg_rate).long()
            labels = kept * labels + (1 - kept) * (self.n_classes - 1)
        return self.embedding(labels)

    def get_unconditional_conditioning(self, bs: int, device: Any = "cuda") -> dict[str, Tensor]:
        """A batch of "no class", the last one, ready for `forward`; floating-point, as published."""
        return {self.key: torch.ones((bs,), device=device) * (self.n_classes - 1)}


class TransformerEmbedder(AbstractEncoder):
    """A trainable transformer over given token ids.

    Args:
        n_embed: width.
        n_layer: layers.
        vocab_size: number of ids.
        max_seq_len: number of positions.
        device: accepted, as published; the ids go where the weights are.
    """

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: str = "cuda"
    ) -> None:
        super().__init__()
        self.device = device
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=Encoder(dim=n_embed, depth=n_layer)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (b, n) → (b, n, n_embed)."""
        tokens = tokens.to(self.transformer.token_emb.weight.device)
        return self.transformer(tokens, return_embeddings=True)

    def encode(self, x: Any) -> Tensor:
        """As `forward`."""
        return self(x)


class BERTEmbedder(AbstractEncoder):
    """The text encoder of the first text-to-image models: a tokenizer and a transformer trained along.

    Padding is not masked, as published: the model learns what it means.

    Args:
        n_embed: width.
        n_layer: layers, of 8 heads with 64 channels each.
        vocab_size: number of ids.
        max_seq_len: number of positions, and of tokens that a text is padded or cut to.
        device: accepted, as published; the ids go where the weights are.
        use_tokenizer: False if `forward` is given ids.
        embedding_dropout: rate on the embeddings in training.
        tokenizer: "bert" (the published one, from the hub) or "bpe" (CLIP's, needs no download).
        ff_dropout, attn_dropout: rates inside the layers in training.
        tie_embedding: no head of its own for logits, which conditioning never asks for: fewer weights in a checkpoint.

    Raises:
        ValueError: unknown tokenizer.

    Source: Rombach et al. 2022, section 4.3.1 and appendix E.2.1.
    """

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = 30522,
        max_seq_len: int = 77,
        device: str = "cuda",
        use_tokenizer: bool = True,
        embedding_dropout: float = 0.0,
        tokenizer: str = "bert",
        ff_dropout: float = 0.0,
        attn_dropout: float = 0.0,
        tie_embedding: bool = False,
    ) -> None:
        super().__init__()
        makers: dict[str, Any] = {"bert": BERTTokenizer, "bpe": partial(BPETokenizer, vocab_size=vocab_size)}
        if tokenizer not in makers:
            raise ValueError(f"tokenizer={tokenizer!r} is unknown; choose one of {sorted(makers)}")
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = makers[tokenizer](vq_interface=False, max_length=max_seq_len)
        self.device = device
        layers = Encoder(dim=n_embed, depth=n_layer, ff_dropout=ff_dropout, attn_dropout=attn_dropout)
        self.transformer = TransformerWrapper(
            num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=layers, emb_dropout=embedding_dropout,
            tie_embedding=tie_embedding,
        )  # fmt: skip

    def forward(self, text: Any) -> Tensor:
        """Texts (a string or a list of b strings), or ids (b, n) without a tokenizer → (b, n, n_embed)."""
        tokens = self.tknz_fn(text) if self.use_tknz_fn else text
        return self.transformer(tokens.to(self.transformer.token_emb.weight.device), return_embeddings=True)

    def encode(self, text: Any) -> Tensor:
        """As `forward`."""
        return self(text)


class SpatialRescaler(nn.Module):
    """Shrinks (or enlarges) an image several times, then maps its channels.

    Args:
        n_stages: how often.
        method: nearest, linear, bilinear, trilinear, bicubic or area.
        multiplier: factor of each stage.
        in_channels, out_channels: of the convolution at the end; none without out_channels.
        bias, kernel_size: of that convolution, which keeps the size.
    """

    METHODS = ("nearest", "linear", "bilinear", "trilinear", "bicubic", "area")

    def __init__(
        self,
        n_stages: int = 1,
        method: str = "bilinear",
        multiplier: float = 0.5,
        in_channels: int = 3,
        out_channels: int | None = None,
        bias: bool = False,
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if n_stages < 0:
            raise AssertionError(f"n_stages={n_stages} must not be negative")
        if method not in self.METHODS:
            raise AssertionError(f"method={method!r} is unknown. {nearest(method, self.METHODS)}")
        self.n_stages, self.multiplier = n_stages, multiplier
        self.interpolator = partial(F.interpolate, mode=method)
        self.remap_output = out_channels is not None
        if out_channels is not None:
            self.channel_mapper = nn.Conv2d(
                in_channels, out_channels, kernel_size, bias=bias, padding=kernel_size // 2
            )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, out_channels or c, h·multiplier^n_stages, …)."""
        for _ in range(self.n_stages):
            x = self.interpolator(x, scale_factor=self.multiplier)
        return self.channel_mapper(x) if self.remap_output else x

    def encode(self, x: Tensor) -> Tensor:
        """As `forward`."""
        return self(x)
