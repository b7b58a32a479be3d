"""Codebooks as regularizers: the quantisers of `taming.modules.vqvae` behind the `(z, log)` interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.autoencoding.regularizers.base import AbstractRegularizer, measure_perplexity
from taming.modules.vqvae.codebook import Quantizer
from taming.modules.vqvae.ema import EMAVectorQuantizer as _EMAVectorQuantizer
from taming.modules.vqvae.ema import EmbeddingEMA
from taming.modules.vqvae.gumbel import GumbelQuantize
from taming.modules.vqvae.quantize import VectorQuantizer2

__all__ = [
    "AbstractQuantizer", "EMAVectorQuantizer", "EmbeddingEMA", "GumbelQuantizer", "VectorQuantizer", "VectorQuantizerWithInputProjection",
    "measure_perplexity",
]  # fmt: skip


class AbstractQuantizer(AbstractRegularizer, Quantizer):
    """Base of the codebooks."""

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that want gradients."""
        return (p for p in self.parameters() if p.requires_grad)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Codes of indices: (b, c, h, w) for the shape (b, h, w, c), else (*indices.shape, c)."""
        return Quantizer.get_codebook_entry(self, indices, shape)


class WeightNormEmbedding(nn.Module):
    """A codebook whose channels have a learned length of their own: each column is g · v / |v|.

    As published, `weight`, where codes are searched, is that of the last look-up outside training: after a step of the optimizer
    the first batch in eval mode still sees the codes before it. Training and loading are always up to date.

    Args:
        weight: the codes to begin with, (n, d).

    Source: Salimans & Kingma 2016, equation 2.
    """

    latest: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(weight.detach().norm(dim=0, keepdim=True))
        self.weight_v = nn.Parameter(weight.detach().clone())
        self.register_buffer("latest", weight.detach().clone(), persistent=False)

    def codes(self) -> Tensor:
        """The codes of the present parameters, (n, d)."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=0, keepdim=True))

    @property
    def weight(self) -> Tensor:
        """The codes to search, (n, d), without gradient."""
        if self.training:
            self.latest = self.codes().detach()
        return self.latest

    def forward(self, indices: Tensor) -> Tensor:
        """Indices (…) → codes (…, d)."""
        codes = self.codes()
        self.latest = codes.detach()
        return F.embedding(indices, codes)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.latest = self.codes().detach()


