"""Tiny trained-looking models of the conditioned kinds, in folders as runs leave them."""

import functools
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from taming.data import emoji
from taming.util import instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"use_spatial_transformer": False, "context_dim": None}
DDPM = "ldm.models.diffusion.ddpm"


@pytest.fixture(scope="module")
def emoji_opened_once():
    """The data set opens all 1,620 pictures whenever it is built; the tests of a file share one reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "load_emoji", functools.cache(emoji.load_emoji))
        yield


@pytest.fixture
def script():
    """Import scripts/<name>.py."""
    sys.path.insert(0, str(ROOT))
    return lambda name: importlib.import_module(f"scripts.{name}")


@pytest.fixture
def kinds(tiny, clip_folder):
    """Configurations: text, depth, upscaling, unknown damage, inpainting and embeddings; all over a first stage of factor 2 but one."""
    text = {"cond_stage_config": tiny.text, "cond_stage_key": "caption"}

    def config(target, unet, **params):
        return {
            **tiny.latent_diffusion(**{"first_stage_config": tiny.kl, "unet": unet, **text, **params}),
            "target": f"{DDPM}.{target}",
        }

    vq = {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "embed_dim": 3, "n_embed": 16, "lossconfig": {"target": "torch.nn.Identity"},
            "ddconfig": {**tiny.ddconfig, "double_z": False, "ch_mult": [1, 1, 1]},
        },
    }  # fmt: skip
    clip = OmegaConf.load(clip_folder / "open_clip_config.json").model_cfg
    embedder = {
        "target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder",
        "params": {"arch": OmegaConf.to_container(clip), "version": None},
    }
    noise = {"noise_schedule_config": {"timesteps": 100}, "max_noise_level": 60}
    return {
        "text": config("LatentDiffusion", {}, cond_stage_trainable=True),
        "depth": config(
            "LatentDepth2ImageDiffusion", {"in_channels": 4}, finetune_keys=None, conditioning_key="hybrid",
            depth_stage_config={"target": "torch.nn.Conv2d", "params": {"in_channels": 3, "out_channels": 1, "kernel_size": 1}},
        ),
        "enlarge": config(
            "LatentUpscaleDiffusion", {"in_channels": 6, "num_classes": 100}, conditioning_key="hybrid-adm",
            low_scale_config={
                "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation", "params": noise,
            },
        ),
        "restore": config(
            "LatentDiffusion", {"in_channels": 6, **PLAIN}, first_stage_config=vq, cond_stage_key="LR_image", concat_mode=True,
            conditioning_key=None, cond_stage_config={"target": "torch.nn.Identity"},
        ),
        "inpaint": config("LatentInpaintDiffusion", {"in_channels": 7}, finetune_keys=None, conditioning_key="hybrid"),
        "vary": config(
            "ImageEmbeddingConditionedLatentDiffusion", {"num_classes": "sequential", "adm_in_channels": 16},
            conditioning_key="crossattn-adm", embedder_config=embedder,
            noise_aug_config={
                "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation", "params": {**noise, "timestep_dim": 8},
            },
        ),
    }  # fmt: skip


@pytest.fixture
def build(kinds):
    """A model by kind, whose last layer is no longer zero."""

    def made(kind):
        model = instantiate_from_config(OmegaConf.create(kinds[kind])).eval()
        torch.nn.init.normal_(model.model.diffusion_model.out[2].weight, std=0.1)
        return model

    return made


@pytest.fixture
def run_folder(build, kinds, tmp_path):
    """Write a model of a kind as a run's folder; returns it."""

    def made(kind):
        folder = tmp_path / "runs" / kind
        folder.mkdir(parents=True)
        OmegaConf.save(OmegaConf.create({"model": kinds[kind]}), folder / "config.yaml")
        torch.save({"state_dict": build(kind).state_dict(), "global_step": 1}, folder / "model.ckpt")
        return folder

    return made


@pytest.fixture
def picture(tmp_path, monkeypatch):
    """init.png, 18×11 pixels of noise, in the working directory."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.RandomState(0).randint(0, 256, (11, 18, 3), dtype=np.uint8)
    Image.fromarray(noise).save("init.png")
    return Image.open("init.png").convert("RGB")
