"""Camera paths of SV3D: uneven ones, and pictures of any; the even orbit is `sgm.inference.video.orbit`'s own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.inference import InferenceError
from taming.util import atomic_path

WAVES = 3  # of the camera's height, each of half the length of the one before
SWING = 15.0  # degrees that they may add
SHAKE = 0.4  # share of a step by which a view may miss its place; below one half, views stay in order
STEEPEST = 89.0


def dynamic_orbit(
    num_frames: int = 21, elevation_deg: float = 10.0, seed: int = 0
) -> tuple[list[float], list[float]]:
    """A camera that circles an object unevenly, rising and sinking; it ends where the picture was taken.

    Args:
        num_frames: views, one at least.
        elevation_deg: of the picture, in degrees.
        seed: decides the path.

    Returns:
        Elevations and azimuths in degrees, one for each view: the flags `--elevations_deg` and `--azimuths_deg`.

    Raises:
        InferenceError: no views.

    Source: Voleti et al. 2024 (SV3D), section 3.1, "dynamic orbits".
    """
    if num_frames < 1:
        raise InferenceError(f"a camera path needs one view at least, not {num_frames}")
    generator = torch.Generator().manual_seed(seed)
    way = torch.arange(1, num_frames + 1, dtype=torch.float64) / num_frames
    waves = torch.arange(1, WAVES + 1, dtype=torch.float64)[:, None]
    heights = (torch.rand(WAVES, 1, generator=generator, dtype=torch.float64) * 2 - 1) / waves
    share = heights / max(float(heights.abs().sum()), 1.0)
    elevations = elevation_deg + SWING * (share * torch.sin(2 * math.pi * waves * way)).sum(dim=0)
    missed = torch.rand(num_frames, generator=generator, dtype=torch.float64) * 2 - 1
    azimuths = (360.0 * way + SHAKE * missed * 360.0 / num_frames) % 360.0
    elevations[-1], azimuths[-1] = elevation_deg, 0.0
    return elevations.clamp(-STEEPEST, STEEPEST).tolist(), azimuths.tolist()


def plot_orbit(elevations_deg: Sequence[float], azimuths_deg: Sequence[float], path: str | Path) -> None:
    """Write a picture of a camera path around an object: the views in their order, the last one, the picture's own, in red.

    Args:
        elevations_deg, azimuths_deg: in degrees, one for each view.
        path: a .png.

    Raises:
        InferenceError: unequal numbers, or matplotlib is not installed.
    """
    if len(elevations_deg) != len(azimuths_deg):
        raise InferenceError(
            f"{len(elevations_deg)} elevations and {len(azimuths_deg)} azimuths: each view needs one of both"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InferenceError("a plot needs matplotlib: python -m pip install matplotlib") from error
    views = [(math.radians(e), math.radians(a)) for e, a in zip(elevations_deg, azimuths_deg, strict=True)]
    places = [(math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)) for e, a in views]
    x, y, z = zip(*places[-1:], *places, strict=True)  # closed: from the picture around to the picture
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    axes.plot(x, y, z, marker="o", markersize=4)
    axes.scatter(*([p] for p in places[-1]), color="red", s=60, depthshade=False)
    for i, place in enumerate(places, 1):
        axes.text(*place, str(i), fontsize=8)
    axes.scatter([0], [0], [0], color="black", marker="s")  # the object
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1), box_aspect=(1, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
