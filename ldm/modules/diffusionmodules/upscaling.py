"""What a super-resolution model is conditioned on: the small picture, as it is or noised (Saharia et al. 2021; Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.modules.diffusionmodules.forward_process import ForwardProcess
from ldm.modules.diffusionmodules.util import make_beta_schedule


class AbstractLowScaleModel(ForwardProcess):
    """Passes the small picture on unchanged, and knows how to noise it.

    Args:
        noise_schedule_config: options of `make_beta_schedule`, with `timesteps` for its length (1000) and `beta_schedule`
            for its name ("linear"); None goes without a schedule.
    """

    def __init__(self, noise_schedule_config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if noise_schedule_config is not None:
            self.register_schedule(**noise_schedule_config)

    def register_schedule(
        self,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute the buffers of the forward process; see `make_beta_schedule`."""
        self.linear_start, self.linear_end = linear_start, linear_end
        self.register_betas(make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """The picture, and its noise level (here none)."""
        return x, None

    def decode(self, x: Tensor) -> Tensor:
        """A picture to look at, from what the network is given."""
        return x


class SimpleImageConcat(AbstractLowScaleModel):
    """The small picture as it is: its noise level is 0."""

    def __init__(self) -> None:
        super().__init__(noise_schedule_config=None)
        self.max_noise_level = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The picture (b, c, h, w), and zeros (b,)."""
        return x, torch.zeros(len(x), device=x.device, dtype=torch.long)


class ImageConcatWithNoiseAugmentation(AbstractLowScaleModel):
    """The small picture, noised at a random or given level that the network is told.

    Args:
        noise_schedule_config: see `AbstractLowScaleModel`.
        max_noise_level: levels are drawn below it; it must not exceed the schedule's length.
        to_cuda: accepted, as published; the noise lies where the picture lies.

    Source: Ho et al. 2022, "Cascaded diffusion models", section 4.
    """

    def __init__(
        self,
        noise_schedule_config: Mapping[str, Any] | None,
        max_noise_level: int = 1000,
        to_cuda: bool = False,
    ) -> None:
        super().__init__(noise_schedule_config=noise_schedule_config)
        self.max_noise_level = max_noise_level

    def forward(self, x: Tensor, noise_level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise a batch.

        Args:
            x: pictures (b, …).
            noise_level: steps of the schedule (b,); drawn if None.

        Returns:
            The noised pictures and their levels (b,).

        Raises:
            AssertionError: the levels are no tensor (the published error class).
        """
        if noise_level is None:
            noise_level = torch.randint(0, self.max_noise_level, (len(x),), device=x.device).long()
        elif not isinstance(noise_level, Tensor):
            raise AssertionError(
                f"noise_level is a {type(noise_level).__name__}; give a tensor with a level for each picture, "
                f"from 0 to {self.max_noise_level - 1}"
            )
        return self.q_sample(x, noise_level), noise_level
