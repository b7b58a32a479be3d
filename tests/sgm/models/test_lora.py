"""Low-rank adapters of engines: trained by the switch, read from SDXL's files, added by pipelines and scripts."""

import copy
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ldm.lora import Lora, inject, load_lora
from scripts import sample
from sgm.inference.api import SamplingParams, SamplingPipeline
from sgm.models.diffusion import DiffusionEngine
from sgm.models.notebook import default_parameters
from taming.checkpoint import (
    CheckpointError,
    load_into,
    load_model_from_config,
    load_state_dict,
    save_safetensors,
)
from taming.util import instantiate_from_config

PARTS, EMBEDDERS = "sgm.modules.diffusionmodules", "sgm.modules.encoders.modules"
UNET = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1, 2], "num_res_blocks": 1,
    "channel_mult": [1, 2], "num_head_channels": 16, "use_linear_in_transformer": True, "transformer_depth": [1, 2], "context_dim": 48,
    "num_classes": "sequential", "adm_in_channels": 48, "use_checkpoint": True,
}  # fmt: skip
CLIP = {
    "vocab_size": 600, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 77,
}  # fmt: skip
BIG = {
    "embed_dim": 24,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
}
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
SCALING = {"scaling_config": {"target": f"{PARTS}.denoiser_scaling.EpsScaling"}}
LEVELS = {"discretization_config": {"target": f"{PARTS}.discretizer.LegacyDDPMDiscretization"}}


def sdxl(**params):
    """SDXL's parts with few weights: two text encoders, three pairs of numbers, latents 8 times smaller than images."""
    texts = [
        {"target": f"{EMBEDDERS}.FrozenCLIPEmbedder", "params": {"version": CLIP, "device": "cpu", "layer": "hidden", "layer_idx": 2}},
        {
            "target": f"{EMBEDDERS}.FrozenOpenCLIPEmbedder2",
            "params": {"arch": BIG, "version": None, "device": "cpu", "legacy": False, "always_return_pooled": True},
        },
    ]  # fmt: skip
    numbers = [
        {"target": f"{EMBEDDERS}.ConcatTimestepEmbedderND", "input_key": key, "params": {"outdim": 4}}
        for key in SIZES
    ]
    ddconfig = {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    first_stage = {"embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig}
    weighting = {"target": f"{PARTS}.loss_weighting.EpsWeighting"}
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "network_config": {"target": f"{PARTS}.openaimodel.UNetModel", "params": UNET},
            "denoiser_config": {
                "target": f"{PARTS}.denoiser.DiscreteDenoiser",
                "params": {"num_idx": 1000, **SCALING, **LEVELS},
            },
            "conditioner_config": {
                "target": "sgm.modules.GeneralConditioner",
                "params": {"emb_models": [*({**text, "input_key": "txt"} for text in texts), *numbers]},
            },
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
            "sampler_config": {
                "target": f"{PARTS}.sampling.EulerEDMSampler",
                "params": {"num_steps": 2, **LEVELS},
            },
            "loss_fn_config": {
                "target": f"{PARTS}.loss.StandardDiffusionLoss",
                "params": {
                    "loss_weighting_config": weighting,
                    "sigma_sampler_config": {
                        "target": f"{PARTS}.sigma_sampling.DiscreteSampling",
                        "params": {"num_idx": 1000, **LEVELS},
                    },
                },
            },
            **params,
        },
    }


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of `sdxl`, whose layers all contribute, under the name of SDXL 1.0's."""
    torch.manual_seed(0)
    model = instantiate_from_config(sdxl())
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5) if p.ndim > 1 else p.data.add_(0.05)
    folder = tmp_path_factory.mktemp("sdxl")
    torch.save({"state_dict": model.state_dict()}, folder / "model.ckpt")
    save_safetensors(model.state_dict(), folder / "sd_xl_base_1.0.safetensors")
    for name in ("config.yaml", "sd_xl_base.yaml"):
        OmegaConf.save(OmegaConf.create({"model": sdxl()}), folder / name)
    return folder


def built(weights, **params):
    return instantiate_from_config(sdxl(ckpt_path=str(weights / "model.ckpt"), **params)).eval()


def batch_of(n):
    return {"jpg": torch.full((n, 3, 32, 32), 0.5), "txt": ["red heart"] * n, **{key: torch.full((n, 2), 32.0) for key in SIZES}}  # fmt: skip


@torch.no_grad()
def answer(model):
    """The estimate of x_0 for fixed noise under the condition of a text."""
    cond, _ = model.conditioner.get_unconditional_conditioning(batch_of(2))
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return model.denoise(x, torch.tensor([0.5, 3.0]), cond)


def shaken(lora):
    """As after a training: B is not zero."""
    for p in lora.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lora


def close(one, other):
    return torch.allclose(one, other, atol=2e-4 * float(other.abs().max()))


# ------------------------------------------------------------------------------------------------------------ training


