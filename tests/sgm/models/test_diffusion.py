"""The engine: what goes through its first stage, its checkpoints, its training, its pictures."""

import logging
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from sgm.models.diffusion import DiffusionEngine
from sgm.modules.autoencoding.temporal_ae import VideoDecoder
from sgm.util import append_dims, instantiate_from_config
from taming.checkpoint import CheckpointError

SVD = Path(__file__).resolve().parents[2] / "scripts/video/svd.yaml"
BASE = "sgm.modules.diffusionmodules."
EMBEDDERS = "sgm.modules.encoders.modules."
NETWORK = {
    "in_channels": 1, "out_channels": 1, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1, "channel_mult": [1],
    "num_head_channels": 32, "num_classes": "sequential", "adm_in_channels": 8, "use_scale_shift_norm": True,
}  # fmt: skip
CLASSES = {
    "input_key": "cls", "is_trainable": True, "ucg_rate": 0.2, "target": EMBEDDERS + "ClassEmbedder",
    "params": {"embed_dim": 8, "n_classes": 10},
}  # fmt: skip
PARAMS = {
    "network_config": {"target": BASE + "openaimodel.UNetModel", "params": NETWORK},
    "denoiser_config": {
        "target": BASE + "denoiser.Denoiser", "params": {"scaling_config": {"target": BASE + "denoiser_scaling.EDMScaling"}},
    },
    "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [CLASSES]}},
    "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
}  # fmt: skip
SAMPLER = {
    "target": BASE + "sampling.EulerEDMSampler",
    "params": {
        "num_steps": 2, "discretization_config": {"target": BASE + "discretizer.EDMDiscretization"},
        "guider_config": {"target": BASE + "guiders.VanillaCFG", "params": {"scale": 2.0}},
    },
}  # fmt: skip
LOSS = {
    "target": BASE + "loss.StandardDiffusionLoss",
    "params": {
        "sigma_sampler_config": {"target": BASE + "sigma_sampling.EDMSampling"},
        "loss_weighting_config": {"target": BASE + "loss_weighting.EDMWeighting"},
    },
}

VIDEO_LOSS = {**LOSS, "params": {**LOSS["params"], "batch2model_keys": ["num_video_frames"]}}
CLIPS = {
    "target": BASE + "video_model.VideoUNet",
    "params": {
        "in_channels": 1, "out_channels": 1, "model_channels": 32, "attention_resolutions": [], "num_res_blocks": 1, "channel_mult": [1],
        "num_head_channels": 32, "context_dim": 8, "video_kernel_size": [3, 1, 1],
    },
}  # fmt: skip


def engine(**options):
    torch.manual_seed(0)
    return DiffusionEngine(**{**PARAMS, **options})


def batch_of(n, **more):
    torch.manual_seed(1)
    return {"jpg": torch.rand(n, 1, 8, 8) * 2 - 1, "cls": torch.arange(n), **more}


class Doubling(nn.Module):
    """A first stage that doubles, and remembers the batches that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.seen = []

    def encode(self, x):
        self.seen.append((len(x), x.dtype))
        return x * self.weight

    def decode(self, z):
        self.seen.append((len(z), z.dtype))
        return z / self.weight


# ---------------------------------------------------------------------------------------------------- first stage


def test_latents_are_scaled_after_encoding_and_before_decoding():
    model = engine(scale_factor=0.5)
    model.first_stage_model = Doubling()
    x = batch_of(3)["jpg"]
    assert torch.equal(model.encode_first_stage(x), x)
    assert torch.equal(model.decode_first_stage(x), x)


def test_chunks_go_through_the_first_stage_one_after_another_and_give_the_same():
    model = engine(en_and_decode_n_samples_a_time=2)
    model.first_stage_model = Doubling()
    x = batch_of(5)["jpg"]
    assert torch.equal(model.encode_first_stage(x), 2 * x)
    assert [n for n, _ in model.first_stage_model.seen] == [2, 2, 1]


def test_a_decoder_of_video_is_told_how_many_frames_its_chunk_has():
    """Stable Video Diffusion's parts, tiny: each chunk is a clip of its own to the temporal layers."""
    config = OmegaConf.load(SVD)
    config.model.params.en_and_decode_n_samples_a_time = 3
    del config.model.params.sampler_config  # the video scripts fill it in
    model, told = instantiate_from_config(config.model).eval(), []
    decoder = model.first_stage_model.decoder
    assert isinstance(decoder, VideoDecoder)
    decoder.register_forward_pre_hook(
        lambda _, z, options: told.append((len(z[0]), options)), with_kwargs=True
    )
    z = torch.randn(7, 4, 2, 2)
    decoded = model.decode_first_stage(z)
    assert told == [(n, {"timesteps": n}) for n in (3, 3, 1)]
    clips = [decoder(part, timesteps=len(part)) for part in (z / model.scale_factor).split(3)]
    assert torch.equal(decoded, torch.cat(clips))
    model.en_and_decode_n_samples_a_time = None
    whole = model.decode_first_stage(z)
    assert told[-1] == (7, {"timesteps": 7})
    # frames see each other: the seam of two chunks shows, the first frame's neighbourhood does not
    assert not torch.allclose(whole[3], decoded[3], atol=1e-4)


def test_a_first_stage_of_chapter_two_is_drawn_from():
    small = {
        "double_z": True, "z_channels": 2, "resolution": 8, "in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": [1], "num_res_blocks": 1,
        "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    stage = {"embed_dim": 2, "ddconfig": small, "lossconfig": {"target": "taming.modules.losses.DummyLoss"}}
    model = engine(first_stage_config={"target": "ldm.models.autoencoder.AutoencoderKL", "params": stage})
    x = batch_of(2)["jpg"]
    torch.manual_seed(3)
    z = model.encode_first_stage(x)
    torch.manual_seed(3)
    assert torch.equal(z, model.first_stage_model.encode(x).sample())


def test_the_first_stage_stays_frozen_and_in_eval_mode():
    stage = {"target": "torch.nn.Conv2d", "params": {"in_channels": 1, "out_channels": 1, "kernel_size": 1}}
    model = engine(first_stage_config=stage).train()
    assert model.training and not model.first_stage_model.training
    assert not any(p.requires_grad for p in model.first_stage_model.parameters())


@pytest.mark.parametrize(("disabled", "expected"), [(True, torch.float32), (False, torch.bfloat16)])
def test_autocast_reaches_the_first_stage_unless_it_is_disabled(disabled, expected):
    class Stage(Doubling):
        def decode(self, z):
            return nn.functional.conv2d(z, self.weight.reshape(1, 1, 1, 1))

    model = engine(disable_first_stage_autocast=disabled)
    model.first_stage_model = Stage()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.decode_first_stage(batch_of(1)["jpg"]).dtype == expected


def test_latents_of_half_precision_are_decoded_in_the_precision_of_the_weights():
    model = engine(disable_first_stage_autocast=True)
    model.first_stage_model = Doubling()
    model.decode_first_stage(batch_of(1)["jpg"].half())
    assert model.first_stage_model.seen == [(1, torch.float32)]


def test_a_batch_without_pictures_is_refused_by_name():
    with pytest.raises(KeyError, match="jpg"):
        engine().get_input({"jpeg": torch.zeros(1)})


# -------------------------------------------------------------------------------------------------------- weights


def test_an_engine_without_configurations_of_its_parts_is_unconditional_and_cannot_train():
    model = engine(conditioner_config=None, network_config={"target": "torch.nn.Identity"})
    assert len(model.conditioner.embedders) == 0
    with pytest.raises(ValueError, match="sampler_config"):
        model.on_train_start()
    model = engine(sampler_config=SAMPLER)
    with pytest.raises(ValueError, match="loss_fn_config"):
        model.on_train_start()


def test_a_compiled_network_keeps_its_names():
    assert engine(compile_model=True).state_dict().keys() == engine().state_dict().keys()


def test_the_averages_are_named_after_the_wrappers_parameters():
    names = {k for k in engine(use_ema=True).state_dict() if k.startswith("model_ema.")}
    assert {"model_ema.diffusion_modelout2weight", "model_ema.decay", "model_ema.num_updates"} <= names


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_weights_come_from_either_kind_of_file_and_what_is_missing_is_said(tmp_path, caplog, ending):
    from taming.checkpoint import save_checkpoint, save_safetensors

    state = engine().state_dict()
    changed = {k: v + 1 for k, v in state.items() if not k.startswith("conditioner.")}
    path = str(tmp_path / f"weights.{ending}")
    if ending == "ckpt":
        save_checkpoint({"state_dict": changed}, path)
    else:
        save_safetensors(changed, path)
    with caplog.at_level(logging.INFO):
        loaded = engine(ckpt_path=path).state_dict()
    assert all(torch.equal(loaded[k], changed.get(k, state[k])) for k in state)
    assert "1 missing (conditioner 1)" in caplog.text


def test_other_files_and_other_shapes_are_refused(tmp_path):
    with pytest.raises(NotImplementedError, match="safetensors"):
        engine(ckpt_path=str(tmp_path / "weights.pt"))
    torch.save({"model.diffusion_model.out.2.bias": torch.zeros(7)}, tmp_path / "wrong.ckpt")
    with pytest.raises(CheckpointError, match="out.2.bias"):
        engine(ckpt_path=str(tmp_path / "wrong.ckpt"))


# ------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_mean_over_the_batch_and_the_batch_learns_the_step():
    model = engine(loss_fn_config=LOSS).eval()
    batch, same = batch_of(4), batch_of(4)
    torch.manual_seed(2)
    loss, log = model.shared_step(batch)
    torch.manual_seed(2)
    each = model.loss_fn(model.model, model.denoiser, model.conditioner, batch["jpg"], same)
    assert torch.equal(loss, each.mean()) and log == {"loss": loss}
    assert batch["global_step"] == 0


def test_optimizer_options_come_from_the_configuration():
    sgd = {"target": "torch.optim.SGD", "params": {"momentum": 0.9}}
    schedule = {
        "target": "sgm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [4],
            "cycle_lengths": [10],
            "f_start": [0.5],
            "f_max": [1.0],
            "f_min": [0.1],
        },
    }
    model = engine(optimizer_config=sgd, scheduler_config=schedule)
    model.learning_rate = 0.1
    (optimizer,), (multiplier,) = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05) and multiplier["interval"] == "step"


