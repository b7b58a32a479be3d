"""Short clips of pictures that move, for training image-to-video models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from sgm.util import instantiate_from_config
from taming.data.datamodule import DataModuleFromConfig
from taming.data.utils import custom_collate


class Motion(NamedTuple):
    """Where a picture is at the end of its clip, from where it began."""

    turn: float = 0.0  # radians, counter-clockwise
    right: float = 0.0  # shares of the picture's side
    up: float = 0.0
    size: float = 1.0


MOTIONS = {
    "turn left": Motion(turn=math.pi / 2),
    "turn right": Motion(turn=-math.pi / 2),
    "go right": Motion(right=0.4),
    "go left": Motion(right=-0.4),
    "rise": Motion(up=0.4),
    "sink": Motion(up=-0.4),
    "grow": Motion(size=1.5),
    "shrink": Motion(size=0.5),
}


def move(picture: Tensor, motion: Motion, num_frames: int) -> Tensor:
    """Frames of a picture on white that moves evenly; the first one is the picture.

    Args:
        picture: (c, h, w) in [-1, 1].
        motion: what happens from the first frame to the last.
        num_frames: frames of the clip, two at least.

    Returns:
        (t, c, h, w)
    """
    s = torch.linspace(0.0, 1.0, num_frames)
    angle, size = s * motion.turn, motion.size**s
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    # affine_grid wants the way back: from a place in the frame to the place in the picture; y points down there
    x, y = 2 * motion.right * s, -2 * motion.up * s
    theta = torch.stack(
        [torch.stack([cos, -sin, sin * y - cos * x], -1), torch.stack([sin, cos, -sin * x - cos * y], -1)], 1
    )
    grid = F.affine_grid(theta, [num_frames, *picture.shape], align_corners=False)
    # what lies outside is filled with zeros, so white has to be zero meanwhile
    frames = (picture - 1.0).expand(num_frames, -1, -1, -1)
    return F.grid_sample(frames, grid, align_corners=False) + 1.0


class MovingPictures(Dataset):
    """Clips of a data set's pictures: {"jpg": (t, 3, h, w) in [-1, 1], "cond_frames": the first frame (3, h, w), "motion": label}.

    Args:
        pictures: configuration of a data set with items `image` (h, w, 3) in [-1, 1], on white.
        num_frames: of a clip.
        motions: names out of `MOTIONS`; labels count them in this order. All if None.
        varied: draw the motion of a picture anew each time; otherwise the i-th picture has the i-th motion.

    Raises:
        ValueError: fewer than two frames, or an unknown motion.
    """

    def __init__(
        self,
        pictures: Mapping[str, Any],
        num_frames: int = 8,
        motions: Sequence[str] | None = None,
        varied: bool = True,
    ) -> None:
        names = list(motions or MOTIONS)
        if unknown := [name for name in names if name not in MOTIONS]:
            raise ValueError(f"motion {unknown[0]!r} is unknown; choose among {', '.join(MOTIONS)}")
        if num_frames < 2:
            raise ValueError(f"num_frames={num_frames}: a clip has two frames at least")
        self.pictures: Any = instantiate_from_config(pictures)
        self.motions = [MOTIONS[name] for name in names]
        self.num_frames, self.varied = num_frames, varied

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture = torch.as_tensor(self.pictures[i]["image"]).permute(2, 0, 1)
        label = int(torch.randint(len(self.motions), ())) if self.varied else i % len(self.motions)
        return {
            "jpg": move(picture, self.motions[label], self.num_frames),
            "cond_frames": picture,
            "motion": label,
        }


def collate_clips(clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Clips as a batch for a video network: frames one after another, and what belongs to a clip once for each of its frames.

    Returns:
        `jpg` (b·t, 3, h, w), `cond_frames` (b, 3, h, w), `motion` (b·t,), `num_video_frames` t.
    """
    batch = custom_collate(list(clips))
    frames = batch["jpg"].shape[1]
    return {
        **batch,
        "jpg": rearrange(batch["jpg"], "b t c h w -> (b t) c h w"),
        "motion": batch["motion"].repeat_interleave(frames),
        "num_video_frames": frames,
    }


class ClipDataModule(DataModuleFromConfig):
    """`DataModuleFromConfig` for data sets of clips; `batch_size` counts clips."""

    collate = staticmethod(collate_clips)
