"""Frames: pictures prepared for video models, videos read and written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from ldm.inference import InferenceError, next_number
from ldm.inference_images import Finished, padded_to_step
from sgm.inference.helpers import embed_watermark
from taming.data.images import EXTENSIONS, open_rgb
from taming.util import atomic_path

logger = logging.getLogger(__name__)

VIDEOS = (".mp4", ".gif", ".webm", ".mov", ".avi", ".mkv")
WHITE = 250  # from here on a channel counts as white
WHITE_PAPER = (255, 255, 255, 255)

Matting = Callable[[Image.Image], Image.Image]


# ------------------------------------------------------------------------------------------------------------ pictures


def find_pictures(path: str | Path, flag: str = "--input_path") -> list[Path]:
    """A picture, or all of a folder's, sorted.

    Raises:
        InferenceError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InferenceError(f"{flag} {path}: there is no such file or folder")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
    if not found:
        raise InferenceError(f"{flag} {path}: there is no picture in this folder")
    return found


@cache
def matting() -> Matting:
    """What takes the background out of pictures, RGB → RGBA.

    Raises:
        InferenceError: rembg is not installed.
    """
    try:
        import rembg
    except ImportError as error:
        raise InferenceError(
            "taking the background out needs rembg: python -m pip install 'rembg[cpu]'; or give pictures with a transparent background"
        ) from error
    session = rembg.new_session()
    return lambda image: rembg.remove(image, session=session, alpha_matting=True)


def with_alpha(image: Image.Image) -> Image.Image:
    """The picture with its transparent background, or with what `matting` finds to be background."""
    if "A" in image.getbands() or "transparency" in image.info:
        return image.convert("RGBA")
    return matting()(image.convert("RGB"))


def opaque_box(images: Sequence[Image.Image]) -> tuple[int, int, int, int]:
    """The smallest box (left, top, right, bottom) around what is opaque in any of some RGBA pictures of one size.

    Raises:
        InferenceError: nothing is.
    """
    alpha = np.maximum.reduce([np.asarray(image)[..., 3] for image in images])
    box = Image.fromarray(alpha).getbbox()
    if box is None:
        raise InferenceError("the picture is empty: all of it is background")
    return box


