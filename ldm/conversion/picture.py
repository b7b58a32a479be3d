"""The picture tower of open_clip's `CLIP` ⇄ transformers' `CLIPVisionModelWithProjection`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ldm.conversion.table import TRANSPOSED, KeyTable, Row
from ldm.conversion.text import activation, block_rows
from ldm.modules.encoders.image import CLIP_MEAN, CLIP_SIZE, CLIP_STD

# entries of open_clip's model that are of texts
UNPAIRED = (
    "logit_scale",
    "token_embedding.",
    "positional_embedding",
    "ln_final.",
    "text_projection",
    "attn_mask",
    "transformer.",
)
TOP_OF_PICTURES = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")


def is_openclip_picture(module: nn.Module) -> bool:
    """Whether it is open_clip's `CLIP` with its picture tower, which encoders of text drop; told without importing it."""
    tower = getattr(getattr(module, "visual", None), "transformer", None)
    return hasattr(tower, "resblocks")


def _spell(name: str) -> str | None:
    """transformers writes `vision_model.` before all names, or before none."""
    if name.endswith(".position_ids"):
        return None
    return f"vision_model.{name}" if name.startswith(TOP_OF_PICTURES) else name


def picture_rows(model: Any) -> Iterator[Row]:
    """The weights of an open_clip model's picture tower."""
    here, there = "visual", "vision_model"
    yield Row(f"{here}.class_embedding", f"{there}.embeddings.class_embedding")
    yield Row(f"{here}.positional_embedding", f"{there}.embeddings.position_embedding.weight")
    yield Row(f"{here}.conv1.weight", f"{there}.embeddings.patch_embedding.weight")
    for i in range(len(model.visual.transformer.resblocks)):
        yield from block_rows(f"{here}.transformer.resblocks.{i}", f"{there}.encoder.layers.{i}")
    for kind in ("weight", "bias"):
        # the misspelling is transformers' own
        yield Row(f"{here}.ln_pre.{kind}", f"{there}.pre_layrnorm.{kind}")
        yield Row(f"{here}.ln_post.{kind}", f"{there}.post_layernorm.{kind}")
    yield Row(f"{here}.proj", "visual_projection.weight", TRANSPOSED)


def picture_table(model: nn.Module) -> KeyTable:
    """The names of an open_clip model's picture tower here and in transformers; what it keeps of texts has no place there.

    Args:
        model: open_clip's `CLIP`, as `FrozenOpenCLIPImageEmbedder.model` holds it.
    """
    return KeyTable(tuple(picture_rows(model)), unpaired=UNPAIRED, spell=_spell)


# ----------------------------------------------------------------------------------------------------- configurations


def picture_config(model: Any) -> dict[str, Any]:
    """The configuration of transformers' class."""
    tower = model.visual
    blocks = tower.transformer.resblocks
    return {
        "hidden_size": tower.conv1.out_channels, "intermediate_size": blocks[0].mlp.c_fc.out_features, "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads, "image_size": tower.image_size[0], "patch_size": tower.patch_size[0],
        "projection_dim": tower.proj.shape[1], "hidden_act": activation(blocks[0]), "layer_norm_eps": 1e-5, "num_channels": 3,
    }  # fmt: skip


def picture_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of a `FrozenOpenCLIPImageEmbedder(arch=…)` from transformers' configuration.

    Of its text tower, which the encoder drops, the outer layers stay: they are as wide as ViT-H's, as published.

    Raises:
        ValueError: an activation that open_clip does not have.
    """
    act = config.get("hidden_act", "quick_gelu")
    if act not in ("gelu", "quick_gelu"):
        raise ValueError(f"hidden_act={act!r}: open_clip's picture towers have 'gelu' or 'quick_gelu'")
    width = config["hidden_size"]
    return {
        "embed_dim": config["projection_dim"], "quick_gelu": act == "quick_gelu",
        "vision_cfg": {
            "image_size": config["image_size"], "layers": config["num_hidden_layers"], "width": width,
            "head_width": width // config["num_attention_heads"], "patch_size": config["patch_size"],
            "mlp_ratio": config["intermediate_size"] / width,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 1},
    }  # fmt: skip


def feature_extractor_config() -> dict[str, Any]:
    """`preprocessor_config.json`: how pictures are brought into the form that CLIP wants."""
    return {
        "image_processor_type": "CLIPImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True,
        "size": {"shortest_edge": CLIP_SIZE}, "resample": 3, "do_center_crop": True, "crop_size": {"height": CLIP_SIZE, "width": CLIP_SIZE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
        "do_convert_rgb": True,
    }  # fmt: skip
