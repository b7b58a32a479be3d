"""`UNetModel` ⇄ diffusers' `UNet2DConditionModel`: names and configurations, read off the network's structure.

The names are also those of `VideoUNet`; its configuration is in `ldm.conversion.video`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ldm.conversion.table import KeyTable, Row, blended, inner_rows
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.unet_blocks import AttentionBlock, Downsample, ResBlock, Upsample

# names within a layer that differ; all others (a transformer's, say) are the same
RES_BLOCK = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
# layers of a transformer that also looks at other frames
FRAMES = {"time_stack": "temporal_transformer_blocks", "time_pos_embed.0": "time_pos_embed.linear_1", "time_pos_embed.2": "time_pos_embed.linear_2"}  # fmt: skip
TIME_LAYERS = {"0": "linear_1", "2": "linear_2"}
VECTOR_LAYERS = {"0.0": "linear_1", "0.2": "linear_2"}
# num_classes="sequential" has two counterparts: SDXL's pooled text with sizes, and unCLIP's noisy image embedding
VECTORS = {"text_time": "add_embedding", "projection": "class_embedding"}
ATTENDING = "CrossAttnDownBlock2D"
TIME_IDS_WIDTH = 256  # of each of SDXL's numbers, in published checkpoints


def unet_rows(unet: UNetModel, vector: str = "text_time") -> Iterator[Row]:
    """All weights of a UNet; `theirs` is None where diffusers' network has no such layer.

    Args:
        unet: the network, on any device.
        vector: what num_classes="sequential" stands for, "text_time" (SDXL) or "projection" (unCLIP).
    """
    for ours, theirs, layer in _layers(unet, vector):
        foreign = isinstance(layer, AttentionBlock) or (isinstance(layer, ResBlock) and layer.updown)
        yield from inner_rows(
            layer.state_dict(), ours, None if foreign else theirs, _inner_names(ours, layer)
        )


def _inner_names(ours: str, layer: nn.Module) -> Mapping[str, str]:
    frames = hasattr(layer, "time_stack")
    if isinstance(layer, ResBlock):
        return blended(RES_BLOCK, RES_BLOCK) if frames else RES_BLOCK
    if isinstance(layer, Downsample):
        return {"op": "conv"}
    if frames:
        paths = (
            (path, old)
            for path, _ in layer.named_modules()
            for old in FRAMES
            if f"{path}.".startswith(f"{old}.")
        )
        return {path: FRAMES[old] + path.removeprefix(old) for path, old in paths}
    return {"time_embed": TIME_LAYERS, "label_emb": VECTOR_LAYERS}.get(ours, {})


def _layers(unet: UNetModel, vector: str) -> Iterator[tuple[str, str | None, nn.Module]]:
    """Each layer, with its places in the two networks."""
    yield "time_embed", "time_embedding", unet.time_embed
    if unet.num_classes is not None:
        sequential = unet.num_classes == "sequential"
        yield "label_emb", VECTORS[vector] if sequential else "class_embedding", unet.label_emb
    yield "input_blocks.0.0", "conv_in", unet.input_blocks[0][0]  # type: ignore[index]
    yield from _levels(unet.input_blocks, "input_blocks", "down", first=1)
    for i, there in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"middle_block.{i}", f"mid_block.{there}", unet.middle_block[i]
    yield from _levels(unet.output_blocks, "output_blocks", "up")
    yield "out.0", "conv_norm_out", unet.out[0]
    yield "out.2", "conv_out", unet.out[2]
    if unet.predict_codebook_ids:
        yield "id_predictor", None, unet.id_predictor


def _levels(
    blocks: nn.ModuleList, ours: str, way: str, first: int = 0
) -> Iterator[tuple[str, str, nn.Module]]:
    """The layers of a ladder: here one list of blocks, there levels with lists by kind."""
    level = place = 0
    block: Any
    for i, block in enumerate(blocks[first:], first):
        for j, layer in enumerate(block):
            kind = "resnets" if isinstance(layer, ResBlock) else "attentions"
            there = f"{way}samplers.0" if _resamples(layer) else f"{kind}.{place}"
            yield f"{ours}.{i}.{j}", f"{way}_blocks.{level}.{there}", layer
        level, place = (level + 1, 0) if _resamples(block[-1]) else (level, place + 1)


def _resamples(layer: nn.Module) -> bool:
    return isinstance(layer, Upsample | Downsample) or bool(getattr(layer, "updown", False))


def unet_table(unet: UNetModel, vector: str = "text_time") -> KeyTable:
    """The names of a UNet's weights here and in diffusers' `UNet2DConditionModel`.

    Args:
        unet, vector: see `unet_rows`.

    Raises:
        ValueError: an option that diffusers' network does not have.
    """
    refuse_foreign(unet, vector)
    return KeyTable(tuple(unet_rows(unet, vector)))


def looks_at_frames(unet: nn.Module) -> bool:
    """Whether it is a network of video, as SVD's."""
    return any(hasattr(layer, "time_stack") for layer in unet.modules())


def refuse_foreign(unet: UNetModel, vector: str = "text_time") -> None:
    """See `unet_table`."""
    if vector not in VECTORS:
        raise ValueError(f"vector={vector!r} is unknown; choose one of {sorted(VECTORS)}")
    levels = zip(unet.num_attention_blocks, unet.num_res_blocks, _attending(unet), strict=True)
    foreign = {
        f"dims={unet.dims}": unet.dims != 2,
        f"patch_size={unet.patch_size}": unet.patch_size > 1,
        "resblock_updown=True": unet.resblock_updown,
        "conv_resample=False": not unet.conv_resample,
        "use_spatial_transformer=False": not unet.use_spatial_transformer,
        "n_embed": unet.predict_codebook_ids,
        "layers over views and moments, as SV4D's": any(
            hasattr(m, "time_mix_blocks") for m in unet.modules()
        ),
        "num_attention_blocks": any(here and n < blocks + 1 for n, blocks, here in levels),
        f"context_dim={unet.context_dim}": isinstance(unet.context_dim, list)
        and len(set(unet.context_dim)) > 1,
    }
    if found := [name for name, present in foreign.items() if present]:
        raise ValueError(
            f"diffusers' UNet2DConditionModel has no counterpart of {', '.join(found)}: it cannot be converted"
        )


def _attending(unet: UNetModel) -> list[bool]:
    return [2**i in unet.attention_resolutions for i in range(len(unet.channel_mult))]


# ----------------------------------------------------------------------------------------------------- configurations


def unet_config(
    unet: UNetModel | Mapping[str, Any], vector: str = "text_time", time_ids_width: int = TIME_IDS_WIDTH
) -> dict[str, Any]:
    """The configuration of diffusers' `UNet2DConditionModel` for a UNet.

    Args:
        unet: the network, or the `params` of its YAML.
        vector: see `unet_rows`.
        time_ids_width: of each of SDXL's numbers.

    Raises:
        ValueError: an option that diffusers' network does not have.
    """
    if not isinstance(unet, UNetModel):
        with torch.device("meta"):
            unet = UNetModel(**unet)
    refuse_foreign(unet, vector)
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    attends = _attending(unet)
    context = unet.context_dim[0] if isinstance(unet.context_dim, list) else unet.context_dim
    return {
        "sample_size": unet.image_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": _shared(unet.num_res_blocks),
        "down_block_types": [ATTENDING if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": context,
        # the number of heads, whatever its name says
        "attention_head_dim": unet.num_heads
        if unet.num_head_channels == -1
        else [w // unet.num_head_channels for w in widths],
        "transformer_layers_per_block": _shared(unet.transformer_depth),
        "only_cross_attention": _shared(unet.disable_self_attentions),
        "mid_block_only_cross_attention": unet.disable_middle_self_attn,
        "use_linear_projection": unet.use_linear_in_transformer,
        "dropout": unet.dropout,
        "resnet_time_scale_shift": "scale_shift" if unet.use_scale_shift_norm else "default",
        **_label_config(unet, vector, time_ids_width),
    }


def _shared(values: Sequence[Any]) -> Any:
    """One value where all are the same, else the list."""
    return values[0] if len(set(values)) == 1 else list(values)


def _label_config(unet: UNetModel, vector: str, time_ids_width: int) -> dict[str, Any]:
    if unet.num_classes is None:
        return {}
    if isinstance(unet.num_classes, int):
        return {"num_class_embeds": unet.num_classes}
    if unet.num_classes == "continuous":
        return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 1}
    width: Any = unet.label_emb
    given = {"projection_class_embeddings_input_dim": width[0][0].in_features}
    if vector == "projection":
        return {"class_embed_type": "projection", **given}
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": time_ids_width, **given}


# what other networks of that class have and ours has not: any other value is refused
FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "norm_num_groups": (32,), "norm_eps": (1e-5,), "center_input_sample": (False,), "flip_sin_to_cos": (True,),
    "freq_shift": (0,), "downsample_padding": (1,), "mid_block_scale_factor": (1,), "dual_cross_attention": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"), "class_embed_type": (None, "projection", "simple_projection"),
    "time_embedding_type": ("positional",), "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",), "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1, 1.0), "time_embedding_dim": (None,),
    "num_attention_heads": (None,), "reverse_transformer_layers_per_block": (None,), "resnet_time_scale_shift": ("default", "scale_shift"),
}  # fmt: skip


