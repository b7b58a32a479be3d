"""Latent models with pictures and vectors beside the text: layouts, masks, depth, image embeddings.

Each is `LatentDiffusion` with another `get_input`, and further pictures in its logs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.wrapper import TEXT_KEYS
from ldm.modules.diffusionmodules.util import drop_rows
from taming.models.base import image_from_batch
from taming.util import freeze, instantiate_from_config

logger = logging.getLogger(__name__)

FIRST_CONVOLUTION = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)
WITHOUT_INPAINTING = {"quantize_denoised": False, "inpaint": False, "plot_progressive_rows": False}


class Layout2ImgDiffusion(LatentDiffusion):
    """Conditioned on boxes of objects, as tokens.

    Args:
        cond_stage_key: "coordinates_bbox".

    Raises:
        AssertionError: another key (the published error class).
    """

    def __init__(self, cond_stage_key: str, *args: Any, **kwargs: Any) -> None:
        if cond_stage_key != "coordinates_bbox":
            raise AssertionError(
                f"Layout2ImgDiffusion is conditioned on 'coordinates_bbox', not on cond_stage_key={cond_stage_key!r}"
            )
        super().__init__(*args, **{**kwargs, "cond_stage_key": cond_stage_key})

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As `LatentDiffusion`, and `bbox_image`: the boxes, drawn by the data set being trained on, where there is one."""
        log = super().log_images(batch, N, *args, **kwargs)
        split = "train" if self.training else "validation"
        dataset = getattr(getattr(self._trainer, "datamodule", None), "datasets", {}).get(split)
        if dataset is not None:
            draw = dataset.conditional_builders[self.cond_stage_key].plot
            label = dataset.get_textual_label_for_category_no
            boxes = batch[self.cond_stage_key][:N]
            log["bbox_image"] = torch.stack([draw(row.cpu().long(), label, (256, 256)) for row in boxes])
        return log


# ---------------------------------------------------------------------------------- pictures joined to the latents