def centred(
    image: Image.Image, box: tuple[int, int, int, int], share: float | None, size: int
) -> Image.Image:
    """What is in a box, in the middle of a white square.

    Args:
        image: RGBA.
        box: left, top, right, bottom.
        share: of the square's side that the box's longer side takes; if None, the square's side is the picture's longer one.
        size: of the square in pixels.

    Raises:
        InferenceError: a share out of range.
    """
    if share is not None and not 0 < share <= 1:
        raise InferenceError(f"image_frame_ratio={share} must lie above 0, and be 1 at most")
    width, height = box[2] - box[0], box[3] - box[1]
    longest = max(width, height)
    side = max(image.size) if share is None else max(int(longest / share), longest)
    square = Image.new("RGBA", (side, side))
    square.paste(image.crop(box), ((side - width) // 2, (side - height) // 2))
    square = square.resize((size, size), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", square.size, WHITE_PAPER), square).convert("RGB")


def object_on_white(image: Image.Image, share: float | None = None, size: int = 576) -> Image.Image:
    """A picture's object in the middle of a white square; see `centred` and `with_alpha`."""
    cut = with_alpha(image)
    return centred(cut, opaque_box([cut]), share, size)


# -------------------------------------------------------------------------------------------------------------- videos


def _imageio_ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise InferenceError("videos need ffmpeg: python -m pip install 'imageio[ffmpeg]'") from error
    return imageio_ffmpeg


def write_video(frames: Tensor, path: str | Path, fps: float) -> None:
    """Images (t, 3, h, w) in [0, 1] as an mp4, whole or not at all; odd sides grow by one pixel.

    Raises:
        InferenceError: ffmpeg is not installed.
    """
    ffmpeg = _imageio_ffmpeg()
    even = padded_to_step(frames.float(), 2)
    with atomic_path(path) as temporary:
        file = ffmpeg.write_frames(
            str(temporary), (even.shape[3], even.shape[2]), fps=fps, macro_block_size=1, output_params=["-f", "mp4"]
        )  # fmt: skip
        file.send(None)
        for frame in even:
            pixels = (255.0 * frame.permute(1, 2, 0).clamp(0, 1)).byte().cpu().numpy()
            file.send(np.ascontiguousarray(pixels))
        file.close()


def read_video(path: str | Path, n_frames: int, flag: str = "--input_path") -> list[Image.Image]:
    """The first frames of a video, or of a folder of pictures; where there are too few, they go back and forth.

    Raises:
        InferenceError: nothing there can be read.
    """
    path = Path(path)
    if path.is_dir():
        frames = [open_with_alpha(p) for p in find_pictures(path, flag)[:n_frames]]
    elif not path.is_file():
        raise InferenceError(f"{flag} {path}: there is no such file or folder")
    elif path.suffix.lower() not in VIDEOS:
        raise InferenceError(
            f"{flag} {path}: a video is needed ({', '.join(VIDEOS)}), or a folder of pictures"
        )
    else:
        frames = _decode(path, n_frames, flag)
    if len({frame.size for frame in frames}) > 1:
        raise InferenceError(f"{flag} {path}: the frames must be of one size")
    if len(frames) < n_frames:
        logger.info(
            "%s has %d frames, %d are needed: they are shown back and forth", path, len(frames), n_frames
        )
    order = [*range(len(frames)), *range(len(frames) - 2, 0, -1)]
    return [frames[order[i % len(order)]] for i in range(n_frames)]


def open_with_alpha(path: Path) -> Image.Image:
    """A picture with its transparency, where it has any."""
    open_rgb(path)  # names the file if it is broken
    with Image.open(path) as image:
        return (
            image.convert("RGBA")
            if "A" in image.getbands() or "transparency" in image.info
            else open_rgb(path)
        )


def _decode(path: Path, n_frames: int, flag: str) -> list[Image.Image]:
    if path.suffix.lower() == ".gif":  # its transparency would be lost on ffmpeg
        with Image.open(path) as file:
            return [f.convert("RGBA") for f in ImageSequence.all_frames(file)[:n_frames]]
    frames: list[Image.Image] = []
    try:
        reader = _imageio_ffmpeg().read_frames(str(path))
        size = next(reader)["size"]
        for pixels in islice(reader, n_frames):
            frames.append(Image.frombytes("RGB", size, pixels))
        reader.close()
    except (OSError, StopIteration, RuntimeError) as error:
        raise InferenceError(f"{flag} {path} cannot be read as a video: {error}") from error
    if not frames:
        raise InferenceError(f"{flag} {path} has no frames")
    return frames


def white_is_background(image: Image.Image) -> Image.Image:
    """A picture on white paper, with the paper made transparent."""
    rgb = np.asarray(image.convert("RGB"))
    alpha = np.where((rgb < WHITE).any(axis=2), 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, alpha]))


def objects_on_white(
    frames: Sequence[Image.Image], remove_bg: bool, share: float | None, size: int
) -> list[Image.Image]:
    """A video's object in the middle of white squares, all cut alike.

    Args:
        frames: of one size; with transparent background, or on white.
        remove_bg: take the background out with `matting`.
        share, size: see `centred`.

    Raises:
        InferenceError: nothing but background, or rembg is needed and not installed.
    """
    if remove_bg:
        cut = [matting()(frame.convert("RGB")) for frame in frames]
    else:
        cut = [f if f.mode == "RGBA" else white_is_background(f) for f in frames]
    box = opaque_box(cut)
    return [centred(frame, box, share, size) for frame in cut]


class VideoFolder(Finished):
    """Numbered videos in a folder; nothing there is overwritten.

    Args:
        folder: made if it is not there.
        pattern: regular expression with one group, the number, of the files to count.
        fps: of the videos.
    """

    def __init__(self, folder: str | Path, pattern: str, fps: float) -> None:
        super().__init__(Path(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number, self.fps = next_number(self.folder, pattern), fps

    def save_video(self, frames: Tensor, ending: str = "", marked: bool = True) -> Path:
        """Write images (t, 3, h, w) in [0, 1] as <number><ending>.mp4, with the watermark unless told otherwise."""
        path = self.folder / f"{self.number:06}{ending}.mp4"
        write_video(embed_watermark(frames) if marked else frames, path, self.fps)
        self.files.append(path)
        return path

    def save_picture(self, image: Image.Image) -> None:
        """Write <number>.jpg."""
        path = self.folder / f"{self.number:06}.jpg"
        with atomic_path(path) as temporary:
            image.convert("RGB").save(temporary, format="JPEG")
        self.files.append(path)


def as_frames(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (t, 3, h, w) in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 127.5 - 1.0
