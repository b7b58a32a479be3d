"""Patch-wise processing: networks run on overlapping crops, whose results are blended with weights that fall off to the border."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# conditions of these keys are pictures of the latents' size and are cropped along
PICTURE_KEYS = ("image", "LR_image", "segmentation", "bbox_img")


class Patchwise:
    """The patch-wise half of `LatentDiffusion`, on as long as the model has the attribute `split_input_params`:

        ks, stride: size and distance of crops, (height, width) in pixels for encoding and in latents otherwise.
        vqf: how many times smaller latents are than images.
        patch_distributed_vq: run the first stage on crops, too, and not only the network.
        clip_min_weight, clip_max_weight: bounds of the weights within a crop.
        tie_braker, clip_min_tie_weight, clip_max_tie_weight: also weight whole crops by their distance to the border.
        original_image_size: of the picture; encoding notes it here.

    ```python
    model.split_input_params = {
        "ks": (128, 128), "stride": (64, 64), "vqf": 4, "patch_distributed_vq": True, "tie_braker": False,
        "clip_min_weight": 0.01, "clip_max_weight": 0.5,
    }
    ```
    """

    cond_stage_key: str
    first_stage_model: Any
    model: Any
    bbox_tokenizer: Any
    get_learned_conditioning: Callable[[Any], Any]

    @property
    def patch_settings(self) -> Any:
        """`split_input_params`, or None: the attribute need not exist."""
        return getattr(self, "split_input_params", None)

    def meshgrid(self, h: int, w: int) -> Tensor:
        """Coordinates (y, x) of each pixel, (h, w, 2)."""
        return torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1)

    def delta_border(self, h: int, w: int) -> Tensor:
        """Distance of each pixel to the nearest border, as a share of the size: 0 at the border, at most 0.5; (h, w).

        An axis of one pixel has no border, and counts as its own middle.
        """
        place = self.meshgrid(h, w) / torch.tensor([max(h - 1, 1), max(w - 1, 1)])
        place[..., torch.tensor([h, w]) == 1] = 0.5
        return torch.minimum(place, 1 - place).amin(dim=-1)

    def get_weighting(self, h: int, w: int, Ly: int, Lx: int, device: Any) -> Tensor:
        """Weight of each pixel (h × w) of each crop (Ly × Lx), (1, h·w, Ly·Lx)."""
        s = self.patch_settings
        within = self.delta_border(h, w).clamp(s["clip_min_weight"], s["clip_max_weight"])
        weights = within.reshape(1, h * w, 1).repeat(1, 1, Ly * Lx)
        if s["tie_braker"]:
            among = self.delta_border(Ly, Lx).clamp(s["clip_min_tie_weight"], s["clip_max_tie_weight"])
            weights = weights * among.reshape(1, 1, Ly * Lx)
        return weights.to(device)

    def get_fold_unfold(
        self, x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], uf: int = 1, df: int = 1
    ) -> tuple[nn.Fold, nn.Unfold, Tensor, Tensor]:
        """What takes an image apart and puts the results together.

        Args:
            x: images (b, c, h, w).
            kernel_size, stride: size and distance of crops.
            uf, df: how many times larger, or smaller, the results are than the crops.

        Returns:
            Fold (of the results' size) and unfold, the sum of the weights at each of their pixels (1, 1, H, W), and the
            weights of each crop (1, 1, height, width, crops).

        Raises:
            NotImplementedError: both larger and smaller.
        """
        if uf > 1 and df > 1:
            raise NotImplementedError(
                f"uf={uf} and df={df}: results can be larger or smaller than the crops, not both"
            )
        height, width = x.shape[2:]
        rows = (height - kernel_size[0]) // stride[0] + 1
        columns = (width - kernel_size[1]) // stride[1] + 1
        size, kernel, step = (
            tuple(int(n) * uf // df for n in pair) for pair in ((height, width), kernel_size, stride)
        )
        unfold = nn.Unfold(kernel_size=tuple(kernel_size), stride=tuple(stride))
        fold = nn.Fold(output_size=size, kernel_size=kernel, stride=step)
        weights = self.get_weighting(kernel[0], kernel[1], rows, columns, x.device).to(x.dtype)
        total = fold(weights).reshape(1, 1, *size)
        return fold, unfold, total, weights.reshape(1, 1, *kernel, rows * columns)

    # ------------------------------------------------------------------------------------------ crop by crop

    def _sizes(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and distance of crops of x, no larger than x.

        Raises:
            ValueError: they leave a part of the image uncovered.
        """
        s, shape = self.patch_settings, x.shape[2:]
        kernel = tuple(min(k, n) for k, n in zip(s["ks"], shape, strict=True))
        stride = tuple(min(k, n) for k, n in zip(s["stride"], shape, strict=True))
        for size, k, step in zip(shape, kernel, stride, strict=True):
            if (size - k) % step or step > k:
                below = k + (size - k) // step * step
                raise ValueError(
                    f"crops of {k} at a distance of {step} do not cover {size} pixels: the distance must not exceed the "
                    f"crop, and sizes are {k} plus a multiple of {step} ({below} or {below + step} here). Change the image, "
                    "or split_input_params['ks'] and ['stride']."
                )
        return kernel, stride

    def blend(self, x: Tensor, work: Callable[[Tensor, int], Tensor], uf: int = 1, df: int = 1) -> Tensor:
        """`work(crop, its number)` on each crop of x, one at a time, blended; `uf`, `df` as in `get_fold_unfold`."""
        kernel, stride = self._sizes(x)
        fold, unfold, total, weights = self.get_fold_unfold(x, kernel, stride, uf, df)
        crops = unfold(x).unflatten(1, (x.shape[1], *kernel))  # (b, c, height, width, crops)
        done = torch.stack([work(crops[..., i], i) for i in range(crops.shape[-1])], dim=-1) * weights
        return fold(done.flatten(1, 3)) / total

    def apply_patchwise(self, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        """The network's prediction, crop by crop, with conditions cut to the crops where they are pictures or positions."""
        part = self._condition_of_crops(x, cond)

        def predict(crop: Tensor, i: int) -> Tensor:
            out = self.model(crop, t, **part(i))
            return out[0] if isinstance(out, tuple) else out

        return self.blend(x, predict)

    def _condition_of_crops(self, x: Tensor, cond: Mapping[str, Any]) -> Callable[[int], Mapping[str, Any]]:
        """A function from the number of a crop to its condition."""
        if self.cond_stage_key in PICTURE_KEYS and self.model.conditioning_key:
            return self._cropped(x, cond)
        if self.cond_stage_key == "coordinates_bbox":
            boxes = self._boxes_of_crops(x)
            tokens = cond["c_crossattn"][0]

            def positioned(i: int) -> Mapping[str, Any]:
                own = torch.tensor(self.bbox_tokenizer._crop_encoder(boxes[i]), device=tokens.device)
                row = torch.cat([tokens[..., :-2], own.expand(len(tokens), -1)], dim=-1)
                return {"c_crossattn": [self.get_learned_conditioning(row)]}

            return positioned
        return lambda i: cond

    def _cropped(self, x: Tensor, cond: Mapping[str, Any]) -> Callable[[int], Mapping[str, Any]]:
        """Pictures among the condition cut as x is; what is no picture stays whole."""
        kernel, stride = self._sizes(x)
        unfold = nn.Unfold(kernel_size=kernel, stride=stride)

        def cut(c: Any) -> Any:
            if not isinstance(c, Tensor) or c.ndim != 4:
                return None
            if c.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"a condition of {tuple(c.shape[2:])} pixels cannot be cropped along with latents of {tuple(x.shape[2:])}"
                )
            return unfold(c).unflatten(1, (c.shape[1], *kernel))

        crops = {k: [cut(c) for c in v] for k, v in cond.items() if isinstance(v, list)}

        def part(i: int) -> Mapping[str, Any]:
            return {
                k: [whole if c is None else c[..., i] for whole, c in zip(v, crops[k], strict=True)]
                if k in crops
                else v
                for k, v in cond.items()
            }

        return part

    def _boxes_of_crops(self, x: Tensor) -> list[tuple[float, ...]]:
        """Left, top, width and height of each crop, as shares of the whole picture.

        Raises:
            ValueError: the picture's size is not known.
        """
        if "original_image_size" not in self.patch_settings:
            raise ValueError(
                "positions of crops need split_input_params['original_image_size'] = (height, width)"
            )
        height, width = self.patch_settings["original_image_size"]
        (kh, kw), (sy, sx) = self._sizes(x)
        scale = 2 ** (self.first_stage_model.encoder.num_resolutions - 1)
        rows, columns = (x.shape[2] - kh) // sy + 1, (x.shape[3] - kw) // sx + 1
        return [
            (scale * sx * column / width, scale * sy * row / height, scale * kw / width, scale * kh / height)
            for row in range(rows)
            for column in range(columns)
        ]
