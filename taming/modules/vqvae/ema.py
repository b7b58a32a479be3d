"""Quantisation with a codebook that follows running averages of the vectors assigned to it, instead of a gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.codebook import (
    Quantizer,
    code_counts,
    nearest_codes,
    one_hot_codes,
    perplexity_of,
    straight_through,
)


class EmbeddingEMA(nn.Module):
    """A codebook e_i = m_i / N_i, with running averages N_i of how many vectors chose a code and m_i of their sum.

    It begins as if each code had been chosen once, by itself, so that a code that is never chosen stays where it is.

    Args:
        num_tokens: number of codes.
        codebook_dim: channels of a code.
        decay: share of the averages that stays at each update.
        eps: keeps the count of an unused code off zero (Laplace smoothing).

    Source: van den Oord et al. 2017, appendix A.1.
    """

    def __init__(self, num_tokens: int, codebook_dim: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.weight = nn.Parameter(torch.randn(num_tokens, codebook_dim), requires_grad=False)
        self.cluster_size = nn.Parameter(torch.ones(num_tokens), requires_grad=False)
        self.embed_avg = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        self.update = True

    def forward(self, embed_id: Tensor) -> Tensor:
        """Codes (…, codebook_dim) of indices (…)."""
        return F.embedding(embed_id, self.weight)

    def cluster_size_ema_update(self, new_cluster_size: Tensor) -> None:
        """Move N towards a batch's counts (num_tokens,)."""
        self.cluster_size.data.lerp_(new_cluster_size.to(self.cluster_size), 1 - self.decay)

    def embed_avg_ema_update(self, new_embed_avg: Tensor) -> None:
        """Move m towards a batch's sums (num_tokens, codebook_dim)."""
        self.embed_avg.data.lerp_(new_embed_avg.to(self.embed_avg), 1 - self.decay)

    def weight_update(self, num_tokens: int) -> None:
        """Set the codes to m / N, with N smoothed so that its sum stays."""
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + num_tokens * self.eps) * total
        self.weight.data.copy_(self.embed_avg / smoothed[:, None])


class EMAVectorQuantizer(Quantizer):
    """Replaces each vector by the nearest code; in training the codes follow the vectors that chose them.

    With several processes the counts and sums are those of all of them, so their codebooks stay equal.

    Args:
        n_embed: size of the codebook.
        embedding_dim: channels of a code.
        beta: weight of the commitment loss, the only one.
        decay, eps: see `EmbeddingEMA`.
        remap, unknown_index, sane_index_shape: see `Quantizer`.

    Source: van den Oord et al. 2017, equation 3 and appendix A.1.
    """

    def __init__(
        self,
        n_embed: int,
        embedding_dim: int,
        beta: float,
        decay: float = 0.99,
        eps: float = 1e-5,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index, sane_index_shape)
        self.num_tokens, self.codebook_dim = n_embed, embedding_dim
        self.beta, self.decay = beta, decay
        self.embedding = EmbeddingEMA(n_embed, embedding_dim, decay, eps)

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes (…, embedding_dim) of codebook indices (…)."""
        return self.embedding(indices)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantise a map, and in training move the codebook.

        Args:
            z: (b, embedding_dim, h, w).

        Returns:
            The quantised map, the loss, and perplexity (), one-hot codes (b·h·w, n_embed), indices as of `Quantizer`.
        """
        vectors = self.to_vectors(z)
        flat = vectors.reshape(-1, self.e_dim)
        indices = nearest_codes(flat, self.embedding.weight)
        quantised = self.look_up(indices).reshape(vectors.shape)
        counts = code_counts(indices, self.n_e)
        if self.training and self.embedding.update:
            self._follow(flat, indices, counts)
        loss = self.beta * F.mse_loss(quantised, vectors)
        info = (perplexity_of(counts), one_hot_codes(indices, self.n_e), self.number(indices, z))
        return self.to_map(straight_through(vectors, quantised)), loss, info

    @torch.no_grad()
    def _follow(self, flat: Tensor, indices: Tensor, counts: Tensor) -> None:
        sums = torch.zeros_like(self.embedding.embed_avg).index_add_(
            0, indices, flat.detach().to(self.embedding.embed_avg.dtype)
        )
        counts = counts.to(sums.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.embedding.cluster_size_ema_update(counts)
        self.embedding.embed_avg_ema_update(sums)
        self.embedding.weight_update(self.num_tokens)
