"""A decoder of video: the image decoder whose blocks also look at the frames before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import conv_nd, timestep_embedding
from sgm.modules.diffusionmodules.model import AttnBlock, Decoder, ResnetBlock, make_attn
from sgm.modules.diffusionmodules.openaimodel import ResBlock
from sgm.modules.video_attention import VideoTransformerBlock, frames_of
from taming.util import nearest

__all__ = [
    "AE3DConv", "MemoryEfficientVideoBlock", "VideoBlock", "VideoDecoder", "VideoResBlock", "make_time_attn",
]  # fmt: skip

Kernel = int | Sequence[int]


class _Blended(nn.Module):
    """A block with a share α of its own: `mix_factor` is α itself ("fixed") or its logit ("learned")."""

    def add_mixing(self, alpha: float, merge_strategy: str) -> None:
        """Make `mix_factor`, from α or its first logit."""
        factor = torch.tensor([float(alpha)])
        if merge_strategy == "fixed":
            self.register_buffer("mix_factor", factor)
        elif merge_strategy == "learned":
            self.mix_factor = nn.Parameter(factor)
        else:
            raise ValueError(f"merge_strategy={merge_strategy!r} is unknown; choose 'fixed' or 'learned'")
        self.merge_strategy = merge_strategy

    def get_alpha(self) -> Tensor:
        """α, (1,)."""
        return self.mix_factor if self.merge_strategy == "fixed" else torch.sigmoid(self.mix_factor)


class VideoResBlock(ResnetBlock, _Blended):
    """A residual block over the pixels, and one over the frames of what it made: α · temporal + (1 - α) · spatial.

    It is the other way round than in the UNet (`AlphaBlender`).

    Args:
        in_channels, out_channels, conv_shortcut, dropout, temb_channels: of the block over pixels, see `ResnetBlock`.
        video_kernel_size: width of the convolutions over (t, h, w); None for (3, 1, 1).
        alpha: α itself ("fixed") or its logit to begin with ("learned").
        merge_strategy: "fixed" or "learned".

    Source: Blattmann et al. 2023 (Align your Latents), section 3.1.1.
    """

    def __init__(
        self,
        out_channels: int,
        *,
        in_channels: int,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 512,
        video_kernel_size: Kernel | None = 3,
        alpha: float = 0.0,
        merge_strategy: str = "learned",
    ) -> None:
        super().__init__(
            in_channels=in_channels, out_channels=out_channels, conv_shortcut=conv_shortcut, dropout=dropout, temb_channels=temb_channels
        )  # fmt: skip
        kernel = [3, 1, 1] if video_kernel_size is None else video_kernel_size
        self.time_stack = ResBlock(
            out_channels, emb_channels=1, dropout=dropout, dims=3, kernel_size=kernel, skip_t_emb=True
        )
        self.add_mixing(alpha, merge_strategy)

    def forward(
        self, x: Tensor, temb: Tensor | None, skip_video: bool = False, timesteps: int | None = None
    ) -> Tensor:
        """(b·t, in, h, w), the frames of a clip one after another → (b·t, out, h, w).

        Args:
            x: see above.
            temb: (b·t, temb_channels) or None.
            skip_video: only the pixels.
            timesteps: t, the number of frames.

        Raises:
            ValueError: no number of frames, or one that does not divide the batch.
        """
        x = super().forward(x, temb)
        if skip_video:
            return x
        clips = rearrange(x, "(b t) c h w -> b c t h w", t=frames_of(x, timesteps))
        alpha = self.get_alpha().to(x.dtype)
        blend = alpha * self.time_stack(clips, temb) + (1 - alpha) * clips
        return rearrange(blend, "b c t h w -> (b t) c h w")


class AE3DConv(nn.Conv2d):
    """A convolution over the pixels, and one over the frames of what it made.

    Args:
        in_channels, out_channels: channels.
        video_kernel_size: width of the second over (t, h, w).
        options: of the first, see `Conv2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, video_kernel_size: Kernel = 3, *args: Any, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, *args, **options)
        kernel = (video_kernel_size,) * 3 if isinstance(video_kernel_size, int) else tuple(video_kernel_size)
        self.time_mix_conv = conv_nd(
            3, out_channels, out_channels, kernel, padding=tuple(k // 2 for k in kernel)
        )

    def forward(self, input: Tensor, timesteps: int | None = None, skip_video: bool = False) -> Tensor:
        """(b·t, in, h, w) → (b·t, out, h, w); t = timesteps."""
        x = super().forward(input)
        if skip_video:
            return x
        clips = rearrange(x, "(b t) c h w -> b c t h w", t=frames_of(x, timesteps))
        return rearrange(self.time_mix_conv(clips), "b c t h w -> (b t) c h w")


class VideoBlock(AttnBlock, _Blended):
    """Attention over the pixels, and over the frames of what it found: α · spatial + (1 - α) · temporal.

    Args:
        in_channels: channels in and out.
        alpha: α itself ("fixed") or its logit to begin with ("learned").
        merge_strategy: "fixed" or "learned".

    Source: Blattmann et al. 2023 (Align your Latents), section 3.1.
    """

    def __init__(self, in_channels: int, alpha: float = 0.0, merge_strategy: str = "learned") -> None:
        super().__init__(in_channels)
        self.time_mix_block = VideoTransformerBlock(
            dim=in_channels, n_heads=1, d_head=in_channels, checkpoint=False, ff_in=True
        )
        self.video_time_embed = nn.Sequential(
            nn.Linear(in_channels, 4 * in_channels), nn.SiLU(), nn.Linear(4 * in_channels, in_channels)
        )
        self.add_mixing(alpha, merge_strategy)

    def forward(self, x: Tensor, timesteps: int | None = None, skip_video: bool = False) -> Tensor:
        """(b·t, c, h, w) → the same; t = timesteps.

        Raises:
            ValueError: no number of frames, or one that does not divide the batch.
        """
        if skip_video:
            return super().forward(x)
        frames, height = frames_of(x, timesteps), x.shape[2]
        spatial = rearrange(self.attention(self.norm(x)), "b c h w -> b (h w) c")
        number = torch.arange(frames, device=x.device).repeat(len(x) // frames)
        code = self.video_time_embed(timestep_embedding(number, self.in_channels).to(x.dtype))
        temporal = self.time_mix_block(spatial + code[:, None], timesteps=frames)
        alpha = self.get_alpha().to(x.dtype)
        blend = alpha * spatial + (1 - alpha) * temporal
        return x + self.proj_out(rearrange(blend, "b (h w) c -> b c h w", h=height))


class MemoryEfficientVideoBlock(VideoBlock):
    """`VideoBlock` under the name of an old back-end; PyTorch's attention is as frugal."""


TIME_ATTENTION_TYPES: dict[str, type[VideoBlock]] = {
    "vanilla": VideoBlock,
    "vanilla-xformers": MemoryEfficientVideoBlock,
}


def make_time_attn(
    in_channels: int,
    attn_type: str = "vanilla",
    attn_kwargs: dict[str, Any] | None = None,
    alpha: float = 0.0,
    merge_strategy: str = "learned",
) -> VideoBlock:
    """The attention over pixels and frames that a configuration's `attn_type` names.

    Raises:
        AssertionError: there is none of that type (the published error class).
    """
    if attn_type not in TIME_ATTENTION_TYPES:
        raise AssertionError(
            f"attn_type {attn_type!r} has no form over frames. {nearest(attn_type, TIME_ATTENTION_TYPES)}"
        )
    return TIME_ATTENTION_TYPES[attn_type](
        in_channels, alpha=alpha, merge_strategy=merge_strategy, **(attn_kwargs or {})
    )


def _drop_conditions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {}


def over_pixels_only(module: nn.Module) -> nn.Module:
    """A layer that knows nothing of frames, made to accept their number; its weights keep their names."""
    module.register_forward_pre_hook(_drop_conditions, with_kwargs=True)
    return module


class VideoDecoder(Decoder):
    """The image decoder with blocks that look at the frames before and after.

    Its input is (b·t, z_channels, h, w), the frames of a clip one after another; `forward` needs `timesteps`, their number t.
    The parameters are those of `Decoder`, and:

    Args:
        video_kernel_size: width of the convolutions over (t, h, w).
        alpha: share of the frames in a residual block (of the pixels in an attention): itself ("fixed") or its first logit.
        merge_strategy: "fixed" or "learned".
        time_mode: what looks at the frames: "conv-only" (residual blocks and the last layer), "attn-only", or "all".

    Raises:
        AssertionError: unknown time_mode (the published error class).

    Source: Blattmann et al. 2023 (Align your Latents), section 3.1.1.
    """

    available_time_modes = ["all", "conv-only", "attn-only"]

    def __init__(
        self,
        *,
        video_kernel_size: Kernel = 3,
        alpha: float = 0.0,
        merge_strategy: str = "learned",
        time_mode: str = "conv-only",
        **options: Any,
    ) -> None:
        if time_mode not in self.available_time_modes:
            raise AssertionError(
                f"time_mode={time_mode!r} is unknown; choose one of {self.available_time_modes}"
            )
        # plain values, which the factories read while the network is built
        self.video_kernel_size, self.time_mode = video_kernel_size, time_mode
        self.alpha, self.merge_strategy = alpha, merge_strategy
        super().__init__(**options)

    def make_res_block(self, in_channels: int, out_channels: int) -> nn.Module:
        """A residual block, over the frames, too, unless `attn-only`."""
        if self.time_mode == "attn-only":
            return over_pixels_only(super().make_res_block(in_channels, out_channels))
        return VideoResBlock(
            out_channels, in_channels=in_channels, dropout=self._dropout, temb_channels=self.temb_ch,
            video_kernel_size=self.video_kernel_size, alpha=self.alpha, merge_strategy=self.merge_strategy,
        )  # fmt: skip

    def make_attention(self, channels: int) -> nn.Module:
        """An attention, over the frames, too, unless `conv-only`."""
        if self.time_mode == "conv-only":
            return over_pixels_only(make_attn(channels, self.attn_type))
        return make_time_attn(channels, self.attn_type, alpha=self.alpha, merge_strategy=self.merge_strategy)

    def make_conv_out(self, channels: int, out_channels: int) -> nn.Module:
        """The last layer, over the frames, too, unless `attn-only`."""
        if self.time_mode == "attn-only":
            return over_pixels_only(super().make_conv_out(channels, out_channels))
        return AE3DConv(channels, out_channels, self.video_kernel_size, kernel_size=3, padding=1)

    def get_last_layer(self, skip_time_mix: bool = False, **ignored: Any) -> Tensor:
        """The weight whose gradients balance the adversarial loss: over frames if there is one, or over pixels on request."""
        if self.time_mode == "attn-only" or skip_time_mix:
            return self.conv_out.weight
        return self.conv_out.time_mix_conv.weight