def fit(model, folder, epochs=1, **options):
    model.learning_rate = 1e-2
    checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="last", save_last=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoint],
    )  # fmt: skip
    data = [{k: v[0] for k, v in batch_of(1).items()}] * 4
    trainer.fit(model, DataLoader(data, batch_size=2), **options)
    return folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_switch_trains_adapters_alone_and_they_load_onto_the_plain_model(weights, text_encoder, tmp_path):
    switch = {"rank": 4, "text_encoder": text_encoder}
    model, plain = built(weights, lora_config=switch), built(weights).requires_grad_(False)
    assert torch.equal(answer(model), answer(plain))  # B begins as zero
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.lora.parameters()}
    before = answer(plain)
    path = fit(model, tmp_path, epochs=2)
    state = plain.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if not k.startswith("lora."))
    moved = {name for name, adapter in model.lora.items() if adapter.lora_up.weight.any()}
    assert moved == set(model.lora)  # gradients reach all, through checkpointed blocks and both text encoders
    parts = {name.split("_")[1] for name in moved}
    assert parts == ({"unet", "te1", "te2"} if text_encoder else {"unet"})
    trained = answer(model)
    assert not close(trained, before)

    # the published names and nothing else, so that it loads without LoRA; then the file beside it
    plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    lora = load_lora(plain, tmp_path / "lora.safetensors")
    assert not lora.unused and close(answer(plain), trained)
    lora.merge()
    assert close(answer(plain), trained)
    lora.unmerge()
    assert torch.equal(answer(plain.requires_grad_(False)), before)
    # the checkpoint with the switch
    again = built(weights, lora_config=switch)
    assert load_into(again, load_state_dict(path), strict=True) == ([], []) and close(answer(again), trained)
    reloaded = load_model_from_config(OmegaConf.create({"model": sdxl(lora_config=switch)}), path)
    assert close(answer(reloaded), trained)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_a_checkpoint(weights, tmp_path):
    model = built(weights, lora_config={"rank": 2})
    path = fit(model, tmp_path)
    again = built(weights, lora_config={"rank": 2})
    fit(again, tmp_path / "more", ckpt_path=path)  # one epoch in all: nothing is left to do
    assert isinstance(again.lora, Lora) and again.lora.state_dict().keys() == model.lora.state_dict().keys()
    assert all(torch.equal(v, again.lora.state_dict()[k]) for k, v in model.lora.state_dict().items())
    assert all(name.startswith(("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")) for name in load_file(tmp_path / "lora.safetensors"))  # fmt: skip


def test_what_the_switch_cannot_do_is_refused(weights):
    with pytest.raises(ValueError, match="set use_ema to False"):
        built(weights, lora_config={}, use_ema=True)
    with pytest.raises(ValueError, match="no option 'rnak'. Did you mean 'rank'"):
        built(weights, lora_config={"rnak": 4})
    with pytest.raises(ValueError, match=r"no embedder holds a text encoder of CLIP: they are \['SmallTextEmbedder'\]"):  # fmt: skip
        DiffusionEngine(**default_parameters(model_channels=32, num_heads=4, lora_config={"text_encoder": True}))  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("layout", ["kohya", "kohya-ldm", "diffusers"])
def test_files_for_sdxl_are_read_in_every_layout(weights, layout, tmp_path):
    model = built(weights)
    plain = answer(model)
    lora = shaken(inject(model, rank=2, alpha=5, targets=["*"], text_encoder=True))
    expected = answer(model)
    lora.save(tmp_path / "lora.safetensors", layout)
    fresh = built(weights)
    again = load_lora(fresh, tmp_path / "lora.safetensors")
    assert len(again) == len(lora) and not again.unused
    assert close(answer(fresh), expected) and not close(plain, expected)


@pytest.fixture
def style(weights, tmp_path, monkeypatch):
    """A file of adapters for all three networks, in the layout of SDXL's."""
    monkeypatch.chdir(tmp_path)
    lora = shaken(inject(built(weights), rank=2, text_encoder=True))
    lora.save(tmp_path / "style.safetensors", "kohya-ldm")
    return "style.safetensors"


def test_a_pipeline_draws_with_adapters_as_strong_as_asked(weights, style):
    params = SamplingParams(steps=2, width=32, height=32, orig_width=32, orig_height=32)
    drawn = {}
    for strength in (None, 0.0, 1.0):
        lora = None if strength is None else {style: strength}
        pipeline = SamplingPipeline("stable-diffusion-xl-v1-base", weights, weights, device="cpu", lora=lora)
        torch.manual_seed(3)
        drawn[strength] = pipeline.text_to_image(params, "red heart")
    assert torch.equal(drawn[None], drawn[0.0]) and not torch.allclose(drawn[0.0], drawn[1.0], atol=1e-2)
    with pytest.raises(FileNotFoundError, match="absent"):
        SamplingPipeline("stable-diffusion-xl-v1-base", weights, weights, device="cpu", lora={"absent.safetensors": 1.0})  # fmt: skip


def test_the_script_draws_with_adapters_and_says_so_in_the_picture(weights, style, capsys):
    argv = ["--ckpt", str(weights / "model.ckpt"), "--config", str(weights / "config.yaml"), "--prompt", "red heart", "--steps", "2"]  # fmt: skip
    argv += ["--H", "32", "--W", "32", "--n_samples", "1", "--device", "cpu", "--outdir"]
    made = {}
    for name, flags in {"plain": [], "off": [f"--lora={style}:0"], "on": [f"--lora={style}:0.8"]}.items():
        assert sample.main([*argv, name, *flags]) == 0
        made[name] = Image.open(next(Path(name, "samples").iterdir()))
    assert made["plain"].tobytes() == made["off"].tobytes() != made["on"].tobytes()
    assert made["on"].text["lora"] == f"{style}:0.8" and "lora" not in made["plain"].text
    assert sample.main([*argv, "absent", "--lora=absent.safetensors"]) == 2
    assert "absent.safetensors" in capsys.readouterr().err


def test_a_file_for_another_model_is_refused_and_changes_nothing(weights, style):
    other = copy.deepcopy(sdxl())
    other["params"]["network_config"]["params"] = {**UNET, "model_channels": 64}
    model = instantiate_from_config(other).eval()
    before = answer(model)
    with pytest.raises(CheckpointError, match="SD 1, SD 2 and SDXL have LoRAs of their own"):
        load_lora(model, style)
    assert torch.equal(answer(model), before)