class VectorQuantizer(AbstractQuantizer, VectorQuantizer2):
    """Replaces each vector by the nearest of `n_e` learned codes; the gradient passes straight through.

    Args:
        n_e: size of the codebook.
        e_dim: channels of a code.
        beta: weight of the commitment term (the codebook term weighs 1).
        remap, unknown_index: see `taming.modules.vqvae.remap.Remap`.
        sane_index_shape: log indices as (b, h, w), or (b, n) for sequences, instead of flat.
        log_perplexity: also log `perplexity` and `cluster_usage`.
        embedding_weight_norm: see `WeightNormEmbedding`.
        loss_key: name of the loss in the log.

    Source: van den Oord et al. 2017, equation 3.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        log_perplexity: bool = False,
        embedding_weight_norm: bool = False,
        loss_key: str = "loss/vq",
    ) -> None:
        self.embedding_weight_norm = embedding_weight_norm  # read by `make_codebook`
        super().__init__(n_e, e_dim, beta, remap, unknown_index, sane_index_shape, legacy=False)
        self.log_perplexity = log_perplexity
        self.loss_key = loss_key

    def make_codebook(self) -> nn.Module:
        """As in the base class, or normally distributed codes with weight normalisation."""
        if self.embedding_weight_norm:
            return WeightNormEmbedding(nn.Embedding(self.n_e, self.e_dim).weight)
        return super().make_codebook()

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Maps (b, e_dim, h, w) or sequences (b, n, e_dim) → the same of codes; log: the loss and `min_encoding_indices`.

        Raises:
            ValueError: other channels than the codes have.
        """
        if z.ndim == 3:
            quantised, log = self._quantise(rearrange(z, "b n c -> b c n 1"))
            if self.sane_index_shape:
                log["min_encoding_indices"] = log["min_encoding_indices"][..., 0]
            return rearrange(quantised, "b c n 1 -> b n c"), log
        return self._quantise(z)

    def _quantise(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        quantised, loss, indices = self.quantise(z)
        log: dict[str, Any] = {self.loss_key: loss, "min_encoding_indices": self.number(indices, z)}
        if self.log_perplexity:
            log["perplexity"], log["cluster_usage"] = measure_perplexity(indices, self.n_e)
        return quantised, log


class VectorQuantizerWithInputProjection(VectorQuantizer):
    """A codebook of fewer channels, behind a linear projection.

    Args:
        input_dim: channels that come in.
        n_codes: size of the codebook.
        codebook_dim: channels of a code.
        beta: weight of the commitment term.
        output_dim: channels that go out, in the shape of the input; None puts out the codes as a sequence.
        options: further parameters of `VectorQuantizer`.

    Source: Yu et al. 2022 (ViT-VQGAN), section 3.2.
    """

    def __init__(
        self,
        input_dim: int,
        n_codes: int,
        codebook_dim: int,
        beta: float = 1.0,
        output_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(n_codes, codebook_dim, beta, **options)
        self.input_dim, self.output_dim = input_dim, output_dim
        self.proj_in = nn.Linear(input_dim, codebook_dim)
        self.proj_out = nn.Identity() if output_dim is None else nn.Linear(codebook_dim, output_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Maps (b, input_dim, h, w), clips (b, input_dim, t, h, w) or sequences (b, n, input_dim) → see `output_dim`."""
        axes = z.shape[2:]
        tokens = z if z.ndim == 3 else rearrange(z, "b c ... -> b (...) c")
        if tokens.shape[-1] != self.input_dim:
            raise ValueError(
                f"input_dim={self.input_dim}, but {tuple(z.shape)} came in; channels are the second axis of maps"
            )
        codes, log = super().forward(self.proj_in(tokens))
        codes = self.proj_out(codes)
        if self.output_dim is None or z.ndim == 3:
            return codes, log
        return rearrange(codes, "b n c -> b c n").unflatten(2, axes), log


class GumbelQuantizer(AbstractQuantizer, GumbelQuantize):
    """Draws each position's code from a softmax over the codebook; see `taming.modules.vqvae.gumbel.GumbelQuantize`.

    Args:
        num_hiddens, embedding_dim, n_embed, straight_through, kl_weight, temp_init, remap, unknown_index: as there.
        loss_key: name of the loss in the log.

    Source: Jang et al. 2017, equations 1 and 2.
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        remap: str | None = None,
        unknown_index: str | int = "random",
        loss_key: str = "loss/vq",
    ) -> None:
        super().__init__(
            num_hiddens, embedding_dim, n_embed, straight_through, kl_weight, temp_init, remap=remap, unknown_index=unknown_index
        )  # fmt: skip
        self.loss_key = loss_key

    def forward(
        self, z: Tensor, temp: float | None = None, return_logits: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """(b, num_hiddens, h, w) → (b, embedding_dim, h, w); log: the loss, `indices` (b, h, w), and `logits` on request."""
        quantised, loss, (_, _, indices), *logits = GumbelQuantize.forward(self, z, temp, return_logits)
        log = {self.loss_key: loss, "indices": indices}
        return quantised, log | ({"logits": logits[0]} if logits else {})


class EMAVectorQuantizer(AbstractQuantizer, _EMAVectorQuantizer):
    """A codebook that follows its vectors' running averages; see `taming.modules.vqvae.ema.EMAVectorQuantizer`.

    Args:
        n_embed, embedding_dim, beta, decay, eps, remap, unknown_index: as there.
        loss_key: name of the loss in the log.

    Source: van den Oord et al. 2017, appendix A.1.
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
        loss_key: str = "loss/vq",
    ) -> None:
        super().__init__(n_embed, embedding_dim, beta, decay, eps, remap, unknown_index)
        self.loss_key = loss_key

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """(b, embedding_dim, h, w) → the same of codes; log: the loss, `encodings` (one-hot), `encoding_indices`, `perplexity`."""
        quantised, loss, (perplexity, encodings, indices) = _EMAVectorQuantizer.forward(self, z)
        return quantised, {
            self.loss_key: loss, "encodings": encodings, "encoding_indices": indices, "perplexity": perplexity,
        }  # fmt: skip