def test_frozen_embedders_are_not_trained():
    frozen = {**CLASSES, "is_trainable": False}
    config = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [frozen]}}
    free, fixed = engine(), engine(conditioner_config=config)
    assert len(free.trained_parameters()) == len(fixed.trained_parameters()) + 1


def test_a_run_moves_weights_and_averages_and_resumes_where_it_was(tmp_path):
    def run(model, steps, ckpt=None):
        pl.seed_everything(4)
        model.learning_rate = 1e-2
        data = [{"jpg": torch.full((1, 8, 8), -0.5), "cls": 1}] * 8
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=ckpt)
        return trainer

    options = {"sampler_config": SAMPLER, "loss_fn_config": LOSS, "use_ema": True, "ema_decay_rate": 0.5}
    first, model = engine(**options).model.diffusion_model.out[2].weight.detach().clone(), engine(**options)
    trainer = run(model, 2)
    live = model.model.diffusion_model.out[2].weight.detach().clone()
    assert not torch.equal(live, first) and int(model.model_ema.num_updates) == 2
    with model.ema_scope():
        averaged = model.model.diffusion_model.out[2].weight.detach().clone()
    assert 0 < float((averaged - first).norm()) < float((live - first).norm())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = engine(**options)
    assert run(again, 3, str(tmp_path / "half.ckpt")).global_step == 3
    assert int(again.model_ema.num_updates) == 3


def test_a_network_learns_a_single_picture():
    """Known x_0: the best estimate at any σ is the picture itself, so the loss falls far below that of the first step."""
    model = engine(loss_fn_config=LOSS)
    model.learning_rate = 3e-3
    optimizer = model.configure_optimizers()
    losses = []
    for _ in range(25):
        batch = {"jpg": torch.full((8, 1, 8, 8), 0.5), "cls": torch.zeros(8, dtype=torch.long)}
        loss, _ = model.shared_step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


# ----------------------------------------------------------------------------------------------- samples, pictures


def test_noise_is_drawn_from_the_seed_on_the_cpu():
    model = engine()
    seen = {}
    model.sampler = lambda denoiser, x, cond, uc=None: seen.update(x=x, uc=uc) or x
    torch.manual_seed(9)
    model.sample({}, uc={"a": 1}, batch_size=2, shape=(1, 8, 8))
    torch.manual_seed(9)
    assert torch.equal(seen["x"], torch.randn(2, 1, 8, 8)) and seen["uc"] == {"a": 1}


