"""Losses of segmentation maps: cross-entropy of each label's presence, alone or with the quantiser's loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BCELoss(nn.Module):
    """Binary cross-entropy of logits against one-hot maps."""

    def forward(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and targets in [0, 1] of one shape → the mean loss, and nothing to log."""
        return F.binary_cross_entropy_with_logits(prediction, target), {}


class BCELossWithQuant(nn.Module):
    """Binary cross-entropy and the quantiser's loss.

    Args:
        codebook_weight: weight of the latter.
    """

    def __init__(self, codebook_weight: float = 1.0) -> None:
        super().__init__()
        self.codebook_weight = codebook_weight

    def forward(
        self, qloss: Tensor, target: Tensor, prediction: Tensor, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum.

        Args:
            qloss: the quantiser's loss; one of several numbers is not averaged, and the sum has its shape.
            target: one-hot maps (b, labels, h, w).
            prediction: logits, same shape.
            split: prefix of the logged names.

        Returns:
            The loss, and what to log.
        """
        bce_loss = F.binary_cross_entropy_with_logits(prediction, target)
        loss = bce_loss + self.codebook_weight * qloss
        log = {"total_loss": loss, "bce_loss": bce_loss, "quant_loss": qloss}
        return loss, {f"{split}/{name}": value.detach().mean() for name, value in log.items()}
