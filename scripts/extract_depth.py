"""Depth maps of ImageNet by MiDaS, for the depth-conditional transformer.

    python scripts/extract_depth.py                 # both splits → data/imagenet_depth/{val,train}/<synset>/<name>.png

A map is stored without loss: the four bytes of each float32 are the channels of an RGBA picture. Maps that exist are kept,
so an interrupted run goes on where it stopped.
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

SPLITS = ("val", "train")


def get_parser() -> argparse.ArgumentParser:
    """The flags (the published script had none)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="default: both")
    parser.add_argument("--outdir", default="data/imagenet_depth", help="folder for the maps")
    parser.add_argument("--model", default="MiDaS", help="a model of torch.hub's intel-isl/MiDaS (the published one is MiDaS), or one of transformers with a slash: Intel/dpt-large")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser


def load_midas(name: str, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an image (h, w, 3) in [0, 255] to its inverse depth (h, w) float32.

    Raises:
        InferenceError: the model can be neither found nor downloaded.
    """
    try:
        if "/" in name:
            return _from_transformers(name, device)
        model = torch.hub.load("intel-isl/MiDaS", name, trust_repo=True).to(device).eval()
        transforms = torch.hub.load("intel-isl/MiDaS", "transforms", trust_repo=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InferenceError(
            f"--model {name} could not be loaded ({error}). Fetch it on a machine with a connection and copy its cache "
            "(torch.hub.get_dir(), or the Hugging Face cache), or pass another --model."
        ) from error
    transform = {
        "DPT_Large": transforms.dpt_transform,
        "DPT_Hybrid": transforms.dpt_transform,
        "MiDaS_small": transforms.small_transform,
    }.get(name, transforms.default_transform)

    def predict(image: np.ndarray) -> np.ndarray:
        return resize_to(model(transform(image.astype(np.uint8)).to(device)), image.shape[:2])

    return predict


def _from_transformers(name: str, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor: Any = AutoImageProcessor.from_pretrained(name)
    model: Any = AutoModelForDepthEstimation.from_pretrained(name, use_safetensors=True)
    model = model.to(device).eval()

    def predict(image: np.ndarray) -> np.ndarray:
        inputs = processor(images=Image.fromarray(image.astype(np.uint8)), return_tensors="pt").to(device)
        return resize_to(model(**inputs).predicted_depth, image.shape[:2])

    return predict


def resize_to(depth: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A network's map (1, h', w') at the image's size, (h, w) float32."""
    depth = F.interpolate(depth[:, None].float(), size=size, mode="bicubic", align_corners=False)
    return depth[0, 0].cpu().numpy()


def depth_to_rgba(depth: np.ndarray) -> Image.Image:
    """(h, w) float32 → RGBA whose channels are its bytes; `taming.data.imagenet.rgba_to_depth` reads it back."""
    depth = np.ascontiguousarray(depth, dtype=np.float32)
    return Image.fromarray(depth.view(np.uint8).reshape(*depth.shape, 4))


@torch.no_grad()
def extract(dataset: Any, predict: Callable[[np.ndarray], np.ndarray], folder: Path) -> tuple[int, int]:
    """Write the maps of a data set below `folder`.

    Args:
        dataset: items with `image` (h, w, 3) in [-1, 1] and `relpath`.
        predict: see `load_midas`.
        folder: of the split.

    Returns:
        How many were made, and how many were there.
    """
    made = there = 0
    for i in tqdm(range(len(dataset)), desc=str(folder), unit="image"):
        relpath = getattr(dataset, "relpaths", None)
        if relpath is not None and (folder / relpath[i]).with_suffix(".png").is_file():
            there += 1  # known without opening the image
            continue
        item = dataset[i]
        target = (folder / item["relpath"]).with_suffix(".png")
        if target.is_file():
            there += 1
            continue
        save_png(depth_to_rgba(predict((item["image"] + 1.0) * 127.5)), target)
        made += 1
    return made, there


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    opt = get_parser().parse_args(argv)
    try:
        from taming.data.imagenet import ImageNetTrain, ImageNetValidation

        datasets = {"train": ImageNetTrain, "val": ImageNetValidation}
        options = {"ImageNetTrain": {"random_crop": False}}  # the maps are of whole images
        predict = load_midas(opt.model, choose_device(opt.device))
        for split in opt.splits:
            made, there = extract(datasets[split](config=options), predict, Path(opt.outdir) / split)
            print(f"{Path(opt.outdir) / split}: {made} maps made, {there} were there")
    except (InferenceError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
