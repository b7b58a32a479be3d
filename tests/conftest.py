"""Fixtures that several test files share: tiny models, a denoiser with a known solution, offline perceptual networks."""

from __future__ import annotations

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torchvision

from ldm.models.diffusion.gaussian import GaussianSchedule

torch.set_num_threads(1)  # waiting for a second, busy core is slower than doing without


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class GaussianDenoiser(GaussianSchedule):
    """The exact denoiser of Gaussian data N(mean, std²): every sampler's error can be measured against the solution.

    x_t is Gaussian with mean √ᾱ m and variance ᾱ s² + 1 - ᾱ, and the probability-flow equation moves a point so that
    its standardised value stays the same.
    """

    def __init__(
        self, parameterization: str = "eps", timesteps: int = 4000, mean: float = 0.5, std: float = 0.7
    ):
        super().__init__()
        self.parameterization, self.v_posterior = parameterization, 0.0
        self.mean, self.std = mean, std
        scale = 1000 / timesteps
        self.register_schedule(timesteps=timesteps, linear_start=0.00085 * scale, linear_end=0.012 * scale)

    def noise(self, x, bar):
        return (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / (bar * self.std**2 + 1 - bar)

    def apply_model(self, x, t, cond=None):
        bar = self.alphas_cumprod[t.long()].reshape(-1, *((1,) * (x.ndim - 1)))
        eps = self.noise(x, bar)
        if self.parameterization == "eps":
            return eps
        start = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        return start if self.parameterization == "x0" else self.get_v(start, eps, t)

    def exact(self, x, bar_from, bar_to):
        """Where the probability flow takes x, from one ᾱ to another."""
        bar_from, bar_to = (torch.as_tensor(b, dtype=torch.float64) for b in (bar_from, bar_to))

        def spread(bar):
            return (bar * self.std**2 + 1 - bar).sqrt()

        standard = (x.double() - bar_from.sqrt() * self.mean) / spread(bar_from)
        return (bar_to.sqrt() * self.mean + spread(bar_to) * standard).float()


@pytest.fixture
def gaussian_denoiser():
    """The class: GaussianDenoiser(parameterization)."""
    return GaussianDenoiser


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """The features of a VGG-16 with random weights."""
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    with torch.device("meta"):
        features = torchvision.models.vgg16(weights=None, init_weights=False).features
    features = features.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in features.parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 100
        p.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return path


@pytest.fixture
def random_vgg(vgg_file, monkeypatch):
    """LPIPS over random weights from a local file, through the same door as real ones."""
    monkeypatch.setenv("TAMING_VGG16", str(vgg_file))
    return vgg_file


UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2], "num_res_blocks": 1,
        "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 8,
    },
}  # fmt: skip
DDCONFIG = {
    "double_z": True, "z_channels": 3, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 3,
        "lossconfig": {"target": "ldm.modules.losses.ReconstructionWithKL"},
        "ddconfig": DDCONFIG,
    },
}
TEXT = {
    "target": "ldm.modules.encoders.modules.BERTEmbedder",
    "params": {"n_embed": 8, "n_layer": 1, "vocab_size": 600, "max_seq_len": 16, "tokenizer": "bpe"},
}


def latent_diffusion_config(**params):
    """A tiny LatentDiffusion in pixel space, conditioned by whatever `params` say (default: a given context)."""
    unet = {**UNET, "params": {**UNET["params"], **params.pop("unet", {})}}
    full = {
        "unet_config": unet, "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": "torch.nn.Identity"}, "conditioning_key": "crossattn", "timesteps": 1000,
        "linear_start": 0.0015, "linear_end": 0.0195, "image_size": 8, "channels": 3, "use_ema": False, **params,
    }  # fmt: skip
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": full}


@pytest.fixture
def tiny():
    """Configurations of tiny models."""

    class Tiny:
        unet, kl, text, ddconfig = UNET, KL, TEXT, DDCONFIG
        latent_diffusion = staticmethod(latent_diffusion_config)

    return Tiny


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A small CLIP with random weights and vectors of 8 numbers, in a folder as open_clip saves its models."""
    import open_clip

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder
