"""One checkpoint of Stable Diffusion 2.1's shape, small, under the engines of both chapters."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from sgm.modules.diffusionmodules.sampling import DPMPP2MSampler
from sgm.modules.diffusionmodules.wrappers import LatentDiffusionDenoiser
from sgm.util import load_model_from_config

LAYERS = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
STAGE = {
    "embed_dim": 4,
    "ddconfig": LAYERS,
    "lossconfig": {"target": "torch.nn.Identity"},
    "monitor": "val/rec_loss",
}
NETWORK = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2, 1], "num_res_blocks": 1, "channel_mult": [1, 2],
    "num_head_channels": 16, "use_linear_in_transformer": True, "transformer_depth": 1, "context_dim": 8,
}  # fmt: skip
BASE = "sgm.modules.diffusionmodules."
LEGACY = {"target": BASE + "discretizer.LegacyDDPMDiscretization"}
SCALINGS = {"eps": "EpsScaling", "v": "VScaling"}


def latent_diffusion(parameterization):
    torch.manual_seed(0)
    unet = {"image_size": 8, **NETWORK, "use_spatial_transformer": True, "legacy": False}
    model = LatentDiffusion(
        unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        first_stage_config={"target": "ldm.models.autoencoder.AutoencoderKL", "params": STAGE},
        cond_stage_config={
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"embed_dim": 8, "n_classes": 5, "key": "cls"},
        },
        cond_stage_key="cls", conditioning_key="crossattn", parameterization=parameterization, linear_start=0.00085, linear_end=0.0120,
        image_size=8, channels=4, scale_factor=0.18215, use_ema=False,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.model.parameters():  # the last layers are zero when made
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def engine_config(parameterization):
    denoiser = {
        "num_idx": 1000, "scaling_config": {"target": f"{BASE}denoiser_scaling.{SCALINGS[parameterization]}"},
        "discretization_config": LEGACY,
    }  # fmt: skip
    classes = {
        "input_key": "cls", "target": "sgm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 5, "add_sequence_dim": True},
    }  # fmt: skip
    params = {
        "scale_factor": 0.18215, "disable_first_stage_autocast": True,
        "network_config": {"target": BASE + "openaimodel.UNetModel", "params": NETWORK},
        "denoiser_config": {"target": BASE + "denoiser.DiscreteDenoiser", "params": denoiser},
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [classes]}},
        "first_stage_config": {"target": "sgm.models.autoencoder.AutoencoderKL", "params": STAGE},
    }  # fmt: skip
    return OmegaConf.create({"model": {"target": "sgm.models.DiffusionModel", "params": params}})


@pytest.fixture(params=sorted(SCALINGS))
def both(request, tmp_path):
    """A model of `ldm`, and the engine that was given its checkpoint."""
    theirs = latent_diffusion(request.param)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "model.ckpt")
    return theirs, load_model_from_config(engine_config(request.param), tmp_path / "model.ckpt")


def test_a_checkpoint_of_chapter_two_fills_the_engine_without_a_remainder(tmp_path, caplog):
    theirs = latent_diffusion("eps")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": theirs.state_dict()}, path)
    with caplog.at_level("INFO"):
        ours = load_model_from_config(engine_config("eps"), path)
    assert "missing" not in caplog.text and "left over" not in caplog.text and "no weights" not in caplog.text
    assert torch.equal(
        ours.conditioner.embedders[0].embedding.weight, theirs.cond_stage_model.embedding.weight
    )


def test_ddim_draws_the_same_image_under_both_engines(both):
    theirs, ours = both
    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 3])
    c, uc = (theirs.get_learned_conditioning({"cls": given}) for given in (labels, torch.tensor([4, 4])))
    samples, _ = DDIMSampler(theirs).sample(
        5,
        2,
        (4, 8, 8),
        c,
        x_T=noise,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=uc,
        verbose=False,
    )
    expected = theirs.decode_first_stage(samples)
    z = ours.sample(
        noise, condition=labels, unconditional=4, num_steps=5, guidance_scale=3.0, sampler="ddim", eta=0.0
    )
    assert torch.allclose(ours.first_stage_model.decode(z), expected, atol=1e-4)
    assert float(expected.std()) > 0.01


def test_dpm_solver_draws_the_same_image_under_both_engines(both):
    theirs, ours = both
    noise = torch.randn(1, 4, 8, 8)
    denoiser = LatentDiffusionDenoiser(theirs)
    sampler = DPMPP2MSampler(LEGACY, num_steps=6)
    expected = theirs.decode_first_stage(
        sampler(denoiser, noise, theirs.get_learned_conditioning({"cls": torch.tensor([2])}))
    )
    ours.sampler = sampler
    z = ours.sample(noise, condition=2)
    assert torch.allclose(ours.decode_first_stage(ours.scale_factor * z), expected, atol=1e-4)
