"""Guidance: which conditions a denoiser sees, and how its estimates of x_0 are joined.

A sampler asks `guider.prepare_inputs(x, sigma, cond, uc)`, gives the result to the denoiser, and what that returns to
`guider(denoised, sigma)`. A guider that needs more than one call of one network defines `denoise` instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.models.diffusion.sampler import concatenate
from ldm.models.diffusion.sampling_util import rescale_guided
from sgm.modules.diffusionmodules.sampling_utils import NoDynamicThresholding
from sgm.util import append_dims, instantiate_from_config, object_from
from taming.util import freeze

DOUBLED = ("vector", "crossattn", "concat")
LATENT_DIFFUSION = ("c_crossattn", "c_concat", "c_adm")  # what conditions of chapter two are called
FUSINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda waves: waves.amax(dim=0),
    "mean": lambda waves: waves.mean(dim=0),
    "multiply": lambda waves: waves.prod(dim=0),
}

Inputs = tuple[Tensor, Tensor, Any]
DenoiseFunction = Callable[[Tensor, Tensor, Any], Tensor]


class Guider(ABC):
    """A subclass defines both halves of the protocol."""

    @abstractmethod
    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Inputs:
        """What the denoiser is to be called with.

        Args:
            x: latents (b, ...).
            s: noise levels (b,).
            c, uc: condition and unconditional condition.
        """

    @abstractmethod
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided estimate of x_0, from those of the prepared inputs."""

    def denoise(self, denoiser: DenoiseFunction, x: Tensor, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
        """The guided estimate of x_0, from latents."""
        return self(denoiser(*self.prepare_inputs(x, sigma, cond, uc)), sigma)


def guided(guider: Guider, denoiser: DenoiseFunction, x: Tensor, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
    """The guided estimate of x_0, also by guiders that know only the published protocol of two halves."""
    denoise = getattr(guider, "denoise", partial(Guider.denoise, guider))
    return denoise(denoiser, x, sigma, cond, uc)


class IdentityGuider(Guider):
    """No guidance."""

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Inputs:
        """Everything as it is, without the unconditional condition."""
        return x, s, dict(c) if isinstance(c, Mapping) else c

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate as it is."""
        return x


def doubled(c: Any, uc: Any, keys: Sequence[str], must_agree: bool) -> Any:
    """Both conditions as one batch, the unconditional one first.

    Args:
        c, uc: dicts, or conditions of chapter two (a tensor, list or dict).
        keys: entries to join; others are taken from c.
        must_agree: whether those others have to be the same in both.

    Raises:
        ValueError: uc lacks an entry, or shapes differ.
        AssertionError: others do not agree (the published error class).
    """
    if not isinstance(c, Mapping):
        return concatenate(uc, c)
    missing = [k for k in c if k not in uc]
    if missing:
        raise ValueError(f"the unconditional condition lacks {missing}; it holds {sorted(uc)}")
    out = {}
    for key, value in c.items():
        if key in keys:
            out[key] = concatenate(uc[key], value)
        elif must_agree and not _same(value, uc[key]):
            raise AssertionError(
                f"the entry {key!r} differs between condition and unconditional condition; only {sorted(keys)} may"
            )
        else:
            out[key] = value
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return bool(a == b)


class VanillaCFG(Guider):
    """Classifier-free guidance: x_u + s (x_c - x_u).

    Args:
        scale: s; 1 is no guidance.
        dyn_thresh_config: of a function (x_u, x_c, s) to use instead, as older configurations have it.
        guidance_rescale: how much of the contrast that guidance adds to the estimate of x_0 to take away again, from 0 to 1.

    Source: Ho & Salimans 2022, equation 6; Lin et al. 2023, equations 15 and 16.
    """

    def __init__(self, scale: float, dyn_thresh_config: Any = None, guidance_rescale: float = 0.0) -> None:
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale={guidance_rescale} must lie between 0 and 1")
        self.scale, self.guidance_rescale = scale, guidance_rescale
        self.dyn_thresh = (
            instantiate_from_config(dyn_thresh_config) if dyn_thresh_config else NoDynamicThresholding()
        )

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Inputs:
        """Two batches in one, the unconditional half first; entries other than conditions must agree."""
        return torch.cat([x, x]), torch.cat([s, s]), doubled(c, uc, (*DOUBLED, *LATENT_DIFFUSION), True)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Guider`."""
        x_u, x_c = x.chunk(2)
        guided = self.dyn_thresh(x_u, x_c, self.scale)
        return rescale_guided(guided, x_c, self.guidance_rescale) if self.guidance_rescale else guided


# -------------------------------------------------------------------------------------------------- guidance over frames


class FrameGuider(Guider):
    """Classifier-free guidance with a scale for each frame of a batch "(b t)".

    Args:
        scale: (1, num_frames).
        additional_cond_keys: further entries, one or a list, that both halves have their own of.
    """

    def __init__(self, scale: Tensor, additional_cond_keys: str | Sequence[str] | None = None) -> None:
        self.scale = scale
        self.num_frames = scale.shape[1]
        keys = additional_cond_keys or []
        self.additional_cond_keys = [keys] if isinstance(keys, str) else list(keys)

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Inputs:
        """Two batches in one, the unconditional half first; other entries are the condition's."""
        return (
            torch.cat([x, x]),
            torch.cat([s, s]),
            doubled(c, uc, (*DOUBLED, *self.additional_cond_keys), False),
        )

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Guider`.

        Raises:
            ValueError: the batch is not a multiple of the frames.
        """
        x_u, x_c = x.chunk(2)
        if len(x_u) % self.num_frames:
            raise ValueError(
                f"a batch of {len(x_u)} is not made of videos of num_frames={self.num_frames} each; set the guider's "
                "num_frames to that of the videos"
            )
        scale = self.scale.to(x).repeat(len(x_u) // self.num_frames, 1)
        scale = append_dims(rearrange(scale, "b t -> (b t)"), x.ndim)
        return x_u + scale * (x_c - x_u)


def triangle_wave(values: Tensor, period: float) -> Tensor:
    """0 at multiples of the period, 1 halfway between."""
    turns = values / period
    return 2 * (turns - (turns + 0.5).floor()).abs()


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return (low + (high - low) * share)[None]


class LinearPredictionGuider(FrameGuider):
    """A scale that grows evenly from the first frame to the last.

    Args:
        max_scale, min_scale: of the last and the first frame.
        num_frames: of each video.
        additional_cond_keys: see `FrameGuider`.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int,
        min_scale: float = 1.0,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(torch.linspace(min_scale, max_scale, num_frames)[None], additional_cond_keys)
        self.min_scale, self.max_scale = min_scale, max_scale


class TrianglePredictionGuider(FrameGuider):
    """A scale that rises and falls: for orbits, whose last frame meets the first.

    Args:
        max_scale, min_scale: at the peaks and between them.
        num_frames: of each video.
        period: of the wave as a share of the video; a list gives several waves.
        period_fusing: how several are joined, "max", "mean" or "multiply".
        additional_cond_keys: see `FrameGuider`.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int,
        min_scale: float = 1.0,
        period: float | Sequence[float] = 1.0,
        period_fusing: str = "max",
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        if period_fusing not in FUSINGS:
            raise ValueError(f"period_fusing={period_fusing!r} is unknown; choose one of {sorted(FUSINGS)}")
        periods = [period] if isinstance(period, int | float) else list(period)
        times = torch.linspace(0, 1, num_frames)
        wave = FUSINGS[period_fusing](torch.stack([triangle_wave(times, p) for p in periods]))
        super().__init__(_between(min_scale, max_scale, wave), additional_cond_keys)
        self.min_scale, self.max_scale = min_scale, max_scale


class TrapezoidPredictionGuider(FrameGuider):
    """A scale that rises at the beginning and falls at the end; in the middle it is 1, as published, not `max_scale`.

    Args:
        max_scale, min_scale: inner and outer end of both edges.
        num_frames: of each video.
        edge_perc: length of an edge as a share of the video.
        additional_cond_keys: see `FrameGuider`.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int,
        min_scale: float = 1.0,
        edge_perc: float = 0.1,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        rise = torch.linspace(min_scale, max_scale, int(num_frames * edge_perc))
        middle = torch.ones(num_frames - 2 * len(rise))
        super().__init__(torch.cat([rise, middle, rise.flip(0)])[None], additional_cond_keys)
        self.min_scale, self.max_scale = min_scale, max_scale


class SpatiotemporalPredictionGuider(FrameGuider):
    """A scale that grows over the frames and rises and falls over the views of each.

    Args:
        max_scale, min_scale: at both ends of the range.
        num_frames: pictures of each video, frames × views.
        num_views: of each frame.
        additional_cond_keys: see `FrameGuider`.
    """

    def __init__(
        self,
        max_scale: float,
        num_frames: int,
        num_views: int = 1,
        min_scale: float = 1.0,
        additional_cond_keys: str | Sequence[str] | None = None,
    ) -> None:
        over_time = torch.linspace(0, 1, num_frames // num_views)[:, None]  # (t, 1)
        over_views = triangle_wave(torch.linspace(0, 1, num_views), 1.0)  # (v,)
        share = (0.5 * over_time + 0.5 * over_views).flatten()
        super().__init__(_between(min_scale, max_scale, share), additional_cond_keys)
        self.min_scale, self.max_scale, self.num_views = min_scale, max_scale, num_views


# -------------------------------------------------------------------------------------- guidance from elsewhere, and when


class GuidanceInterval(Guider):
    """Another guider, in a range of noise levels only; elsewhere the condition alone, in half the time.

    Args:
        guider_config: of the other guider, or that itself.
        sigma_min, sigma_max: it guides where sigma_min < σ ≤ sigma_max.

    Source: Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution quality".
    """

    def __init__(self, guider_config: Any, sigma_min: float, sigma_max: float) -> None:
        if not 0 <= sigma_min < sigma_max:
            raise ValueError(
                f"sigma_min={sigma_min}, sigma_max={sigma_max}: 0 ≤ sigma_min < sigma_max is needed"
            )
        self.guider: Guider = object_from(guider_config)
        self.outside = IdentityGuider()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def _guider(self, sigma: Tensor) -> Guider:
        inside = (sigma > self.sigma_min) & (sigma <= self.sigma_max)
        if bool(inside.any()) != bool(inside.all()):
            raise ValueError("a guidance interval needs one noise level for the whole batch")
        return self.guider if bool(inside.any()) else self.outside

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Inputs:
        """Those of the guider in charge."""
        return self._guider(s).prepare_inputs(x, s, c, uc)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided estimate of the guider in charge."""
        return self._guider(sigma)(x, sigma)

    def denoise(self, denoiser: DenoiseFunction, x: Tensor, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
        """See `Guider`."""
        return guided(self._guider(sigma), denoiser, x, sigma, cond, uc)


class AutoGuidance(IdentityGuider):
    """Away from a weaker version of the network under the same condition: D_0 + s (D_1 - D_0).

    Args:
        scale: s; 1 is no guidance.
        weak: the weaker model, or its configuration: a function (x, σ, condition) → x_0 such as `LatentDiffusionDenoiser`, or an
            engine with `denoiser` and `model`, on the main one's device. Less trained or smaller than that, otherwise alike.

    Raises:
        TypeError: `weak` is neither.

    Source: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself".
    """

    def __init__(self, scale: float, weak: Any) -> None:
        self.scale = scale
        weak = object_from(weak)
        if isinstance(weak, nn.Module):
            freeze(weak)
        self.weak: DenoiseFunction = weak
        if hasattr(weak, "denoiser") and hasattr(weak, "model"):
            self.weak = lambda x, sigma, cond: weak.denoiser(weak.model, x, sigma, cond)
        elif not callable(weak):
            raise TypeError(
                f"weak is a {type(weak).__name__}; a function (x, σ, condition) → x_0 is needed, or an engine with denoiser and model"
            )

    def denoise(self, denoiser: DenoiseFunction, x: Tensor, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
        """See `Guider`; `uc` is not used."""
        strong, weak = denoiser(x, sigma, cond), self.weak(x, sigma, cond)
        return weak + self.scale * (strong - weak)