def test_sampling_says_what_it_lacks():
    with pytest.raises(ValueError, match="shape"):
        engine(sampler_config=SAMPLER).sample({})
    with pytest.raises(ValueError, match="sampler_config"):
        engine().sample({}, shape=(1, 8, 8))


def test_samples_of_a_known_gaussian_have_its_spread():
    """x_0 ~ N(0, s²) has the exact denoiser x s² / (s² + σ²), put in the place of the model's."""
    model = engine(sampler_config=SAMPLER, conditioner_config=None)
    model.sampler.guider = instantiate_from_config({"target": BASE + "guiders.IdentityGuider"})
    model.sampler.num_steps = 200
    model.denoise = lambda x, sigma, cond: x * append_dims(0.25 / (0.25 + sigma**2), x.ndim)
    torch.manual_seed(0)
    assert float(model.sample({}, batch_size=64, shape=(1, 8, 8)).std()) == pytest.approx(0.5, rel=0.04)


def test_pictures_show_inputs_conditions_and_samples():
    sizes = {"input_key": "size", "target": EMBEDDERS + "ConcatTimestepEmbedderND", "params": {"outdim": 4}}
    config = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [CLASSES, sizes]}}
    network = {"target": BASE + "openaimodel.UNetModel", "params": {**NETWORK, "adm_in_channels": 16}}
    model = engine(sampler_config=SAMPLER, conditioner_config=config, network_config=network).eval()
    batch = batch_of(4, size=torch.tensor([[8, 8]] * 4))
    log = model.log_images(batch, N=3, split="train", n_rows=2)
    assert list(log) == ["inputs", "reconstructions", "cls", "size", "samples"]
    assert all(len(pictures) == 3 for pictures in log.values())
    assert log["cls"].shape == (3, 3, 8, 8)
    model.log_keys = ["cls"]
    assert list(model.log_images(batch, sample=False)) == ["inputs", "reconstructions", "cls"]
    model.no_cond_log = True
    assert list(model.log_images(batch, sample=False)) == ["inputs", "reconstructions"]
    with pytest.raises(AssertionError, match="txt"):
        model.log_images(batch, ucg_keys=["txt"])


@pytest.mark.parametrize(("wanted", "shown"), [(8, 6), (2, 3), (3, 3), (99, 9)])
def test_pictures_of_clips_are_whole_clips(wanted, shown):
    """Three clips of three frames; a network of video takes nothing else."""
    label = {**CLASSES, "params": {**CLASSES["params"], "add_sequence_dim": True}}
    conditioner = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [label]}}
    model = engine(
        sampler_config=SAMPLER,
        conditioner_config=conditioner,
        network_config=CLIPS,
        loss_fn_config=VIDEO_LOSS,
        no_cond_log=True,
    )
    batch = {"jpg": torch.rand(9, 1, 8, 8), "cls": torch.arange(9) // 3, "num_video_frames": 3}
    log = model.eval().log_images(batch, N=wanted)
    assert {k: len(v) for k, v in log.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "samples"), shown
    )


def test_conditions_are_drawn_by_their_kind():
    identity = {"input_key": "given", "target": EMBEDDERS + "IdentityEncoder"}
    model = engine(
        conditioner_config={"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [identity]}}
    )
    picture = torch.rand(2, 3, 4, 4)
    pictures = {"jpg": torch.zeros(2, 3, 64, 64)}
    assert model.log_conditionings({**pictures, "given": ["a", "b"]}, 2)["given"].shape == (2, 3, 64, 64)
    assert torch.equal(model.log_conditionings({**pictures, "given": picture}, 2)["given"], picture)
    labels = model.log_conditionings({**pictures, "given": torch.tensor([3, 3])}, 2)["given"]
    assert torch.equal(labels[0], labels[1]) and float(labels.min()) < 0 < float(labels.max())
    with pytest.raises(NotImplementedError, match="no_cond_log"):
        model.log_conditionings({**pictures, "given": torch.zeros(2, 5, 6)}, 2)
