"""Latent models that enlarge a small picture, joined to the latents (Saharia et al. 2021; Ho et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ldm.models.diffusion.conditioned import LatentFinetuneDiffusion, picture, refuse_trainable
from ldm.models.diffusion.latent import LatentDiffusion
from taming.util import freeze, instantiate_from_config


class LatentUpscaleDiffusion(LatentDiffusion):
    """Enlarges a small picture, which is noised at a level that the network is told and joined to the latents.

    Args:
        low_scale_config: of what noises it, see `ldm.modules.diffusionmodules.upscaling`.
        low_scale_key: entry of a batch with the small picture, (b, h, w, c), of the latents' size.
        noise_level_key: must be None: levels are drawn.

    Further arguments are those of `LatentDiffusion`; `conditioning_key` should be "hybrid-adm".
    """

    low_scale_model: Any

    def __init__(
        self,
        *args: Any,
        low_scale_config: Any,
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.low_scale_config = low_scale_config
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key
        super().__init__(*args, **kwargs)

    def build_stages(self) -> None:
        """Build the frozen low-scale model."""
        self.low_scale_model = freeze(instantiate_from_config(self.low_scale_config))

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        log_mode: bool = False,
    ) -> tuple[Any, ...]:
        """Latents and the condition {c_concat, c_crossattn, c_adm}.

        With `log_mode` also images, reconstructions, the text as it came, small pictures, what is left of them after
        noising, and the noise levels (b,).

        Raises:
            AssertionError: the text encoder is to be trained (the published error class).
            NotImplementedError: `noise_level_key` is set.
        """
        refuse_trainable(self)
        if self.noise_level_key is not None:
            raise NotImplementedError(
                f"noise_level_key={self.noise_level_key!r}: levels are drawn, not read from a batch; leave it at null"
            )
        z, c, *rest, xc = super().get_input(
            batch, k, return_first_stage_outputs=log_mode, force_c_encode=True, return_original_cond=True, cond_key=cond_key, bs=bs
        )  # fmt: skip
        small = picture(batch, self.low_scale_key, z)
        noised, level = self.low_scale_model(small)
        cond = {"c_concat": [noised], "c_crossattn": [c], "c_adm": level}
        if not log_mode:
            return z, cond
        return (z, cond, *rest, xc, small, self.low_scale_model.decode(noised), level)

    def input_to_log(self, batch: Mapping[str, Any], n: int) -> tuple[Any, ...]:
        """As in `LatentDiffusion`, with `x_lr` and `x_lr_rec_@noise_levels…`."""
        *given, small, decoded, level = self.get_input(batch, self.first_stage_key, bs=n, log_mode=True)
        levels = "-".join(str(number) for number in level.tolist())
        return (*given, {"x_lr": small, f"x_lr_rec_@noise_levels{levels}": decoded})

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **options: Any
    ) -> dict[str, Tensor]:
        """As `LatentDiffusion`, without inpainting; guidance keeps the small picture and its noise level."""
        return super().log_images(batch, N, *args, **options | {"inpaint": False})


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """A text-to-image model turned into one that enlarges.

    Args:
        concat_keys: entries of a batch, (b, h, w, c), of the latents' size once reshuffled.
        reshuffle_patch_size: p: a picture becomes p² times as many channels, of one p-th of the size.
        low_scale_config: of what noises the entry `low_scale_key`; its level becomes c_adm.
        low_scale_key: see there.
    """

    low_scale_model: Any

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Any = None,
        low_scale_key: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self.reshuffle_patch_size = reshuffle_patch_size
        self.low_scale_config, self.low_scale_key = low_scale_config, low_scale_key
        super().__init__(concat_keys, *args, **kwargs)

    def build_stages(self) -> None:
        """Build the frozen low-scale model, if there is one."""
        config = self.low_scale_config
        self.low_scale_model = None if config is None else freeze(instantiate_from_config(config))

    @torch.no_grad()
    def concat_conditions(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Any]:
        """The pictures, reshuffled and noised as configured, and the noise level."""
        parts, levels = [], {}
        for key in self.concat_keys:
            part = self.concat_part(batch, key, z)
            if self.low_scale_model is not None and key == self.low_scale_key:
                part, levels["c_adm"] = self.low_scale_model(part)
            parts.append(part)
        return {"c_concat": [torch.cat(parts, dim=1)], **levels}

    def concat_part(self, batch: Mapping[str, Any], key: str, z: Tensor) -> Tensor:
        """The picture, with `reshuffle_patch_size` space turned into channels."""
        part, p = picture(batch, key, z), self.reshuffle_patch_size
        if p is None:
            return part
        if part.shape[2] % p or part.shape[3] % p:
            raise ValueError(
                f"{key} is {tuple(part.shape[2:])}: height and width must be multiples of reshuffle_patch_size={p}"
            )
        return rearrange(part, "b c (p1 h) (p2 w) -> b (p1 p2 c) h w", p1=p, p2=p)

    def concat_pictures(self, batch: Mapping[str, Any], z: Tensor) -> dict[str, Tensor]:
        """`lr`: the first of the pictures."""
        return {"lr": picture(batch, self.concat_keys[0], z)}
