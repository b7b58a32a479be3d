"""Quantisation without a codebook to learn: each channel is rounded (FSQ) or reduced to its sign (LFQ)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from taming.modules.vqvae.codebook import Quantizer, straight_through


class FSQ(Quantizer):
    """Finite scalar quantisation: channel i is squeezed by tanh and rounded to one of `levels[i]` values in [-1, 1].

    There is no codebook, no loss, and no code out of reach. The model's embed_dim is the number of channels,
    `len(levels)`, its n_embed the number of codes, their product; [8, 5, 5, 5] takes the place of 1,024 codes,
    [8, 8, 8, 6, 5] of 16,384.

    Args:
        levels: values per channel, each at least 2.
        remap, unknown_index, sane_index_shape: see `Quantizer`.

    Source: Mentzer et al. 2023, section 3 and table 1.
    """

    half_width: Tensor
    offset: Tensor
    shift: Tensor
    steps: Tensor
    place: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ) -> None:
        levels = [int(n) for n in levels]
        if not levels or min(levels) < 2:
            raise ValueError(f"levels={levels} must be whole numbers from 2 up, one per channel")
        super().__init__(math.prod(levels), len(levels), remap, unknown_index, sane_index_shape)
        self.levels = levels
        count = torch.tensor(levels)
        # slightly wider than the outermost values, so that tanh reaches them
        half_width = (count - 1) / 2 + 1e-3
        offset = torch.where(count % 2 == 0, 0.5, 0.0)  # an even number of values has none at its middle
        constants = {
            "half_width": half_width,
            "offset": offset,
            "shift": (offset / half_width).atanh(),  # so that 0 stays 0
            "steps": count // 2,
            "place": torch.tensor(list(itertools.accumulate([1, *levels[:-1]], lambda a, b: a * b))),
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def bound(self, vectors: Tensor) -> Tensor:
        """Squeeze (…, channels) to the range in which rounding gives `levels` values."""
        return (vectors + self.shift).tanh() * self.half_width - self.offset

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes (…, channels) in [-1, 1] → indices (…): the digits of a number, the first channel's the lowest."""
        digits = (codes.float() * self.steps).round().long() + self.steps
        return (digits * self.place).sum(dim=-1)

    def look_up(self, indices: Tensor) -> Tensor:
        """Indices (…) → codes (…, channels) in [-1, 1]."""
        digits = indices[..., None] // self.place % (torch.tensor(self.levels, device=indices.device))
        return (digits - self.steps) / self.steps

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise a map (b, channels, h, w); the loss is zero.

        Returns:
            The quantised map with values in [-1, 1], zero, (None, None, indices as of `Quantizer`).
        """
        bounded = self.bound(self.to_vectors(z).float())  # bfloat16 would round before we do
        codes = straight_through(bounded, bounded.round()) / self.steps
        indices = self.codes_to_indices(codes.detach()).reshape(-1)
        return self.to_map(codes).to(z.dtype), z.new_zeros(()), (None, None, self.number(indices, z))


class LFQ(Quantizer):
    """Look-up-free quantisation: each channel becomes its sign, and the signs are the bits of the index.

    Beside the commitment, the loss asks for decided bits and evenly used codes: the mean entropy H of the codes'
    probabilities given a vector, less `diversity` times the entropy of their mean. Probabilities are a softmax of
    -|z - c|² / temperature over all codes, which makes the bits independent: the first entropy is a sum over bits and exact;
    the second is exact up to 2^`group_bits` codes, beyond that a sum over groups of bits (an upper bound).

    Args:
        bits: channels; there are 2^bits codes. The model's embed_dim is `bits`, its n_embed 2^bits.
        entropy_weight: weight of the two entropies together.
        commitment_weight: weight of |z - sign(z)|².
        diversity: weight of the mean's entropy within them.
        temperature: of the probabilities, > 0.
        group_bits: most bits whose codes are enumerated, at a memory of n·2^group_bits numbers per group.
        remap, unknown_index, sane_index_shape: see `Quantizer`.

    Source: Yu et al. 2023 (MAGVIT-v2), section 3.1, equations 2 to 5; groups: Zhao et al. 2024 (BSQ), section 4.
    """

    place: Tensor

    def __init__(
        self,
        bits: int,
        entropy_weight: float = 0.1,
        commitment_weight: float = 0.25,
        diversity: float = 1.0,
        temperature: float = 1.0,
        group_bits: int = 9,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
    ) -> None:
        if not 1 <= bits <= 62:
            raise ValueError(f"bits={bits} must lie between 1 and 62; 18 bits are 262,144 codes")
        if temperature <= 0 or group_bits < 1:
            raise ValueError(f"temperature={temperature} and group_bits={group_bits} must be positive")
        super().__init__(2**bits, bits, remap, unknown_index, sane_index_shape)
        self.bits, self.group_bits = bits, group_bits
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.diversity, self.temperature = diversity, temperature
        self.register_buffer("place", 2 ** torch.arange(bits), persistent=False)

    def look_up(self, indices: Tensor) -> Tensor:
        """Indices (…) → codes (…, bits) of -1 and 1; the first channel is the lowest bit."""
        return (indices[..., None] // self.place % 2 * 2 - 1).float()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise a map.

        Args:
            z: (b, bits, h, w).

        Returns:
            The quantised map of -1 and 1 (0 counts as negative), the loss, (None, None, indices as of `Quantizer`).
        """
        vectors = self.to_vectors(z).float()
        positive = vectors > 0
        quantised = torch.where(positive, 1.0, -1.0)
        indices = (positive * self.place).sum(dim=-1).reshape(-1)
        decided, even = self.entropies(vectors.reshape(-1, self.bits))
        loss = self.commitment_weight * F.mse_loss(vectors, quantised)
        loss = loss + self.entropy_weight * (decided - self.diversity * even)
        codes = self.to_map(straight_through(vectors, quantised)).to(z.dtype)
        return codes, loss, (None, None, self.number(indices, z))

    def entropies(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of vectors (n, bits), in nats: the mean entropy of their codes, and the entropy of their mean code.

        Both are at most bits · log 2.
        """
        logits = 4 / self.temperature * vectors  # of each bit being 1: -|z - 1|² + |z + 1|² = 4 z
        per_sample = F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="sum") / len(
            vectors
        )
        groups = vectors.chunk(math.ceil(self.bits / self.group_bits), dim=1)
        return per_sample, torch.stack([self._entropy_of_mean(group) for group in groups]).sum()

    def _entropy_of_mean(self, group: Tensor) -> Tensor:
        width = group.shape[1]
        numbers = torch.arange(2**width, device=group.device)
        codes = (numbers[:, None] // 2 ** torch.arange(width, device=group.device) % 2 * 2 - 1).to(group)
        mean = (2 / self.temperature * group @ codes.t()).softmax(dim=1).mean(dim=0)
        return torch.special.entr(mean).sum()
