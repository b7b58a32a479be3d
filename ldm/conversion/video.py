"""Networks of video (`sgm`'s SVD) ⇄ the parts of diffusers' `StableVideoDiffusionPipeline`: configurations, and the first stage.

The names of the weights are in `ldm.conversion.unet` and `ldm.conversion.autoencoder`; this module knows classes of `sgm` by
their layers only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.conversion.autoencoder import autoencoder_module_config
from ldm.conversion.unet import TIME_IDS_WIDTH, refuse_foreign, unet_config, unet_params
from ldm.modules.diffusionmodules.openaimodel import UNetModel

PIPELINE = "StableVideoDiffusionPipeline"
UNET = "UNetSpatioTemporalConditionModel"
DECODER = "AutoencoderKLTemporalDecoder"
TIME_IDS = 3  # frames a second, motion, noise on the picture
KERNEL = [3, 1, 1]
LAYERS_OF_DECODER = 2  # diffusers' builds no other middle

# options of `VideoUNet` that diffusers' network has no choice of, beside those of its sizes
BLENDING = {
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": KERNEL,
}
FOREIGN_TIME = {"use_spatial_context": True, "time_context_dim": None, "ff_in": True, "disable_temporal_crossattention": False, "max_time_embed_period": 10000}  # fmt: skip
SIZES = (
    "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "context_dim",
    "transformer_depth", "num_heads", "num_head_channels", "num_classes", "adm_in_channels", "use_linear_in_transformer",
)  # fmt: skip
UNET_ENTRIES = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "transformer_layers_per_block",
    "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
VAE_ENTRIES = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types", "latent_channels", "sample_size",
    "scaling_factor",
)  # fmt: skip


class VideoFirstStage(nn.Module):
    """What diffusers calls the autoencoder of a video pipeline: the encoder of the condition, and the decoder of the clip.

    Args:
        condition: the autoencoder that encodes the picture to continue.
        first_stage: the autoencoder of the clip.
    """

    def __init__(self, condition: Any, first_stage: Any) -> None:
        super().__init__()
        self.encoder, self.quant_conv = condition.encoder, condition.quant_conv
        self.decoder = first_stage.decoder
        if hasattr(first_stage, "post_quant_conv"):
            self.post_quant_conv = first_stage.post_quant_conv

    @property
    def over_frames(self) -> bool:
        """Whether the decoder looks at other frames."""
        return hasattr(self.decoder.conv_out, "time_mix_conv")


def require_convertible(unet: Any, first_stage: VideoFirstStage | None) -> None:
    """Refuse what diffusers' networks of video do not have.

    Raises:
        ValueError: names it.
    """
    refuse_foreign(unet)
    time_options = {k: unet.time_options.get(k, v) for k, v in FOREIGN_TIME.items()}
    vector = unet.label_emb[0][0].in_features if unet.num_classes == "sequential" else None
    foreign = {
        f"num_classes={unet.num_classes!r}": vector is None,
        f"video_kernel_size={unet.video_kernel_size}": list(_triple(unet.video_kernel_size)) != KERNEL,
        f"merge_strategy={unet.merging['merge_strategy']!r}": unet.merging["merge_strategy"]
        != "learned_with_images",
        "use_linear_in_transformer=False": not unet.use_linear_in_transformer,
        "use_scale_shift_norm=True": unet.use_scale_shift_norm,
        **{f"{k}={v}": v != FOREIGN_TIME[k] for k, v in time_options.items()},
    }
    if first_stage is not None and first_stage.over_frames:
        blocks = first_stage.decoder.num_res_blocks
        foreign |= {
            f"a decoder of {blocks} residual blocks a level": blocks != LAYERS_OF_DECODER,
            "time_mode": first_stage.decoder.time_mode != "conv-only",
        }
    if found := [name for name, present in foreign.items() if present]:
        raise ValueError(
            f"diffusers' networks of video have no counterpart of {', '.join(found)}: it cannot be converted"
        )


def _triple(kernel: int | Sequence[int]) -> Sequence[int]:
    return [kernel] * 3 if isinstance(kernel, int) else kernel


def video_unet_config(unet: UNetModel, time_ids_width: int = TIME_IDS_WIDTH) -> dict[str, Any]:
    """The configuration of diffusers' `UNetSpatioTemporalConditionModel`.

    Raises:
        ValueError: an option that it does not have, or another number of numbers beside the picture than SVD's three.
    """
    require_convertible(unet, None)
    flat = unet_config(unet, time_ids_width=time_ids_width)
    count, rest = divmod(flat["projection_class_embeddings_input_dim"], time_ids_width)
    if (count, rest) != (TIME_IDS, 0):
        raise ValueError(
            f"a vector of {count * time_ids_width + rest} numbers beside the picture, which is not {TIME_IDS} × {time_ids_width}: "
            f"diffusers' {PIPELINE} takes frames a second, motion and noise, as SVD does, and SV3D does not"
        )
    return {
        "_class_name": UNET, **{k: flat[k] for k in UNET_ENTRIES}, "num_attention_heads": flat["attention_head_dim"],
        **{f"{way}_block_types": [t.replace("2D", "SpatioTemporal") for t in flat[f"{way}_block_types"]] for way in ("down", "up")},
    }  # fmt: skip


def video_unet_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `params` of a `VideoUNet` from the configuration of diffusers' class.

    Raises:
        ValueError: an option that ours does not have.
    """
    types = {
        f"{way}_block_types": [t.replace("SpatioTemporal", "2D") for t in config[f"{way}_block_types"]]
        for way in ("down", "up")
    }
    flat = {**config, **types, "attention_head_dim": config["num_attention_heads"], "use_linear_projection": True, "addition_embed_type": "text_time"}  # fmt: skip
    del flat["num_attention_heads"]
    params = unet_params(flat)
    return {k: params[k] for k in SIZES if k in params} | BLENDING


def video_vae_config(first_stage: VideoFirstStage, scale_factor: float) -> dict[str, Any]:
    """The configuration of diffusers' `AutoencoderKLTemporalDecoder`, or `AutoencoderKL` if the decoder is one of images."""
    config = autoencoder_module_config(first_stage, scale_factor)
    if not first_stage.over_frames:
        return {"_class_name": "AutoencoderKL", **config}
    return {"_class_name": DECODER, "force_upcast": True, **{k: config[k] for k in VAE_ENTRIES}}


def video_model_index(decoder: str) -> dict[str, Any]:
    """`model_index.json`; `decoder` is the class of the autoencoder."""
    return {
        "_class_name": PIPELINE, "unet": ["diffusers", UNET], "vae": ["diffusers", decoder],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"], "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }  # fmt: skip
