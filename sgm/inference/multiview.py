"""Video to several views of it: SV4D and SV4D 2.0. Pictures of one time and view make a grid, which clips fill in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.inference import InferenceError, precision_scope
from sgm.inference.video import clip_denoiser, decode_in_chunks, numbers_for, start_noise, video_conditions
from sgm.modules.diffusionmodules.guiders import DenoiseFunction, Guider, guided

logger = logging.getLogger(__name__)

ZEROED = ("cond_frames", "cond_frames_without_noise", "cond_view", "cond_motion")
# of the 21 views of SV3D's orbit (the given one first), those that SV4D continues
SUBSAMPLED_VIEWS = (0, 2, 5, 7, 9, 12, 14, 16, 19)


@dataclass(frozen=True)
class MultiviewModel:
    """A published model.

    Attributes:
        config: file name of the configuration.
        T, V: times and new views of a clip.
        azimuths: of the views in degrees, the given one first; None where SV3D makes the first views.
    """

    config: str
    T: int
    V: int
    azimuths: tuple[float, ...] | None = None


MULTIVIEW_MODELS = {
    "sv4d": MultiviewModel("sv4d.yaml", 5, 8),
    "sv4d2": MultiviewModel("sv4d2.yaml", 12, 4, (0, 60, 120, 180, 240)),
    "sv4d2_8views": MultiviewModel("sv4d2_8views.yaml", 5, 8, (0, 30, 75, 120, 165, 210, 255, 300, 330)),
}


@dataclass
class ViewGrid:
    """Pictures by time and view; view 0 is the given video.

    Args:
        video: (t, 3, h, w) in [-1, 1].
        elevations_deg: one, or one for each view.
        azimuths_deg: for each view.

    Attributes:
        pictures: {(time, view): (3, h, w)}, on the CPU.
    """

    video: Tensor
    elevations_deg: float | Sequence[float]
    azimuths_deg: Sequence[float]
    pictures: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_frames, self.n_views = len(self.video), len(self.azimuths_deg)
        self.elevations = numbers_for("elevations_deg", self.elevations_deg, self.n_views)
        self.pictures.update({(t, 0): frame for t, frame in enumerate(self.video.cpu())})

    @property
    def new_views(self) -> range:
        """The views to be made."""
        return range(1, self.n_views)

    def set_views(self, time: int, images: Tensor) -> None:
        """Enter all new views (v, 3, h, w) of a time."""
        self.pictures.update({(time, v): image for v, image in zip(self.new_views, images, strict=True)})

    def at(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """Pictures (n, 3, h, w) at times and views."""
        return torch.stack([self.pictures[place] for place in places])

    def view(self, v: int) -> Tensor:
        """A view's video in [0, 1], (t, 3, h, w)."""
        return self._shown([(t, v) for t in range(self.n_frames)])

    def time(self, t: int) -> Tensor:
        """All views of a time in [0, 1], (v, 3, h, w)."""
        return self._shown([(t, v) for v in range(self.n_views)])

    def diagonal(self) -> Tensor:
        """A video whose camera goes through the views while time passes, in [0, 1]."""
        return self._shown([(t, t * self.n_views // self.n_frames) for t in range(self.n_frames)])

    def _shown(self, places: Sequence[tuple[int, int]]) -> Tensor:
        return ((self.at(places) + 1.0) / 2.0).clamp(0.0, 1.0)

    def values(self, times: Sequence[int], knows_views: bool = True) -> dict[str, Any]:
        """What the conditioner is told of a clip at these times, whose first views are those of time `times[0]` by default.

        Args:
            times: of the clip.
            knows_views: the views at the clip's reference time are known; if not, they are empty.
        """
        return self.values_from(times[0], times, knows_views)

    def values_from(self, reference: int, times: Sequence[int], knows_views: bool = True) -> dict[str, Any]:
        """As `values`, with the views of any time as reference."""
        motion = self.at([(t, 0) for t in times])
        views = [(reference, v) for v in self.new_views]
        shown = self.at(views) if knows_views else torch.zeros(len(views), *motion.shape[1:])
        azimuths = [math.radians((a - self.azimuths_deg[0]) % 360) for a in self.azimuths_deg[1:]]
        return {
            "cond_frames_without_noise": motion, "cond_frames": motion.repeat_interleave(len(views), dim=0), "cond_aug": 0.0,
            "polar_rad": [math.radians(90 - e) for e in self.elevations[1:]] * len(times), "azimuth_rad": azimuths * len(times),
            "cond_motion": motion, "cond_view": shown,
        }  # fmt: skip


class AlternatingGuider(Guider):
    """Sees a clip forwards at every other step and backwards between, each under a condition of its own.

    So both ends of the clip, which are known, have their say. Conditions come as pairs (forwards, backwards).

    Args:
        guider: the guider of either direction.
        T: times of a clip, the outer axis of a batch "(t v)".

    Source: Xie et al. 2024 (SV4D), section 3.3.
    """

    def __init__(self, guider: Guider, T: int) -> None:
        self.guider, self.T, self.calls = guider, T, 0

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Any, uc: Any) -> Any:
        """Those of the guider."""
        return self.guider.prepare_inputs(x, s, c, uc)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guider's estimate."""
        return self.guider(x, sigma)

    def denoise(self, denoiser: DenoiseFunction, x: Tensor, sigma: Tensor, cond: Any, uc: Any) -> Tensor:
        """See `Guider`."""
        direction, self.calls = self.calls % 2, self.calls + 1
        seen = self._turned(x) if direction else x
        out = guided(self.guider, denoiser, seen, sigma, cond[direction], uc[direction])
        return self._turned(out) if direction else out

    def _turned(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.T, -1)).flip(0).flatten(0, 1)


class MultiviewSampler:
    """Fills a grid with a model's clips.

    Args:
        model: an engine with a sampler.
        grid: with the given video, and with the views of time 0 where the model needs them.
        T: times of a clip.
        decoding_t: pictures to decode at once; all if None.
        seed: of every clip.

    Raises:
        InferenceError: the video is shorter than a clip.
    """

    def __init__(
        self, model: Any, grid: ViewGrid, T: int, decoding_t: int | None = None, seed: int = 23
    ) -> None:
        if grid.n_frames < T:
            raise InferenceError(f"the video has {grid.n_frames} frames; this model needs {T} or more")
        self.model, self.grid, self.T, self.decoding_t, self.seed = model, grid, T, decoding_t, seed
        self.size = T * len(grid.new_views)

    def _conditions(self, values: dict[str, Any], knows_views: bool = True) -> tuple[Any, Any]:
        device = self.model.device
        values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
        c, uc = video_conditions(self.model, values, self.size, ZEROED)
        if not knows_views:
            c["cond_view"] = torch.zeros_like(c["cond_view"])
        return c, uc

    @torch.no_grad()
    def _sample(self, times: Sequence[int], make: Callable[[], tuple[Any, Any, Any]]) -> Tensor:
        """Pictures (t, v, 3, h, w) in [-1, 1], from what `make` gives: a guider, a condition and the unconditional one."""
        torch.manual_seed(self.seed)
        sampler = self.model.sampler
        with precision_scope(self.model.device), self.model.ema_scope():
            usual = sampler.guider
            try:
                sampler.guider, c, uc = make()
                shape = c[0] if isinstance(c, tuple) else c
                latents = sampler(
                    clip_denoiser(self.model, self.size), start_noise(shape, self.size), cond=c, uc=uc
                )
            finally:
                sampler.guider = usual
            images = decode_in_chunks(self.model, latents, self.decoding_t)
        return images.unflatten(0, (len(times), -1)).clamp(-1.0, 1.0)

    def clip(self, reference: int, times: Sequence[int], knows_views: bool = True) -> Tensor:
        """Pictures (t, v, 3, h, w) in [-1, 1] at some times, continued from the views of a reference time."""
        values = self.grid.values_from(reference, times, knows_views)
        return self._sample(
            times, lambda: (self.model.sampler.guider, *self._conditions(values, knows_views))
        )

    def clip_between(self, times: Sequence[int]) -> Tensor:
        """Pictures (t, v, 3, h, w) in [-1, 1] at times whose first and last views are known."""

        def make() -> tuple[Any, Any, Any]:
            ways = [self._conditions(self.grid.values(order)) for order in (times, times[::-1])]
            (c, uc), (c_back, uc_back) = ways
            return AlternatingGuider(self.model.sampler.guider, self.T), (c, c_back), (uc, uc_back)

        return self._sample(times, make)

    def fill_between_anchors(self) -> None:
        """SV4D: every (T - 1)-th time first, then what is between them; the views of time 0 must be known.

        Raises:
            InferenceError: a video of another length than T (T - 1) + 1 frames.
        """
        step = self.T - 1
        if self.grid.n_frames != self.T * step + 1:
            raise InferenceError(
                f"the video has {self.grid.n_frames} frames; this way needs {self.T * step + 1}"
            )
        anchors = range(step, self.grid.n_frames, step)
        for t, images in zip(anchors, self.clip(0, anchors), strict=True):
            self.grid.set_views(t, images)
        for start in range(0, self.grid.n_frames - 1, step):
            times = range(start, start + self.T)
            logger.info("Views of the frames %d to %d", times[1], times[-2])
            for t, images in list(zip(times, self.clip_between(times), strict=True))[1:-1]:
                self.grid.set_views(t, images)

    def fill_in_turn(self) -> None:
        """SV4D 2.0: clip by clip, each continued from a frame of the one before; the first one knows no views."""
        done = 0
        while done < self.grid.n_frames - 1:
            start = min(done, self.grid.n_frames - self.T)
            times = range(start, start + self.T)
            logger.info("Views of the frames %d to %d", times[0], times[-1])
            images = self.clip(start, times, knows_views=start > 0)
            for t, views in list(zip(times, images, strict=True))[1 if start else 0 :]:
                self.grid.set_views(t, views)
            done = times[-1]
