"""`AutoencoderKL`, `VQModel` and decoders of video ⇄ diffusers' `AutoencoderKL`, `VQModel` and `AutoencoderKLTemporalDecoder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ldm.conversion.table import KeyTable, blended, inner_rows
from ldm.conversion.unet import RES_BLOCK as TIME_BLOCK
from taming.modules.diffusionmodules.blocks import AttnBlock, ResnetBlock

RES_BLOCK = {"nin_shortcut": "conv_shortcut"}
# in a block that also looks at other frames all layers have a name before theirs, and the share of the two one of its own
FRAMES_BLOCK = blended({n: RES_BLOCK.get(n, n) for n in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")}, TIME_BLOCK) | {"": "time_mixer"}  # fmt: skip
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
PROJECTIONS = ("q", "k", "v", "proj_out")  # 1×1 convolutions here, linear layers there
# what diffusers called these layers in the files of its first years
OLD_SPELLINGS = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OVER_FRAMES = "time_mix_conv"  # the second half of a video decoder's last layer
WHOLE = ("quant_conv", "post_quant_conv", "quantize")


def autoencoder_table(autoencoder: nn.Module) -> KeyTable:
    """The names of a first stage's weights here and in diffusers' `AutoencoderKL` or `VQModel`.

    Its loss and its averages have no place there.

    Args:
        autoencoder: `AutoencoderKL` or `VQModel`, or the first stage of a pipeline of video, on any device.

    Raises:
        ValueError: attention of a kind that diffusers' classes do not have.
    """
    rows = []
    for ours, theirs, layer in _layers(autoencoder):
        if isinstance(layer, AttnBlock):
            rows += inner_rows(layer.state_dict(), ours, theirs, ATTENTION, PROJECTIONS)
        elif ".attn" in ours and layer.state_dict():
            raise ValueError(
                f"{ours} is a {type(layer).__name__}: diffusers' autoencoders have attn_type 'vanilla' or 'none' only"
            )
        else:
            renamed = (
                {}
                if not isinstance(layer, ResnetBlock)
                else FRAMES_BLOCK
                if hasattr(layer, "time_stack")
                else RES_BLOCK
            )
            names = [n for n in layer.state_dict() if not n.startswith(f"{OVER_FRAMES}.")]
            rows += inner_rows(names, ours, theirs, renamed)
    return KeyTable(tuple(rows), unpaired=("loss.", "model_ema."), spell=_present_spelling)


def _present_spelling(name: str) -> str:
    for old, new in OLD_SPELLINGS.items():
        name = name.replace(old, new)
    return name


def _layers(autoencoder: Any) -> Iterator[tuple[str, str, nn.Module]]:
    """Each layer, with its places in the two networks."""
    for name in WHOLE:
        if hasattr(autoencoder, name):
            yield name, name, getattr(autoencoder, name)
    for half, stages in (
        ("encoder", enumerate(autoencoder.encoder.down)),
        # there in the order of their use
        ("decoder", enumerate(reversed(autoencoder.decoder.up))),
    ):
        network, way = getattr(autoencoder, half), "down" if half == "encoder" else "up"
        for name, there in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{half}.{name}", f"{half}.{there}", getattr(network, name)
        if hasattr(network.conv_out, OVER_FRAMES):
            yield f"{half}.conv_out.{OVER_FRAMES}", f"{half}.time_conv_out", network.conv_out.time_mix_conv
        for name, there in (
            ("block_1", "resnets.0"),
            ("attn_1", "attentions.0"),
            ("block_2", "resnets.1"),
        ):
            yield f"{half}.mid.{name}", f"{half}.mid_block.{there}", getattr(network.mid, name)
        for i, stage in stages:
            here = i if way == "down" else len(network.up) - 1 - i
            ours, theirs = f"{half}.{way}.{here}", f"{half}.{way}_blocks.{i}"
            for kind, there in (("block", "resnets"), ("attn", "attentions")):
                for j, layer in enumerate(getattr(stage, kind)):
                    yield f"{ours}.{kind}.{j}", f"{theirs}.{there}.{j}", layer
            if hasattr(stage, f"{way}sample"):
                yield f"{ours}.{way}sample", f"{theirs}.{way}samplers.0", getattr(stage, f"{way}sample")


# ----------------------------------------------------------------------------------------------------- configurations


def autoencoder_config(params: Mapping[str, Any], scale_factor: float = 0.18215) -> dict[str, Any]:
    """The configuration of diffusers' `AutoencoderKL`, or of its `VQModel` where there is a codebook (`n_embed`).

    Args:
        params: of the first stage's YAML: `ddconfig`, `embed_dim` and, for a codebook, `n_embed`.
        scale_factor: of the diffusion model.

    Raises:
        ValueError: an option that diffusers' classes do not have.
    """
    dd, width = params["ddconfig"], params["embed_dim"]
    quantised = "n_embed" in params
    attention = "linear" if dd.get("use_linear_attn") else dd.get("attn_type", "vanilla")
    foreign = {
        f"attn_type={attention!r}": attention not in ("vanilla", "vanilla-xformers", "none"),
        "resamp_with_conv=False": not dd.get("resamp_with_conv", True),
        "tanh_out=True": dd.get("tanh_out", False),
        f"embed_dim={width} beside z_channels={dd['z_channels']}": not quantised
        and width != dd["z_channels"],
    }
    if found := [name for name, present in foreign.items() if present]:
        raise ValueError(
            f"diffusers' autoencoders have no counterpart of {', '.join(found)}: it cannot be converted"
        )
    sizes = [dd["resolution"] // 2**i for i in range(len(dd["ch_mult"]))]
    attends = [attention != "none" and s in dd["attn_resolutions"] for s in sizes]
    codebook = {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": width} if quantised else {}
    return {
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
        "layers_per_block": dd["num_res_blocks"],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        "mid_block_add_attention": attention != "none",
        "latent_channels": dd["z_channels"],
        "sample_size": dd["resolution"],
        "scaling_factor": scale_factor,
        **codebook,
    }


def autoencoder_module_config(autoencoder: Any, scale_factor: float = 0.18215) -> dict[str, Any]:
    """As `autoencoder_config`, read off a first stage itself: `AutoencoderKL` or `VQModel`, of `ldm`'s or `sgm`'s make."""
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    sizes = [encoder.resolution // 2**i for i in range(encoder.num_resolutions)]
    attends = {size for size, level in zip(sizes, encoder.down, strict=True) if len(level.attn)}
    middle = isinstance(encoder.mid.attn_1, AttnBlock)
    z = decoder.conv_in.in_channels
    after = getattr(autoencoder, "post_quant_conv", None)
    quantize = getattr(autoencoder, "quantize", None)
    ddconfig = {
        "in_channels": encoder.conv_in.in_channels, "out_ch": decoder.conv_out.out_channels, "ch": encoder.ch,
        "ch_mult": [level.block[-1].out_channels // encoder.ch for level in encoder.down],
        "num_res_blocks": encoder.num_res_blocks, "attn_resolutions": attends, "resolution": encoder.resolution,
        "z_channels": z, "attn_type": "vanilla" if middle else "none", "tanh_out": decoder.tanh_out,
    }  # fmt: skip
    params = {"ddconfig": ddconfig, "embed_dim": z if after is None else after.weight.shape[1]}
    if quantize is not None:
        params["n_embed"] = len(quantize.embedding.weight)
    return autoencoder_config(params, scale_factor)


FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",), "norm_num_groups": (32,), "norm_type": ("group",), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
    "shift_factor": (None, 0, 0.0), "latents_mean": (None,), "latents_std": (None,),
}  # fmt: skip


def autoencoder_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """`ddconfig`, `embed_dim` and, for a codebook, `n_embed` from the configuration of diffusers' class.

    Raises:
        ValueError: an option that ours do not have.
    """
    for key, allowed in FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ValueError(
                f"diffusers' configuration has {key}={config[key]!r}; ours have {allowed[0]!r} only"
            )
    attends = _attending(config["down_block_types"], "DownEncoderBlock2D")
    if attends != _attending(config["up_block_types"], "UpDecoderBlock2D")[::-1]:
        raise ValueError("up_block_types is not the mirror of down_block_types, as it is in our autoencoders")
    widths, size = list(config["block_out_channels"]), int(config["sample_size"])
    quantised = "num_vq_embeddings" in config
    z = config["latent_channels"]
    ddconfig = {
        "double_z": not quantised,
        "z_channels": z,
        "resolution": size,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [w // widths[0] for w in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [size // 2**i for i, here in enumerate(attends) if here],
        "dropout": 0.0,
        "attn_type": "vanilla" if config.get("mid_block_add_attention", True) else "none",
    }
    if not quantised:
        return {"ddconfig": ddconfig, "embed_dim": z}
    width = config.get("vq_embed_dim") or z
    return {"ddconfig": ddconfig, "embed_dim": width, "n_embed": config["num_vq_embeddings"]}


def _attending(types: Sequence[str], plain: str) -> list[bool]:
    for name in types:
        if name not in (plain, f"Attn{plain}"):
            raise ValueError(
                f"a level of type {name!r} is unknown here; our autoencoders have {plain} and Attn{plain}"
            )
    return [name != plain for name in types]
