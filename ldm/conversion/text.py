"""CLIP's text transformers, those of ours and those of open_clip ⇄ transformers' `CLIPTextModel(WithProjection)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ldm.conversion.table import TRANSPOSED, KeyTable, Row
from ldm.modules.encoders.clip import CLIPTextModel

TOP_OF_TEXT = ("embeddings.", "encoder.", "final_layer_norm.")
# names within a block of open_clip's transformer
BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
THIRDS = ("q_proj", "k_proj", "v_proj")  # of the fused projection, in their order


def _spell(name: str) -> str | None:
    """transformers writes `text_model.` before all names, or, since its version 5, before none."""
    if name.endswith(".position_ids"):
        return None
    return f"text_model.{name}" if name.startswith(TOP_OF_TEXT) else name


def clip_table(model: CLIPTextModel) -> KeyTable:
    """The names of a CLIP text model: those of transformers, but for the buffer `position_ids`."""
    ids = "text_model.embeddings.position_ids"
    rows = tuple(Row(name, name) for name in model.state_dict() if name != ids)
    positions = torch.arange(model.config.max_position_embeddings, device="cpu")[None]
    return KeyTable(rows, constants={ids: positions}, spell=_spell)


def block_rows(ours: str, theirs: str) -> Iterator[Row]:
    """The weights of one block of open_clip's transformers, of texts as of pictures."""
    for kind in ("weight", "bias"):
        for third, name in enumerate(THIRDS):
            yield Row(f"{ours}.attn.in_proj_{kind}", f"{theirs}.self_attn.{name}.{kind}", third=third)
        for name, there in BLOCK.items():
            yield Row(f"{ours}.{name}.{kind}", f"{theirs}.{there}.{kind}")


def openclip_rows(model: Any, skip_last: int = 0) -> Iterator[Row]:
    """The weights of an open_clip model's text transformer, without its last `skip_last` layers."""
    text = "text_model"
    yield Row("token_embedding.weight", f"{text}.embeddings.token_embedding.weight")
    yield Row("positional_embedding", f"{text}.embeddings.position_embedding.weight")
    for i in range(len(model.transformer.resblocks) - skip_last):
        yield from block_rows(f"transformer.resblocks.{i}", f"{text}.encoder.layers.{i}")
    for kind in ("weight", "bias"):
        yield Row(f"ln_final.{kind}", f"{text}.final_layer_norm.{kind}")


def openclip_table(model: nn.Module, skip_last: int = 0, projection: bool = True) -> KeyTable:
    """The names of an open_clip model's text tower here and in transformers.

    The temperature (`logit_scale`), a picture tower and a mask have no place there.

    Args:
        model: open_clip's `CLIP`, as `FrozenOpenCLIPEmbedder.model` holds it.
        skip_last: layers to leave out at the end; 1 is what diffusers ships for SD 2, whose encoder stops before the last.
        projection: to and from `CLIPTextModelWithProjection`; without it, `CLIPTextModel`.

    Raises:
        ValueError: not so many layers.
    """
    depth = len(model.transformer.resblocks)  # type: ignore[union-attr, arg-type]
    if not 0 <= skip_last < depth:
        raise ValueError(
            f"skip_last={skip_last} must lie between 0 and {depth - 1}: there are {depth} layers"
        )
    rows = list(openclip_rows(model, skip_last))
    unpaired = ["logit_scale", "visual.", "attn_mask"]
    unpaired += [f"transformer.resblocks.{i}." for i in range(depth - skip_last, depth)]
    if projection:
        rows.append(Row("text_projection", "text_projection.weight", TRANSPOSED))
    else:
        unpaired.append("text_projection")
    return KeyTable(tuple(rows), unpaired=tuple(unpaired), spell=_spell)


# ----------------------------------------------------------------------------------------------------- configurations


def clip_config(model: CLIPTextModel) -> dict[str, Any]:
    """The configuration of transformers' `CLIPTextModel`; the way back is `FrozenCLIPEmbedder(version=sizes)`."""
    config = model.config
    end = config.vocab_size - 1 if config.eos_token_id is None else config.eos_token_id
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings, "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps, "bos_token_id": config.vocab_size - 2, "eos_token_id": end,
    }  # fmt: skip


def activation(block: Any) -> str:
    """transformers' name of the activation in a block of open_clip's."""
    return "gelu" if isinstance(block.mlp.gelu, nn.GELU) else "quick_gelu"


def openclip_config(model: Any, skip_last: int = 0) -> dict[str, Any]:
    """The configuration of transformers' class for an open_clip model's text tower, see `openclip_table`."""
    vocabulary, width = model.token_embedding.weight.shape
    blocks = model.transformer.resblocks
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks) - skip_last, "num_attention_heads": blocks[0].attn.num_heads,
        "max_position_embeddings": len(model.positional_embedding), "hidden_act": activation(blocks[0]), "layer_norm_eps": 1e-5,
        "projection_dim": model.text_projection.shape[1], "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
    }  # fmt: skip


def openclip_architecture(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a `FrozenOpenCLIPEmbedder(arch=…)` from transformers' configuration of a text tower.

    Layers that were left out there are not counted; the picture tower, which the encoder drops, is a small one.

    Raises:
        ValueError: an activation that open_clip does not have.
    """
    if config["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"hidden_act={config['hidden_act']!r}: open_clip's text towers have 'gelu' or 'quick_gelu'"
        )
    return {
        "embed_dim": config.get("projection_dim", config["hidden_size"]),
        "quick_gelu": config["hidden_act"] == "quick_gelu",
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": config["max_position_embeddings"], "vocab_size": config["vocab_size"], "width": config["hidden_size"],
            "heads": config["num_attention_heads"], "layers": config["num_hidden_layers"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        },
    }  # fmt: skip
