"""Which published model a file of weights without a configuration is, told by its names and shapes.

recognise(Weights("model.safetensors"))                    # Recognised("Stable Diffusion XL, base", …)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taming.checkpoint import CheckpointError, Weights

CHECKOUT = Path(__file__).resolve().parents[1]
UNET = "model.diffusion_model."
SD = "configs/stable-diffusion/"
SAMPLING = "scripts/sampling/configs/"
FIRST_STAGES = "models/first_stage_models/"


class Traits(NamedTuple):
    """What tells the published models apart; None is "has none"."""

    channels: int | None = None  # that the UNet reads
    context: int | None = None  # width of what its cross-attention reads
    vector: int | None = None  # width of the vector it takes beside the time step
    labels: int | None = None  # number of its labels
    width: int | None = None  # of its first layer
    frames: bool = False  # layers over time
    views: bool = False  # layers over moments and views, as SV4D's
    motion: bool = False  # a share of its own for the moments
    decoder_frames: bool = False  # in the first stage's decoder
    layout: str | None = None  # "ldm", "sgm", or None for a first stage alone
    latent: int | None = None  # channels, of a first stage alone
    levels: int | None = None
    codes: int | None = None  # entries of its codebook
    attends: bool | None = None  # anywhere


class Known(NamedTuple):
    """A published model."""

    name: str
    config: str | None  # None: none was published in the originals' form
    traits: Mapping[str, Any]
    # the same names and shapes, but the network predicts v
    twin: str | None = None


def _kl(config: str, latent: int, levels: int) -> Known:
    factor = 2 ** (levels - 1)
    traits = {"layout": None, "latent": latent, "levels": levels, "codes": None, "channels": None}
    return Known(f"KL-f{factor}", f"configs/autoencoder/{config}.yaml", traits)


def _vq(name: str, latent: int, levels: int, codes: int, **traits: Any) -> Known:
    full = {"layout": None, "latent": latent, "levels": levels, "codes": codes, **traits}
    return Known(name.upper(), f"{FIRST_STAGES}{name}/config.yaml", full)


_V1: dict[str, Any] = {"layout": "ldm", "context": 768, "vector": None, "width": 320, "frames": False}
_V2: dict[str, Any] = {**_V1, "context": 1024, "labels": None}
_SGM: dict[str, Any] = {"layout": "sgm", "frames": False}
_VIDEO: dict[str, Any] = {"layout": "sgm", "frames": True, "channels": 8}
_VIEWS: dict[str, Any] = {"layout": "sgm", "views": True, "channels": 8, "vector": 1280}
_VQGAN: dict[str, Any] = {"layout": None, "latent": 256, "levels": 5}

MODELS = (
    Known("Stable Diffusion 1", f"{SD}v1-inference.yaml", {**_V1, "channels": 4}),
    Known("Stable Diffusion 1, inpainting", f"{SD}v1-inpainting-inference.yaml", {**_V1, "channels": 9}),
    Known("Stable Diffusion 2", f"{SD}v2-inference.yaml", {**_V2, "channels": 4}, twin=f"{SD}v2-inference-v.yaml"),
    Known("Stable Diffusion 2, inpainting", f"{SD}v2-inpainting-inference.yaml", {**_V2, "channels": 9}),
    Known("Stable Diffusion 2, depth", f"{SD}v2-midas-inference.yaml", {**_V2, "channels": 5}),
    Known("x4 upscaler", f"{SD}x4-upscaling.yaml", {**_V2, "channels": 7, "labels": 1000, "width": 256}),
    Known("Stable unCLIP, ViT-H", f"{SD}v2-1-stable-unclip-h-inference.yaml", {**_V2, "channels": 4, "vector": 2048}),
    Known("Stable unCLIP, ViT-L", f"{SD}v2-1-stable-unclip-l-inference.yaml", {**_V2, "channels": 4, "vector": 1536}),
    Known(
        "Stable Diffusion 2 of sgm's layout", "configs/inference/sd_2_1.yaml", {**_SGM, "channels": 4, "context": 1024, "vector": None},
        twin="configs/inference/sd_2_1_768.yaml",
    ),
    Known("Stable Diffusion XL, base", "configs/inference/sd_xl_base.yaml", {**_SGM, "channels": 4, "vector": 2816, "context": 2048}),
    Known("Stable Diffusion XL, inpainting", None, {**_SGM, "channels": 9, "vector": 2816, "context": 2048}),
    Known("Stable Diffusion XL, refiner", "configs/inference/sd_xl_refiner.yaml", {**_SGM, "channels": 4, "vector": 2560, "context": 1280}),
    Known("Stable Video Diffusion", "configs/inference/svd.yaml", {**_VIDEO, "vector": 768, "decoder_frames": True}),
    Known(
        "Stable Video Diffusion, decoder of images", "configs/inference/svd_image_decoder.yaml",
        {**_VIDEO, "vector": 768, "decoder_frames": False},
    ),
    Known("SV3D-u", "configs/inference/sv3d_u.yaml", {**_VIDEO, "vector": 256}),
    Known("SV3D-p", "configs/inference/sv3d_p.yaml", {**_VIDEO, "vector": 1280}),
    Known("SV4D", f"{SAMPLING}sv4d.yaml", {**_VIEWS, "motion": False}),
    # the model of eight views has the same names and shapes
    Known("SV4D 2.0", f"{SAMPLING}sv4d2.yaml", {**_VIEWS, "motion": True}),
    Known("LDM text-to-image", "configs/latent-diffusion/txt2img-1p4B-eval.yaml", {"layout": "ldm", "channels": 4, "context": 1280, "width": 320}),
    _kl("autoencoder_kl_64x64x3", 3, 3),
    _kl("autoencoder_kl_32x32x4", 4, 4),
    _kl("autoencoder_kl_16x16x16", 16, 5),
    _kl("autoencoder_kl_8x8x64", 64, 6),
    _vq("vq-f4", 3, 3, 8192, attends=True),
    _vq("vq-f4-noattn", 3, 3, 8192, attends=False),
    _vq("vq-f8", 4, 4, 16384),
    _vq("vq-f8-n256", 4, 4, 256),
    _vq("vq-f16", 8, 5, 16384),
    Known("VQGAN", "configs/imagenet_vqgan.yaml", {**_VQGAN, "codes": 1024}),
    Known("VQGAN of 16384 codes", "configs/imagenet_vqgan_16384.yaml", {**_VQGAN, "codes": 16384}),
)  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """A published model that a file was recognised as.

    Args:
        name: of the model.
        config: path of its configuration, as published.
        twin: of the configuration that the weights may just as well belong to: same shapes, but the network predicts v.
    """

    name: str
    config: str
    twin: str | None = None


def traits_of(shapes: Mapping[str, Sequence[int]]) -> Traits:
    """What the names and shapes of weights say of their model."""

    def size(pattern: str, axis: int) -> int | None:
        matches = re.compile(pattern).fullmatch
        return next(
            (int(shape[axis]) for name, shape in shapes.items() if len(shape) > axis and matches(name)), None
        )

    def has(test: Callable[[str], bool]) -> bool:
        return any(map(test, shapes))

    if not has(lambda k: k.startswith(UNET)):
        levels = {m[1] for k in shapes if (m := re.match(r"encoder\.down\.(\d+)\.", k))}
        return Traits(
            latent=size(r"post_quant_conv\.weight", 0), levels=len(levels) or None,
            codes=size(r"quantize\.(embedding|embed)\.weight", 0), attends=has(lambda k: k.startswith("encoder.mid.attn_1.")),
        )  # fmt: skip
    unet = re.escape(UNET)
    sgm = has(lambda k: k.startswith("conditioner.") or k == "denoiser.sigmas")
    return Traits(
        channels=size(rf"{unet}input_blocks\.0\.0\.weight", 1),
        width=size(rf"{unet}input_blocks\.0\.0\.weight", 0),
        context=size(rf"{unet}.*\.transformer_blocks\.0\.attn2\.to_k\.weight", 1),
        vector=size(rf"{unet}label_emb\.0\.0\.weight", 1),
        labels=size(rf"{unet}label_emb\.weight", 0),
        frames=has(lambda k: k.startswith(UNET) and ".time_stack." in k),
        views=has(lambda k: k.startswith(UNET) and ".time_mix_blocks." in k),
        motion=has(lambda k: k.startswith(UNET) and ".time_mixer_motion." in k),
        decoder_frames=has(lambda k: k.startswith("first_stage_model.decoder.") and "time_" in k),
        layout="sgm" if sgm else "ldm",
    )


def recognise(weights: Weights | Mapping[str, Tensor]) -> Recognised:
    """The published model that weights belong to.

    Args:
        weights: of a file, of which names, shapes and notes are read, or tensors.

    Raises:
        CheckpointError: they are of none, and the message says what they look like; or of one without a configuration.
    """
    lazily = weights if isinstance(weights, Weights) else None
    traits = traits_of(lazily.shapes if lazily else {k: tuple(v.shape) for k, v in weights.items()})
    found = [m for m in MODELS if all(getattr(traits, k) == v for k, v in m.traits.items())]
    if not found:
        seen = ", ".join(f"{k} {v}" for k, v in traits._asdict().items() if v not in (None, False))
        raise CheckpointError(
            f"the weights are of no published model that is known here ({seen or 'no UNet, no first stage'}); name their "
            "configuration (--config configs/….yaml)"
        )
    model = found[0]
    if model.config is None:
        raise CheckpointError(
            f"the weights are those of {model.name}, of which no configuration was published; name their own (--config ….yaml)"
        )
    predicts_v = _note_on_v(lazily.metadata) if lazily and model.twin else None
    if predicts_v is None:
        return Recognised(model.name, model.config, model.twin)
    return Recognised(model.name, model.twin if predicts_v and model.twin else model.config)


def _note_on_v(notes: Mapping[str, Any]) -> bool | None:
    """Whether the network predicts v, where the file says so (the "modelspec" notes of Stability AI); None if it does not."""
    said = f"{notes.get('modelspec.prediction_type', '')} {notes.get('modelspec.architecture', '')}".lower()
    words = set(re.split(r"[^a-z0-9]+", said))
    return True if "v" in words else False if words & {"epsilon", "eps"} else None


@torch.no_grad()
def predicts_v(model: Any) -> bool:
    """Whether a latent model's network predicts v rather than ε: one call at the last step, on noise alone.

    There ε is all but the input itself, while v = √ᾱ ε - √(1 - ᾱ) x_0 has next to nothing of it (√ᾱ = 0.07).
    """
    network: Any = model.model.diffusion_model
    like = next(network.parameters())
    width = next(m.to_k.in_features for name, m in network.named_modules() if name.endswith(".attn2"))
    noise = torch.randn(1, network.in_channels, 32, 32, generator=torch.Generator().manual_seed(0)).to(like)
    step = torch.tensor([999], device=like.device)
    out = network(noise, step, torch.zeros(1, 77, width).to(like)).float().flatten()
    x = noise[:, : network.out_channels].float().flatten()
    return bool(out @ x < 0.5 * (x @ x))


def published_config(config: str) -> Path:
    """A published configuration, in the working directory or in the checkout.

    Raises:
        FileNotFoundError: it is in neither.
    """
    places = [root / part for root in (Path(), CHECKOUT) for part in (config, f"configs/{config}")]
    places.append(CHECKOUT / "sgm" / config)  # an installed package
    if (found := next((p for p in places if p.is_file()), None)) is None:
        raise FileNotFoundError(f"there is no {config}, neither here nor in {CHECKOUT}")
    return found
