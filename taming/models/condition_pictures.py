"""Pictures of what a model was conditioned on, for its logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LAYOUTS = ("objects_bbox", "objects_center_points")
PUBLISHED_FONT = Path("data/DejaVuSans.ttf")  # where the originals looked, relative to the working directory


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[str | Sequence[str]], size: int = 10) -> Tensor:
    """Pictures of captions: black on white, broken into lines of 40 characters per 256 pixels.

    Args:
        wh: width and height.
        xc: captions, each a string or several, of which the first is drawn.
        size: of the font, in pixels.

    Returns:
        (len(xc), 3, height, width) in [-1, 1].
    """
    font = (
        ImageFont.truetype(str(PUBLISHED_FONT), size=size)
        if PUBLISHED_FONT.is_file()
        else ImageFont.load_default(size=size)
    )
    length = max(1, int(40 * (wh[0] / 256)))
    pictures = []
    for given in xc:
        caption = given if isinstance(given, str) else next(iter(given), "")
        page = Image.new("RGB", (wh[0], wh[1]), color="white")
        lines = "\n".join(caption[start : start + length] for start in range(0, len(caption), length))
        draw = ImageDraw.Draw(page)
        draw.fontmode = "1"  # hard edges: at these sizes anti-aliased letters are grey, not black
        draw.text((0, 0), lines, fill="black", font=font)
        pictures.append(np.asarray(page).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.tensor(np.stack(pictures), dtype=torch.float32)


def condition_pictures(
    model: Any, x: Tensor, c: Any, quant_c: Any, tokens: Tensor, module: Any
) -> dict[str, Tensor]:
    """What `log_images` shows of a condition.

    Args:
        model: the Net2NetTransformer.
        x: images (b, c, h, w).
        c: conditions.
        quant_c, tokens: what `encode_to_c` made of them.
        module: Lightning module whose trainer holds the data set that can draw layouts.

    Returns:
        `conditioning_rec` and `conditioning`, (b, 3, h, w) or (b, 1, h, w); nothing where the condition is the image
        itself or cannot be shown, such as a class label.
    """
    key, stage = model.cond_stage_key, model.cond_stage_model
    if key in LAYOUTS:
        return _layouts(key, c, tokens, x.shape[2:], module)
    if not isinstance(c, Tensor):
        return {"conditioning": log_txt_as_img((x.shape[3], x.shape[2]), c, size=max(10, x.shape[3] // 25))}
    if key == model.first_stage_key or key == "image" or not hasattr(stage, "decode"):
        return {}
    reconstructed = stage.decode(quant_c)
    if key == "segmentation":
        reconstructed, c = (stage.to_rgb(_one_hot(maps)) for maps in (reconstructed, c))
    return {"conditioning_rec": reconstructed, "conditioning": c}


def _one_hot(maps: Tensor) -> Tensor:
    """The likeliest label of each pixel of (b, labels, h, w), as ones and zeros."""
    return F.one_hot(maps.argmax(dim=1), maps.shape[1]).movedim(-1, 1).float()


def _layouts(key: str, c: Tensor, tokens: Tensor, size: Any, module: Any) -> dict[str, Tensor]:
    """Drawn by the validation data set, which knows what its categories are called; nothing without one."""
    datamodule = getattr(
        getattr(module, "_trainer", None) or getattr(module, "trainer", None), "datamodule", None
    )
    dataset = getattr(datamodule, "datasets", {}).get("validation")
    if dataset is None:
        return {}
    builder, label = dataset.conditional_builders[key], dataset.get_textual_label_for_category_no

    def draw(rows: Tensor) -> Tensor:
        return torch.stack([builder.plot(row.cpu().long(), label, tuple(size)) for row in rows])

    return {"conditioning": draw(c), "conditioning_rec": draw(tokens.reshape(len(c), -1))}
