"""Exponential moving averages of weights, as published checkpoints hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """An exponential moving average of a module's trainable parameters, kept as buffers.

    A buffer is named after its parameter with all dots removed (`out.2.weight` becomes `out2weight`): a module cannot
    hold names with dots, and every published checkpoint spells them so.

    Args:
        model: the module to follow; parameters that do not require gradients now are left out for good.
        decay: share of the average that stays at each update, in [0, 1].
        use_num_upates: warm up, with the rate min(decay, (1 + n) / (10 + n)) at update n (published spelling).

    Attributes:
        void: weights were loaded without averages, so these are those of no model: `ema_scope` leaves the live weights in
            place, and the next update begins with them.
        filled: averages were loaded, or an update was made.

    Raises:
        ValueError: decay outside [0, 1].
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay} must lie between 0 and 1")
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int32))
        self.void = self.filled = False
        self.m_name2s_name: dict[str, str] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow = name.replace(".", "")
                self.m_name2s_name[name] = shadow
                self.register_buffer(shadow, parameter.detach().clone())
        self.collected_params: list[Tensor] = []

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.filled = self.filled or any(name.startswith(prefix) for name in state_dict)
        self.void = not self.filled

    def reset_num_updates(self) -> None:
        """Begin the warm-up again."""
        self.num_updates.zero_()

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(model.named_parameters())
        names = self.m_name2s_name.items()
        return [getattr(self, shadow) for _, shadow in names], [
            parameters[name].detach() for name, _ in names
        ]

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the averages one update towards the model's present weights.

        Raises:
            RuntimeError: a parameter was frozen or freed since the averages were made.
        """
        changed = [n for n, p in model.named_parameters() if p.requires_grad != (n in self.m_name2s_name)]
        if changed:
            raise RuntimeError(
                f"the average was made for other trainable parameters; these changed since: {', '.join(changed[:4])}"
            )
        decay = float(self.decay)
        if self.num_updates >= 0:
            self.num_updates += 1
            n = int(self.num_updates)
            decay = min(decay, (1 + n) / (10 + n))
        shadows, parameters = self._pairs(model)
        if self.void:
            decay, self.void = 0.0, False
        self.filled = True
        if shadows:
            # one fused kernel for all tensors: the update is a noticeable part of a small model's step otherwise
            torch._foreach_lerp_(
                shadows, [p.to(s.dtype) for s, p in zip(shadows, parameters, strict=True)], 1.0 - decay
            )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the averages into the model."""
        for shadow, parameter in zip(*self._pairs(model), strict=True):
            parameter.copy_(shadow)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of the given parameters, for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Put back what `store` kept."""
        for kept, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.copy_(kept)
        self.collected_params = []


@contextmanager
def ema_scope(ema: LitEma | None, model: nn.Module) -> Iterator[None]:
    """Run a block with the averaged weights in the model; the live ones come back even if it fails.

    Args:
        ema: the averages; None, or void ones, leave the model as it is.
        model: the module that `ema` follows.
    """
    if ema is None or ema.void:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model)
    try:
        yield
    finally:
        ema.restore(model.parameters())
