"""Weights and configurations of this library ⇄ those of diffusers and transformers.

    pipeline = to_diffusers(model)                             # {"unet": …, "vae": …, "text_encoder": …}
    load_into(model, from_diffusers(model, pipeline))          # and back, bit for bit

The names are derived from a network's structure, so that networks of any size convert; neither library is needed for it.
"""

from ldm.conversion.autoencoder import autoencoder_config, autoencoder_params, autoencoder_table
from ldm.conversion.checkpoint import from_diffusers, network_table, networks, to_diffusers
from ldm.conversion.layouts import layout_of, to_ldm, to_sgm
from ldm.conversion.picture import picture_architecture, picture_config, picture_table
from ldm.conversion.pipeline import network_file, read_pipeline, write_pipeline
from ldm.conversion.pipeline_config import pipeline_model_config
from ldm.conversion.precision import cast
from ldm.conversion.schedule import scheduler_config
from ldm.conversion.table import KeyTable, Row
from ldm.conversion.text import (
    clip_config,
    clip_table,
    openclip_architecture,
    openclip_config,
    openclip_table,
)
from ldm.conversion.unet import unet_config, unet_params, unet_table
from ldm.conversion.video import VideoFirstStage, video_unet_config, video_unet_params

__all__ = [
    "KeyTable", "Row", "VideoFirstStage", "autoencoder_config", "autoencoder_params", "autoencoder_table", "cast", "clip_config", "clip_table",
    "from_diffusers", "layout_of", "network_file", "network_table", "networks", "openclip_architecture", "openclip_config",
    "openclip_table", "picture_architecture", "picture_config", "picture_table", "pipeline_model_config", "read_pipeline",
    "scheduler_config", "to_diffusers", "to_ldm", "to_sgm", "unet_config", "unet_params", "unet_table", "video_unet_config",
    "video_unet_params", "write_pipeline",
]  # fmt: skip
