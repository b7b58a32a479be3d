"""Which noise levels a training step sees.

Random numbers come from torch's global generator on the CPU, and are drawn even where the caller gives his own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgm.util import default, instantiate_from_config


class EDMSampling:
    """ln σ ~ N(p_mean, p_std²).

    Source: Karras et al. 2022, table 1.
    """

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Noise levels (n_samples,); `rand` are standard normal numbers to use instead of drawn ones."""
        drawn = torch.randn(n_samples)
        return (self.p_mean + self.p_std * default(rand, drawn)).exp()


class DiscreteSampling:
    """Any of a model's discrete noise levels, each as likely.

    Args:
        discretization_config: of the `Discretization`.
        num_idx: number of levels.
        do_append_zero, flip: see `Discretization`.
    """

    def __init__(
        self, discretization_config: Any, num_idx: int, do_append_zero: bool = False, flip: bool = True
    ) -> None:
        self.num_idx = num_idx
        discretization = instantiate_from_config(discretization_config)
        self.sigmas: Tensor = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)

    def idx_to_sigma(self, idx: Any) -> Tensor:
        """Levels at indices."""
        return self.sigmas[idx]

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Noise levels (n_samples,); `rand` are indices to use instead of drawn ones."""
        drawn = torch.randint(0, self.num_idx, (n_samples,))
        return self.idx_to_sigma(default(rand, drawn))


class ZeroSampler:
    """Next to no noise, σ = 1e-5: for trainings of a decoder or an embedder inside the engine."""

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Noise levels (n_samples,)."""
        drawn = torch.randn(n_samples)  # as published: what is drawn after it keeps its place
        return torch.full_like(default(rand, drawn), 1e-5)


class ClipSampling:
    """One noise level for all frames of a clip.

    Args:
        sampler_config: of what draws it.
        num_frames: of a clip.
    """

    def __init__(self, sampler_config: Any, num_frames: int) -> None:
        self.sampler, self.num_frames = instantiate_from_config(sampler_config), num_frames

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Noise levels (n_samples,) of the frames of clips, one clip after another; `rand` is for clips.

        Raises:
            ValueError: frames that do not make whole clips.
        """
        if n_samples % self.num_frames:
            raise ValueError(f"{n_samples} frames are no whole clips of {self.num_frames}")
        return self.sampler(n_samples // self.num_frames, rand).repeat_interleave(self.num_frames)