class LatentFinetuneDiffusion(LatentDiffusion):
    """A model that goes on from another one's weights, with further pictures joined to its latents.

    The first convolution of the checkpoint gets further input channels of zeros, so that the new model begins as the
    old one. Entries `concat_keys` of a batch, (b, h, w, c), are resized to the latents' size, without smoothing.

    Args:
        concat_keys: entries to join, in the order of their channels.
        finetune_keys: names of the weights to widen; None loads a checkpoint as it is.
        keep_finetune_dims: so many input channels of them are the checkpoint's.
        c_concat_log_start, c_concat_log_end: channels of the joined pictures that are latents to be shown decoded.

    Further arguments are those of `LatentDiffusion`; `conditioning_key` should be "hybrid".

    Raises:
        AssertionError: weights to widen without a `ckpt_path` (the published error class).
        ValueError: weights that cannot be widened so.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if finetune_keys is not None and kwargs.get("ckpt_path") is None:
            raise AssertionError(
                "finetune_keys widen a checkpoint's weights: name it as ckpt_path, or set finetune_keys to null"
            )
        self.finetune_keys = finetune_keys
        self.keep_dims = keep_finetune_dims
        self.concat_keys = concat_keys
        self.c_concat_log_start, self.c_concat_log_end = c_concat_log_start, c_concat_log_end
        super().__init__(*args, **kwargs)

    def fit_weights(self, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights, those of `finetune_keys` cut to `keep_dims` input channels and filled up with zeros."""
        weights = super().fit_weights(weights, own)
        for name in self.finetune_keys or ():
            if name not in weights or name not in own:
                continue
            old, new = weights[name], torch.zeros_like(own[name], device="cpu")
            if (
                old.shape[0] != new.shape[0]
                or old.shape[2:] != new.shape[2:]
                or old.shape[1] < self.keep_dims
            ):
                raise ValueError(
                    f"{name} is {tuple(old.shape)} in the checkpoint and {tuple(new.shape)} here: its first "
                    f"{self.keep_dims} input channels (keep_finetune_dims) cannot be taken over"
                )
            if old.shape[1] > self.keep_dims:
                logger.warning(
                    "%s: input channels from %d on of the checkpoint are replaced by zeros; finetune_keys: null keeps them",
                    name, self.keep_dims,
                )  # fmt: skip
            new[:, : self.keep_dims] = old[:, : self.keep_dims]
            weights = {**weights, name: new}
        return weights

    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        return_first_stage_outputs: bool = False,
    ) -> tuple[Any, ...]:
        """Latents and the condition {c_concat, c_crossattn}; on request images, reconstructions and the text as it came.

        Raises:
            AssertionError: the text encoder is to be trained (the published error class).
        """
        refuse_trainable(self)
        z, c, *rest, xc = super().get_input(
            batch, k, return_first_stage_outputs=return_first_stage_outputs, force_c_encode=True, return_original_cond=True,
            cond_key=cond_key, bs=bs,
        )  # fmt: skip
        cond = {**self.concat_conditions(batch, z), "c_crossattn": [c]}
        return (z, cond, *rest, xc) if return_first_stage_outputs else (z, cond)

    @torch.no_grad()
    def concat_conditions(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Any]:
        """What is joined to latents z, as {c_concat: [one tensor]}, with c_adm where there is one."""
        return {"c_concat": [torch.cat([self.concat_part(batch, key, z) for key in self.concat_keys], dim=1)]}

    def concat_part(self, batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
        """Entry `key` of a batch, as latents z can be joined to it."""
        return F.interpolate(picture(batch, key, z), size=z.shape[-2:])

    def input_to_log(self, batch: Mapping[str, Any], n: int) -> tuple[Any, ...]:
        """As in `LatentDiffusion`; with the joined latents decoded if their channels are given."""
        z, c, x, xrec, xc = self.get_input(batch, self.first_stage_key, bs=n, return_first_stage_outputs=True)
        extra = self.concat_pictures(batch, z)
        if self.c_concat_log_start is not None or self.c_concat_log_end is not None:
            joined = c["c_concat"][0][:, self.c_concat_log_start : self.c_concat_log_end]
            extra = {"c_concat_decoded": self.decode_first_stage(joined), **extra}
        return z, c, x, xrec, xc, extra

    def concat_pictures(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Tensor]:
        """The joined pictures to look at, by name."""
        return {}

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, sample: bool = True, ddim_steps: int | None = 200, ddim_eta: float = 1.0,
        **options: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """As `LatentDiffusion`, without inpainting and progressive rows; guidance keeps the joined pictures."""
        return super().log_images(
            batch, N, n_row, sample, ddim_steps, ddim_eta, **options | WITHOUT_INPAINTING
        )


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Fills what a mask hides: mask and masked picture are joined to the latents.

    Args:
        concat_keys: entries of a batch, in the order of their channels; all (b, h, w, c).
        masked_image_key: the one that is a picture in [-1, 1], and is encoded; the others are resized.

    Raises:
        AssertionError: the former does not hold the latter (the published error class).
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if masked_image_key not in concat_keys:
            raise AssertionError(
                f"masked_image_key={masked_image_key!r} must be one of concat_keys={list(concat_keys)}"
            )
        self.masked_image_key = masked_image_key
        super().__init__(concat_keys, *args, **kwargs)

    def concat_part(self, batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
        """The masked picture as latents, drawn anew each time; a mask in the latents' size."""
        if key != self.masked_image_key:
            return super().concat_part(batch, key, z)
        return self.get_first_stage_encoding(self.encode_first_stage(picture(batch, key, z)))

    def concat_pictures(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Tensor]:
        """`masked_image`, of the whole batch, as published."""
        return {"masked_image": image_from_batch(batch, self.masked_image_key).to(z.device)}


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Keeps a picture's depth, which another network estimates.

    Args:
        depth_stage_config: of that network: its input (b, 3, h, w) → (b, 1, h', w').
        concat_keys: the one entry of a batch with its input, (b, c, h, w) already.

    Raises:
        AssertionError: more entries (the published error class).
    """

    def __init__(
        self, depth_stage_config: Any, concat_keys: Sequence[str] = ("midas_in",), *args: Any, **kwargs: Any
    ) -> None:
        if len(concat_keys) != 1:
            raise AssertionError(
                f"depth is estimated from one entry of a batch, not from concat_keys={list(concat_keys)}"
            )
        self.depth_stage_config = depth_stage_config
        self.depth_stage_key = concat_keys[0]
        super().__init__(concat_keys, *args, **kwargs)

    def build_stages(self) -> None:
        """Build the frozen estimator."""
        self.depth_model = freeze(instantiate_from_config(self.depth_stage_config))

    def concat_part(self, batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
        """The estimate's `condition_of`."""
        return self.condition_of(self._depth(batch, key, z), z)

    def condition_of(self, depth: Tensor, z: Tensor) -> Tensor:
        """Depth (b, 1, h, w) in the size of latents z, each picture's own run from near to far stretched to [-1, 1]."""
        depth = F.interpolate(depth, size=z.shape[2:], mode="bicubic", align_corners=False)
        return stretch(depth, slack=0.001)

    def _depth(self, batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
        return self.depth_model(batch[key][: len(z)].to(z.device))

    def concat_pictures(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Tensor]:
        """`depth` in the estimator's size, (b, 1, h, w) in [-1, 1]."""
        return {"depth": stretch(self._depth(batch, self.depth_stage_key, z))}


# -------------------------------------------------------------------------------------------------- image embeddings


class ImageEmbeddingConditionedLatentDiffusion(LatentDiffusion):
    """Conditioned on a text and on the embedding of a picture: variations of it, or unCLIP (Ramesh et al. 2022).

    Args:
        embedder_config: of what embeds pictures (b, c, h, w) as vectors (b, d).
        embedding_key: entry of a batch with the picture, (b, h, w, c).
        embedding_dropout: in training, share of embeddings replaced by zeros.
        freeze_embedder: False trains the embedder along.
        noise_aug_config: of what noises an embedding, and says how much as a second vector; None leaves it as it is.

    Further arguments are those of `LatentDiffusion`; `conditioning_key` should be "crossattn-adm".
    """

    noise_augmentor: Any

    def __init__(
        self,
        embedder_config: Any,
        embedding_key: str = "jpg",
        embedding_dropout: float = 0.5,
        freeze_embedder: bool = True,
        noise_aug_config: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.embedder_config, self.noise_aug_config = embedder_config, noise_aug_config
        self.embed_key, self.embedding_dropout = embedding_key, embedding_dropout
        self.freeze_embedder = freeze_embedder
        super().__init__(*args, **kwargs)

    def build_stages(self) -> None:
        """Build the embedder, frozen unless it is to be trained, and what noises embeddings."""
        embedder = instantiate_from_config(self.embedder_config)
        self.embedder = freeze(embedder) if self.freeze_embedder else embedder
        config = self.noise_aug_config
        self.noise_augmentor = None if config is None else freeze(instantiate_from_config(config))

    def embed(self, images: Tensor) -> Tensor:
        """The vectors of pictures (b, c, h, w), noised as configured, and dropped while training."""
        vector = self.embedder(images)
        if self.noise_augmentor is not None:
            vector = torch.cat(self.noise_augmentor(vector), dim=1)
        return drop_rows(vector, self.embedding_dropout) if self.training else vector

    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """As `LatentDiffusion.get_input`, with the condition {c_crossattn, c_adm}."""
        z, c, *rest = super().get_input(batch, k, cond_key=cond_key, bs=bs, **kwargs)
        return [z, {"c_crossattn": [c], "c_adm": self.embed(picture(batch, self.embed_key, z))}, *rest]

    def trained_parameters(self) -> list[nn.Parameter]:
        """As in `LatentDiffusion`, and the embedder's unless it is frozen."""
        return super().trained_parameters() + [p for p in self.embedder.parameters() if p.requires_grad]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, n_row: int = 4, sample: bool = True, ddim_steps: int | None = 50, ddim_eta: float = 0.0,
        unconditional_guidance_scale: float = 5.0, unconditional_guidance_label: Any = None, **options: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        """As `LatentDiffusion`, without inpainting and progressive rows; guidance keeps the embedding.

        Raises:
            AssertionError: the condition is no text (the published error class).
        """
        if self.cond_stage_key not in TEXT_KEYS:
            raise AssertionError(
                f"pictures are logged for texts, cond_stage_key 'caption' or 'txt', not {self.cond_stage_key!r}"
            )
        label = [""] if unconditional_guidance_label is None else unconditional_guidance_label
        log = super().log_images(
            batch, N, n_row, sample, ddim_steps, ddim_eta, unconditional_guidance_scale=unconditional_guidance_scale,
            unconditional_guidance_label=label, **options | WITHOUT_INPAINTING,
        )  # fmt: skip
        return {name.replace("samples_cfg", "samplescfg"): pictures for name, pictures in log.items()}


# ----------------------------------------------------------------------------------------------------------- helpers


def picture(batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
    """Entry `key` of a batch, (b, h, w, c) or (b, h, w) → (b, c, h, w), as many as latents z and where they are."""
    return image_from_batch(batch, key)[: len(z)].to(z.device)


def stretch(maps: Tensor, slack: float = 1e-12) -> Tensor:
    """Each map of (b, c, h, w) stretched to [-1, 1]; `slack` keeps a constant one from a division by zero."""
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    return 2.0 * (maps - low) / (high - low + slack) - 1.0


def refuse_trainable(model: LatentDiffusion) -> None:
    """Raise an AssertionError if the condition's encoder is to be trained."""
    if model.cond_stage_trainable:
        raise AssertionError(
            f"{type(model).__name__} needs a fixed condition encoder; set cond_stage_trainable to false"
        )
