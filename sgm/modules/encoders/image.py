"""Pictures and frames of videos as conditions: CLIP's vectors of them, and noised latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from ldm.modules.encoders import image
from sgm.modules.encoders.conditioner import AbstractEmbModel
from sgm.util import autocast, expand_dims_like, instantiate_from_config


class FrozenOpenCLIPImageEmbedder(AbstractEmbModel, image.FrozenOpenCLIPImageEmbedder):
    """A picture as one vector of an open_clip model; see `ldm.modules.encoders.image`.

    Args:
        arch, version, device, max_length, freeze, antialias, ucg_rate: see `ldm.modules.encoders.image`; max_length is the
            length of the sequence that the next two options make.
        unsqueeze_dim: give (b, 1, d).
        repeat_to_max_len: give the vector as a sequence of max_length equal ones, and alone.
        num_image_crops: so many pictures a sample, (b, crops, 3, h, w); their vectors are padded with zeros to a sequence
            of max_length, and the first is given alone, too.
        output_tokens: give the vectors of the patches, too.
        init_device: accepted, as published; the weights lie where the module is put.

    Raises:
        ValueError: num_image_crops with repeat_to_max_len or output_tokens, or more of them than max_length.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",
        version: str | None = "laion2b_s32b_b79k",
        device: str = "cuda",
        max_length: int = 77,
        freeze: bool = True,
        antialias: bool = True,
        ucg_rate: float = 0.0,
        unsqueeze_dim: bool = False,
        repeat_to_max_len: bool = False,
        num_image_crops: int = 0,
        output_tokens: bool = False,
        init_device: str | None = None,
    ) -> None:
        if num_image_crops and (repeat_to_max_len or output_tokens or num_image_crops > max_length):
            raise ValueError(
                f"num_image_crops={num_image_crops} goes up to max_length={max_length}, and neither with "
                "repeat_to_max_len nor with output_tokens"
            )
        super().__init__(arch, version, device, max_length, freeze, antialias=antialias, ucg_rate=ucg_rate)
        self.unsqueeze_dim, self.repeat_to_max_len = unsqueeze_dim, repeat_to_max_len
        self.max_crops, self.output_tokens = num_image_crops, output_tokens
        self.model.visual.output_tokens = output_tokens

    @autocast
    def forward(self, image: Tensor, no_dropout: bool = False) -> Any:
        """Pictures (b, 3, h, w), or crops (b, crops, 3, h, w), in [-1, 1] → (b, d), or as configured:

        (b, 1, d); (b, max_length, d) and (b, d); or patches (b, n, width) and (b, d).
        """
        found = self.encode_with_vision_transformer(image)
        found = tuple(found) if self.output_tokens else (found,)
        z, *tokens = found if no_dropout else map(self.dropped, found)
        if self.max_crops:
            return F.pad(z, (0, 0, 0, self.max_length - self.max_crops)), z[:, 0]
        z = z[:, None] if self.unsqueeze_dim else z
        if tokens:
            return tokens[0], z
        if self.repeat_to_max_len:
            return z.reshape(len(z), 1, -1).expand(-1, self.max_length, -1), z
        return z

    def encode_with_vision_transformer(self, img: Tensor) -> Any:
        """(b, 3, h, w) → (b, d), with the vectors of the patches (b, n, width) if wanted; crops → (b, crops, d).

        Raises:
            ValueError: another number of crops than configured.
        """
        if not self.max_crops:
            return super().encode_with_vision_transformer(img)
        if img.ndim != 5 or img.shape[1] != self.max_crops:
            raise ValueError(f"crops must come as (b, {self.max_crops}, 3, h, w), not {tuple(img.shape)}")
        z = super().encode_with_vision_transformer(img.flatten(0, 1))
        return z.unflatten(0, img.shape[:2])


def _count_clips(frames: Tensor, n_cond_frames: int) -> int:
    if len(frames) % n_cond_frames:
        raise ValueError(f"{len(frames)} frames do not make clips of n_cond_frames={n_cond_frames}")
    return len(frames) // n_cond_frames