def unet_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `params` of a `UNetModel` from the configuration of diffusers' `UNet2DConditionModel`.

    Raises:
        ValueError: an option that ours does not have.
    """
    _refuse_config(config)
    widths, types = list(config["block_out_channels"]), list(config["down_block_types"])
    depth = config.get("transformer_layers_per_block", 1)
    blocks = config.get("layers_per_block", 2)
    self_less = config.get("only_cross_attention", False)
    middle = config.get("mid_block_only_cross_attention")
    return {
        "image_size": config.get("sample_size"),
        "in_channels": config.get("in_channels", 4),
        "out_channels": config.get("out_channels", 4),
        "model_channels": widths[0],
        "channel_mult": [w // widths[0] for w in widths],
        "num_res_blocks": blocks if isinstance(blocks, int) else list(blocks),
        "attention_resolutions": [2**i for i, t in enumerate(types) if t == ATTENDING],
        "use_spatial_transformer": True,
        "context_dim": config["cross_attention_dim"],
        "transformer_depth": depth if isinstance(depth, int) else list(depth),
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "disable_self_attentions": self_less if isinstance(self_less, bool) else list(self_less),
        "disable_middle_self_attn": self_less is True if middle is None else bool(middle),
        "use_scale_shift_norm": config.get("resnet_time_scale_shift") == "scale_shift",
        "dropout": config.get("dropout", 0.0),
        "legacy": False,
        **_head_params(config.get("attention_head_dim", 8), widths),
        **_label_params(config),
    }


def _refuse_config(config: Mapping[str, Any]) -> None:
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"diffusers' configuration has {key}={config[key]!r}; UNetModel has {' or '.join(map(repr, allowed))} only"
            )
    widths, types = list(config["block_out_channels"]), list(config["down_block_types"])
    known = (ATTENDING, "DownBlock2D")
    if unknown := [t for t in types if t not in known]:
        raise ValueError(f"down_block_types holds {unknown[0]!r}; UNetModel has {' and '.join(known)} only")
    mirrored = [t.replace("Down", "Up") for t in reversed(types)]
    if list(config["up_block_types"]) != mirrored:
        raise ValueError(
            f"up_block_types={list(config['up_block_types'])} is not the mirror of down_block_types: {mirrored}"
        )
    if rest := [w for w in widths if w % widths[0]]:
        raise ValueError(
            f"block_out_channels={widths}: {rest[0]} is no multiple of the first, as UNetModel's widths are"
        )


def _head_params(heads: int | Sequence[int], widths: Sequence[int]) -> dict[str, int]:
    if isinstance(heads, int):
        return {"num_heads": heads}
    each = {w // h if w % h == 0 else -1 for w, h in zip(widths, heads, strict=True)}
    if len(each) != 1 or -1 in each:
        raise ValueError(
            f"attention_head_dim={list(heads)} for widths {list(widths)}: the heads are not equally wide"
        )
    return {"num_head_channels": each.pop()}


def _label_params(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("num_class_embeds") is not None:
        return {"num_classes": config["num_class_embeds"]}
    kind, width = config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")
    if kind == "simple_projection":
        if width != 1:
            raise ValueError(
                f"class_embed_type='simple_projection' of width {width}: UNetModel's 'continuous' has width 1"
            )
        return {"num_classes": "continuous"}
    if kind == "projection" or config.get("addition_embed_type") == "text_time":
        return {"num_classes": "sequential", "adm_in_channels": width}
    return {}
