"""A latent diffusion model that builds from three numbers: small, untrained, conditioned on text, without a download."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import OmegaConf

CONFIGS = {"unet_config", "first_stage_config", "cond_stage_config"}
LEVELS = 3  # of the network, unless an attention resolution needs more
CONTEXT_DIM = 256
LEARNING_RATE = 1e-4


def default_parameters(
    latent_dim: int = 4,
    attention_resolutions: Sequence[int] = (8, 16, 32),
    num_heads: int = 8,
    image_size: int = 32,
    model_channels: int = 64,
    **published: Any,
) -> Any:
    """Parameters of `LatentDiffusion` for a small text-to-image model, untrained; nothing of it is downloaded.

    An autoencoder of factor 4 with the layers of configs/quickstart/autoencoder.yaml, a text transformer over CLIP's byte pairs
    that is trained along, a UNet that predicts v, and prompts dropped from every tenth picture for guidance.

    Args:
        latent_dim: channels of the latents.
        attention_resolutions: sides of the latents at which the UNet attends (a UNet's own option of that name counts the
            factors instead).
        num_heads: of each attention.
        image_size: side of the latents, a quarter of the pictures'.
        model_channels: width of the UNet's first level, a multiple of 32.
        published: further parameters of `LatentDiffusion`.

    Raises:
        ValueError: a resolution that the latents do not pass through, or heads that do not divide the width.
    """
    factors = [_factor(side, image_size) for side in attention_resolutions]
    if num_heads < 1 or model_channels % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide model_channels={model_channels}")
    levels = max([LEVELS, *(factor.bit_length() for factor in factors)])
    unet = {
        "image_size": image_size, "in_channels": latent_dim, "out_channels": latent_dim, "model_channels": model_channels,
        "channel_mult": [min(2**level, 4) for level in range(levels)], "num_res_blocks": 1, "attention_resolutions": factors,
        "num_heads": num_heads, "use_spatial_transformer": True, "context_dim": CONTEXT_DIM, "legacy": False,
    }  # fmt: skip
    layers = {
        "double_z": True, "z_channels": latent_dim, "resolution": 4 * image_size, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    autoencoder = {
        "embed_dim": latent_dim,
        "ddconfig": layers,
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    }
    text = {"n_embed": CONTEXT_DIM, "n_layer": 2, "vocab_size": 4096, "max_seq_len": 77, "tokenizer": "bpe"}
    defaults = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": autoencoder},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": text},
        "cond_stage_key": "caption", "cond_stage_trainable": True, "conditioning_key": "crossattn", "parameterization": "v",
        "image_size": image_size, "channels": latent_dim, "scale_by_std": True, "linear_start": 0.0015, "linear_end": 0.0195,
        "ucg_training": {"caption": {"p": 0.1, "val": ""}},
    }  # fmt: skip
    return {**OmegaConf.create(defaults), **published}


def _factor(side: int, image_size: int) -> int:
    factor = image_size // max(side, 1)
    if side < 1 or factor * side != image_size or factor & (factor - 1):
        sides = [
            image_size >> level for level in range(image_size.bit_length()) if not image_size % (1 << level)
        ]
        raise ValueError(
            f"attention_resolutions: latents of side {image_size} do not pass through {side}; choose among {', '.join(map(str, sides))}"
        )
    return factor


def buildable(published: Callable[..., None]) -> Callable[..., None]:
    """Let `LatentDiffusion(latent_dim=4, …)` build `default_parameters`, beside the published constructor of three configurations.

    Subclasses with a constructor of their own are not concerned, nor are configurations in YAML, which stay strict.
    """

    @functools.wraps(published)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if args or CONFIGS & kwargs.keys() or type(self).__init__ is not __init__:
            published(self, *args, **kwargs)
        else:
            # main.py computes the rate; a Trainer in a notebook needs one, too
            rate = kwargs.pop("learning_rate", LEARNING_RATE)
            published(self, **default_parameters(**kwargs))
            self.learning_rate = rate

    return __init__
