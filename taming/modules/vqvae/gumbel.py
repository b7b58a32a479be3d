"""Quantisation by drawing codes: the Gumbel-softmax relaxation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.vqvae.codebook import Quantizer


class GumbelQuantize(Quantizer):
    """Draws each position's code from a softmax over the whole codebook, with Gumbel noise, also in eval mode.

    The loss is `kl_weight` times the divergence of that softmax from the uniform distribution. In eval mode the draw is
    always hard (one code). `temperature` belongs to training's schedule and is no part of the state.

    Args:
        num_hiddens: channels of the map.
        embedding_dim: channels of a code.
        n_embed: size of the codebook.
        straight_through: draw hard codes in training, too, with the gradient of the soft mixture.
        kl_weight: weight of the divergence.
        temp_init: first temperature.
        use_vqinterface: False returns the bare indices instead of `(None, None, indices)`.
        remap, unknown_index: see `Remap`; only the used codes are drawn.

    Source: Jang et al. 2017, equations 1 and 2; Ramesh et al. 2021, section 2.1.
    """

    def __init__(
        self,
        num_hiddens: int,
        embedding_dim: int,
        n_embed: int,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        temp_init: float = 1.0,
        use_vqinterface: bool = True,
        remap: str | None = None,
        unknown_index: str | int = "random",
    ) -> None:
        super().__init__(n_embed, embedding_dim, remap, unknown_index, sane_index_shape=True)
        self.num_hiddens, self.embedding_dim, self.n_embed = num_hiddens, embedding_dim, n_embed
        self.straight_through = straight_through
        self.kl_weight = kl_weight
        self.temperature = temp_init
        self.use_vqinterface = use_vqinterface
        self.proj = nn.Conv2d(num_hiddens, n_embed, 1)
        self.embed = nn.Embedding(n_embed, embedding_dim)

    def look_up(self, indices: Tensor) -> Tensor:
        """Codes (…, embedding_dim) of codebook indices (…)."""
        return self.embed(indices)

    def forward(self, z: Tensor, temp: float | None = None, return_logits: bool = False) -> tuple[Any, ...]:
        """Quantise a map.

        Args:
            z: (b, num_hiddens, h, w).
            temp: temperature of the draw, > 0; None takes `temperature`.
            return_logits: also return the logits (b, n_embed, h, w), of the used codes only if remapped.

        Returns:
            The quantised map (b, embedding_dim, h, w), the loss, (None, None, indices (b, h, w)), and the logits on request.

        Raises:
            ValueError: other channels than `num_hiddens`.
        """
        if z.ndim != 4 or z.shape[1] != self.num_hiddens:
            raise ValueError(
                f"GumbelQuantize was built for maps (b, {self.num_hiddens}, h, w), not {tuple(z.shape)}"
            )
        logits = self.proj(z)
        if self.remap is not None:
            logits = logits[:, self.used]
        drawn = F.gumbel_softmax(
            logits,
            tau=self.temperature if temp is None else temp,
            dim=1,
            hard=self.straight_through or not self.training,
        )
        codebook = self.embed.weight if self.remap is None else self.embed.weight[self.used]
        quantised = torch.einsum("b n h w, n d -> b d h w", drawn, codebook)
        q = logits.softmax(dim=1)
        # as published, "uniform" is over the whole codebook even where only the used codes are drawn
        divergence = (q * (q * self.n_embed + 1e-10).log()).sum(dim=1).mean()
        indices = drawn.argmax(dim=1)
        info: Any = (None, None, self._numbered(indices)) if self.use_vqinterface else self._numbered(indices)
        return (quantised, self.kl_weight * divergence, info, *([logits] if return_logits else []))

    def _numbered(self, drawn: Tensor) -> Tensor:
        return drawn if self.remap is None else self.remap_to_used(self.used[drawn])
