"""Segmentation maps of the S-FLCKR examples by DeepLab v2, trained on COCO-Stuff (182 classes).

    python scripts/extract_segmentation.py data/sflckr_segmentations

DEST/<relative path>.png holds a label a pixel. Maps that exist are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.inference import InferenceError, choose_device, save_png
from taming.checkpoint import load_into, load_state_dict

HUB = ("kazuto1011/deeplab-pytorch", "deeplabv2_resnet101")
MEAN_BGR = (104.008, 116.669, 122.675)
CLASSES = 182


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dest", metavar="DEST", help="folder for the maps")
    parser.add_argument("--ckpt", help="weights (deeplabv2_resnet101_msc-cocostuff164k-100000.pth); default: downloaded")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_deeplab(ckpt: str | None, device: torch.device) -> torch.nn.Module:
    """The network: (b, 3, h, w) BGR without its mean → logits (b, 182, h', w').

    Raises:
        InferenceError: the network can be neither found nor downloaded.
        CheckpointError: `ckpt` is unreadable or of another network.
    """
    repository, name = HUB
    try:
        pretrained = None if ckpt else "cocostuff164k"
        model = torch.hub.load(repository, name, pretrained=pretrained, n_classes=CLASSES, trust_repo=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InferenceError(
            f"torch.hub's {repository} could not be loaded ({error}). Fetch it on a machine with a connection and copy "
            f"{torch.hub.get_dir()} here; weights can be named with --ckpt."
        ) from error
    if ckpt:
        load_into(model, load_state_dict(ckpt), source=ckpt)
    return model.to(device).eval()


def to_network(image: np.ndarray) -> Tensor:
    """(h, w, 3) RGB in [-1, 1] → (1, 3, h, w) BGR in [0, 255], without the mean."""
    bgr = torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)[None].float()
    return (bgr + 1.0) * 127.5 - torch.tensor(MEAN_BGR).reshape(1, 3, 1, 1)


def labels_of(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Logits (1, n, h', w') → labels at the image's size, (h, w) uint8."""
    logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
    return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()


@torch.no_grad()
def extract(
    dataset: Any, network: Callable[[Tensor], Tensor], folder: Path, device: torch.device
) -> tuple[int, int]:
    """Write the maps of a data set (items with `image` and `relative_file_path_`); returns how many were made, and were there."""
    made = there = 0
    for i in tqdm(range(len(dataset)), desc=str(folder), unit="image"):
        item = dataset[i]
        target = (folder / item["relative_file_path_"]).with_suffix(".png")
        if target.is_file():
            there += 1
            continue
        image = item["image"]
        save_png(Image.fromarray(labels_of(network(to_network(image).to(device)), image.shape[:2])), target)
        made += 1
    return made, there


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        from taming.data.sflckr import Examples

        device = choose_device(opt.device)
        made, there = extract(Examples(), load_deeplab(opt.ckpt, device), Path(opt.dest), device)
        print(f"{opt.dest}: {made} maps made, {there} were there")
    except (InferenceError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