class FrozenOpenCLIPImagePredictionEmbedder(AbstractEmbModel):
    """CLIP's vectors of the frames that a video is to continue, as a sequence.

    Args:
        open_clip_embedding_config: of a `FrozenOpenCLIPImageEmbedder`.
        n_cond_frames: frames a clip.
        n_copies: copies of each clip's sequence, such as one for each frame of the video.

    Source: Blattmann et al. 2023 (Stable Video Diffusion), section 4.
    """

    def __init__(
        self, open_clip_embedding_config: Mapping[str, Any], n_cond_frames: int, n_copies: int
    ) -> None:
        super().__init__()
        self.n_cond_frames, self.n_copies = n_cond_frames, n_copies
        self.open_clip = instantiate_from_config(open_clip_embedding_config)

    def forward(self, vid: Tensor) -> Tensor:
        """Frames (b · n_cond_frames, 3, h, w) in [-1, 1] → (b · n_copies, n_cond_frames, d).

        Raises:
            ValueError: frames that do not make whole clips.
        """
        _count_clips(vid, self.n_cond_frames)
        return repeat(self.open_clip(vid), "(b t) d -> (b s) t d", t=self.n_cond_frames, s=self.n_copies)


class VideoPredictionEmbedderWithEncoder(AbstractEmbModel):
    """Latents of the frames that a video is to continue, made from frames with a little noise.

    Args:
        n_cond_frames: frames a clip. One is copied; several are passed on as they are.
        n_copies: copies of the one frame, such as one for each frame of the video.
        encoder_config: of the encoder.
        sigma_sampler_config: draws a noise level for each clip; without it there is no noise.
        sigma_cond_config: embeds the levels, which are then given, too.
        is_ae: the encoder is an autoencoder, whose `encode` is called.
        scale_factor: latents are multiplied by it.
        disable_encoder_autocast: encode in the encoder's own precision on a GPU.
        en_and_decode_n_samples_a_time: frames at a time, to save memory; all if None.

    Raises:
        ValueError: sigma_cond_config without sigma_sampler_config.

    Source: Blattmann et al. 2023 (Stable Video Diffusion), section 4; Ho et al. 2022 (conditioning augmentation).
    """

    def __init__(
        self,
        n_cond_frames: int,
        n_copies: int,
        encoder_config: Mapping[str, Any],
        sigma_sampler_config: Mapping[str, Any] | None = None,
        sigma_cond_config: Mapping[str, Any] | None = None,
        is_ae: bool = False,
        scale_factor: float = 1.0,
        disable_encoder_autocast: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,
    ) -> None:
        super().__init__()
        if sigma_cond_config is not None and sigma_sampler_config is None:
            raise ValueError("sigma_cond_config embeds noise levels: it needs a sigma_sampler_config")
        self.n_cond_frames, self.n_copies = n_cond_frames, n_copies
        self.encoder = instantiate_from_config(encoder_config)
        self.sigma_sampler: Any = None
        if sigma_sampler_config is not None:
            self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.sigma_cond: Any = None
        if sigma_cond_config is not None:
            self.sigma_cond = instantiate_from_config(sigma_cond_config)
        self.is_ae, self.scale_factor = is_ae, scale_factor
        self.disable_encoder_autocast = disable_encoder_autocast
        self.en_and_decode_n_samples_a_time = en_and_decode_n_samples_a_time

    def forward(self, vid: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Frames (b · n_cond_frames, 3, h, w) in [-1, 1] → latents, and if so configured the embedded noise levels.

        Returns:
            (b · copies, c, h', w') and (b · copies, d), where copies is n_copies for one frame, n_cond_frames for several.

        Raises:
            ValueError: frames that do not make whole clips.
        """
        clips, level = _count_clips(vid, self.n_cond_frames), None
        copies = self.n_copies if self.n_cond_frames == 1 else self.n_cond_frames
        if self.sigma_sampler is not None:
            sigmas = self.sigma_sampler(clips).to(vid.device)
            if self.sigma_cond is not None:
                level = self.sigma_cond(sigmas).repeat_interleave(copies, dim=0)
            spread = sigmas.repeat_interleave(self.n_cond_frames)
            vid = vid + torch.randn_like(vid) * expand_dims_like(spread, vid)
        z = self.encode(vid) * self.scale_factor
        z = z.repeat_interleave(copies, dim=0) if self.n_cond_frames == 1 else z
        return z if level is None else (z, level)

    def encode(self, vid: Tensor) -> Tensor:
        """Frames (n, 3, h, w) → latents (n, c, h', w')."""
        encoder = self.encoder.encode if self.is_ae else self.encoder
        encoder = autocast(encoder, enabled=not self.disable_encoder_autocast)
        return torch.cat(
            [encoder(part) for part in vid.split(self.en_and_decode_n_samples_a_time or len(vid))]
        )
