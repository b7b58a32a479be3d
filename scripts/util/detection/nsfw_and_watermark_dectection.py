"""Blurs images that two small classifiers over CLIP's vectors take for unsafe, or for marked by a stock-photo watermark.

The classifiers' weights, p_head_v1.npz and w_head_v1.npz of the original repository, belong beside this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor

RESOURCES_ROOT = Path(__file__).resolve().parent
HEADS = ("p_head_v1.npz", "w_head_v1.npz")
THRESHOLD = 0.5
BLUR = {"kernel_size": [99, 99], "sigma": [100.0, 100.0]}
CLIP = ("ViT-L-14-quickgelu", "openai")
SIDE = 224
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def load_model_weights(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of a classifier.

    Raises:
        FileNotFoundError: says where the file belongs.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no {path}; get it from the original repository (scripts/util/detection)"
        )
    with np.load(path) as file:
        return file["weights"], file["biases"]


def predict_proba(X: np.ndarray, weights: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Probabilities of a logistic regression: vectors (b, d), weights (1, d) and biases (1,) → (b, 1)."""
    logits = np.asarray(X, np.float64) @ np.asarray(weights, np.float64).T + biases
    return np.exp(-np.logaddexp(0.0, -logits))


def clip_process_images(images: Tensor) -> Tensor:
    """Images (b, 3, h, w) in [0, 1] as CLIP reads them."""
    small = TF.resize(images, [SIDE], TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.normalize(TF.center_crop(small, [SIDE, SIDE]), MEAN, STD)


class DeepFloydDataFiltering:
    """The filter.

    Args:
        verbose: say how many images are blurred.
        device: where to compute.
        clip: a module with `encode_image`; OpenAI's ViT-L/14 if None.

    Raises:
        FileNotFoundError: the classifiers' weights are missing.
    """

    def __init__(self, verbose: bool = False, device: Any = "cpu", clip: Any = None) -> None:
        self.verbose, self.device = verbose, device
        self.heads = [load_model_weights(RESOURCES_ROOT / name) for name in HEADS]
        if clip is None:
            import open_clip

            clip = open_clip.create_model(CLIP[0], pretrained=CLIP[1])
        self.clip = clip.eval().to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (b, 3, h, w) in [0, 1] → the same, some blurred."""
        vectors = self.clip.encode_image(clip_process_images(images.float()).to(self.device))
        features = vectors.float().cpu().numpy()
        scores = np.concatenate([predict_proba(features, *head) for head in self.heads], axis=1)
        suspect = torch.from_numpy((scores > THRESHOLD).any(axis=1)).to(images.device)
        if self.verbose:
            print(f"{int(suspect.sum())} of {len(images)} images are blurred")
        blurred = TF.gaussian_blur(images, **BLUR)
        return torch.where(suspect[:, None, None, None], blurred, images)
