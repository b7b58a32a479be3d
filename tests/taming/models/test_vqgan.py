"""Every vector-quantised first stage: trained by a real Trainer, resumed, and what each has of its own."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from taming.models.vqgan import EMAVQ, GumbelVQ, VQModel, VQNoDiscModel, VQSegmentationModel
from taming.modules.vqvae.quantize import FSQ, LFQ, VectorQuantizer2
from taming.util import ConfigError, instantiate_from_config

QUANTIZE = "taming.modules.vqvae.quantize"
GAN = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 1, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0},
}
BCE = {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}
NONE = {"target": "taming.modules.losses.DummyLoss"}
COOLING = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {"warm_up_steps": 0, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 0.1, "max_decay_steps": 4},
}


class Pixels(torch.nn.Module):
    """A loss as VQNoDiscModel calls it."""

    def forward(self, codebook_loss, inputs, reconstructions, global_step, split):
        rec = (inputs - reconstructions).abs().mean()
        return rec + codebook_loss, {
            f"{split}/rec_loss": rec.detach(),
            f"{split}/batches": float(global_step),
        }


def ddconfig(z=4, channels=3):
    return {
        "double_z": False, "z_channels": z, "resolution": 16, "in_channels": channels, "out_ch": channels, "ch": 32, "ch_mult": [1, 1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def quantizer(name, **params):
    return {"target": f"{QUANTIZE}.{name}", "params": params}


MODELS = {
    "VQModel": lambda **o: VQModel(ddconfig(), GAN, 8, 4, **o),
    "VQSegmentationModel": lambda **o: VQSegmentationModel(5, ddconfig(channels=5), BCE, 8, 4, image_key="segmentation", **o),
    "VQNoDiscModel": lambda **o: VQNoDiscModel(ddconfig(), {"target": f"{__name__}.Pixels"}, 8, 4, **o),
    "GumbelVQ": lambda **o: GumbelVQ(ddconfig(), GAN, 8, 4, temperature_scheduler_config=COOLING, **o),
    "EMAVQ": lambda **o: EMAVQ(ddconfig(), GAN, 8, 4, **o),
    "angles": lambda **o: VQModel(ddconfig(), GAN, 8, 4, quantizer_config=quantizer("VectorQuantizer2", n_e=8, e_dim=4, beta=0.25, l2_norm=True), **o),
    "FSQ": lambda **o: VQModel(ddconfig(), GAN, 60, 3, quantizer_config=quantizer("FSQ", levels=[5, 4, 3]), **o),
    "LFQ": lambda **o: VQModel(ddconfig(), GAN, 16, 4, quantizer_config=quantizer("LFQ", bits=4), **o),
}  # fmt: skip
every = pytest.mark.parametrize("name", MODELS)


def build(name, **options):
    torch.manual_seed(1)
    model = MODELS[name](**options)
    model.learning_rate = 1e-3
    return model


class Batches(torch.utils.data.Dataset):
    """Pictures and label maps."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        labels = torch.randint(0, 5, (16, 16), generator=generator)
        return {
            "image": torch.rand(16, 16, 3, generator=generator) * 2 - 1,
            "segmentation": F.one_hot(labels, 5).float(),
        }


def fit(model, steps, n=8, ckpt_path=None, callbacks=()):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        max_epochs=steps, callbacks=list(callbacks), num_sanity_val_steps=0,
    )  # fmt: skip
    data = (DataLoader(Batches(n), batch_size=2), DataLoader(Batches(4), batch_size=2))
    trainer.fit(model, *data, ckpt_path=ckpt_path)
    return trainer


class History(pl.Callback):
    """What each training batch logged."""

    def __init__(self):
        self.logs = []

    def on_train_batch_end(self, trainer, model, *args):
        self.logs.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture(autouse=True)
def vgg(random_vgg):
    return random_vgg


# --------------------------------------------------------------------------------------------------- training


@every
def test_training_moves_all_weights_with_finite_losses_and_counts_batches(name):
    model = build(name)
    before = {k: p.detach().clone() for k, p in model.named_parameters() if not k.startswith("loss.")}
    trainer = fit(model, 4)
    assert trainer.global_step == model.batch_counter == 4
    still = [
        k
        for k, p in model.named_parameters()
        if p.requires_grad and k in before and torch.equal(p, before[k])
    ]
    assert still == []
    log = trainer.callback_metrics
    assert {"train/aeloss", "val/aeloss", "train/codebook_usage", "val/codebook_perplexity"} <= set(log)
    assert all(np.isfinite(float(v)) for v in log.values())
    assert ("train/discloss" in log) is (model.discriminator is not None)
    assert ("val/accuracy" if name == "VQSegmentationModel" else "val/psnr") in log
    assert ("temperature" in log) is (name == "GumbelVQ")


class Randomness(pl.Callback):
    """The random state with which the third batch begins: kept from one run, given to the next."""

    state = None

    def on_train_batch_start(self, trainer, model, *args):
        if trainer.global_step == 2 and self.state is None:
            self.state = torch.get_rng_state()
        elif trainer.global_step == 2:
            torch.set_rng_state(self.state)


@every
def test_a_resumed_run_is_the_run_that_was_not_stopped(name, tmp_path):
    """Two epochs in one go equal one, a checkpoint, and another: weights, averages, counter and codes seen."""
    whole, first, second = (build(name, ema_decay=0.5) for _ in range(3))
    random = Randomness()
    torch.manual_seed(2)
    fit(whole, 4, n=4, callbacks=[random])
    torch.manual_seed(2)
    fit(first, 2, n=4).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 4, n=4, ckpt_path=tmp_path / "half.ckpt", callbacks=[random])
    assert second.batch_counter == 4
    for (key, one), other in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6), key
    assert torch.equal(whole.usage["train"].recent, second.usage["train"].recent)
    assert len(second.usage["train"].recent) == 4 * 2 * 64


def test_disc_start_counts_on_after_a_resume(tmp_path):
    """The discriminator rests for three batches, two before the stop and one after."""
    gan = {**GAN, "params": {**GAN["params"], "disc_start": 3}}

    def make():
        torch.manual_seed(1)
        model = VQModel(ddconfig(), gan, 8, 4)
        model.learning_rate = 1e-3
        return model

    first, history = make(), History()
    fit(first, 2, n=4).save_checkpoint(tmp_path / "half.ckpt")
    fit(make(), 4, n=4, ckpt_path=tmp_path / "half.ckpt", callbacks=[history])
    assert ["train/discloss" in log for log in history.logs] == [False, True]


def test_the_temperature_falls_with_the_batches():
    model, history = build("GumbelVQ"), History()
    model.gradient_clip_val = 1.0
    fit(model, 6, n=8, callbacks=[history])
    # half a cosine from 0.9 to 0.1 over four batches
    expected = [0.5 + 0.4 * np.cos(np.pi * min(n, 4) / 4) for n in range(6)]
    assert [log["temperature_step"] for log in history.logs] == pytest.approx(expected, abs=1e-6)


def test_accumulated_batches_count_once_for_the_temperature():
    model, history = build("GumbelVQ"), History()
    model.accumulate_grad_batches = 2
    fit(model, 2, n=8, callbacks=[history])
    assert model.batch_counter == 2
    cooler = 0.5 + 0.4 * np.cos(np.pi / 4)
    assert [log["temperature_step"] for log in history.logs] == pytest.approx([0.9, 0.9, cooler, cooler])


def test_the_ema_codebook_moves_without_an_optimizer():
    model = build("EMAVQ")
    codebook = {id(p) for p in model.quantize.parameters()}
    optimized = {id(p) for o in model.configure_optimizers()[0] for g in o.param_groups for p in g["params"]}
    assert not codebook & optimized
    before = model.quantize.embedding.weight.clone()
    fit(model, 1, n=4)
    assert not torch.equal(before, model.quantize.embedding.weight)


@every
def test_a_multiplier_moves_the_learning_rate_of_every_player(name):
    ramp = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 10, "lr_min": 1.0, "lr_max": 1.0, "lr_start": 0.0, "max_decay_steps": 20},
    }
    model = build(name, scheduler_config=ramp)
    trainer = fit(model, 3, n=8)
    rates = [o.param_groups[0]["lr"] for o in trainer.optimizers]
    assert rates == pytest.approx([3e-4] * (1 if model.discriminator is None else 2))


# ------------------------------------------------------------------------------------------------ codebook's use


def test_validation_counts_the_codes_of_a_whole_epoch_and_of_no_other():
    model = build("VQModel")
    trainer = fit(model, 4, n=4)  # two epochs
    assert int(model.usage["val"].counts.sum()) == 4 * 64
    model.eval()
    with torch.no_grad():
        images = torch.stack([Batches(4)[i]["image"] for i in range(4)]).permute(0, 3, 1, 2)
        indices = model.encode(images)[2][2]
    counts = torch.bincount(indices, minlength=8)
    entropy = torch.distributions.Categorical(probs=counts / counts.sum()).entropy()
    assert float(trainer.callback_metrics["val/codebook_usage"]) == pytest.approx(int((counts > 0).sum()) / 8)
    assert float(trainer.callback_metrics["val/codebook_perplexity"]) == pytest.approx(
        float(entropy.exp()), rel=1e-4
    )


def test_the_averaged_weights_are_judged_apart():
    log = fit(build("VQModel", ema_decay=0.5), 2, n=4).callback_metrics
    assert {"val/psnr", "val_ema/psnr", "val/codebook_usage", "val_ema/codebook_usage"} <= set(log)


def test_usage_can_be_left_out_and_never_enters_the_weights():
    model = build("VQModel", usage_window=0)
    assert not any("codebook" in key for key in fit(model, 2, n=4).callback_metrics)
    counted = build("VQModel")
    fit(counted, 2, n=4)
    assert list(counted.state_dict()) == list(model.state_dict())


# ------------------------------------------------------------------------------------------------ codes and pictures


@pytest.mark.parametrize("name", [n for n in MODELS if n != "GumbelVQ"])
def test_codes_lead_to_the_image_of_the_quantised_latent(name):
    model = build(name).eval()
    x = torch.rand(2, model.encoder.conv_in.in_channels, 16, 16)
    quant, _, (_, _, indices) = model.encode(x)
    assert torch.allclose(model.decode_code(indices.reshape(2, 8, 8)), model.decode(quant), atol=1e-5)


def test_code_grids_of_another_shape_or_range_are_refused():
    model = build("VQModel")
    with pytest.raises(ValueError, match=r"as a grid \(b, h, w\), not \(64,\)"):
        model.decode_code(torch.zeros(64, dtype=torch.long))
    with pytest.raises(IndexError, match="code index 8 is outside this codebook of 8 codes"):
        model.decode_code(torch.full((1, 8, 8), 8))


def test_gumbel_codes_are_decoded_as_its_error_says():
    model = build("GumbelVQ").eval()
    quant, _, (_, _, indices) = model.encode(torch.rand(1, 3, 16, 16))
    with pytest.raises(NotImplementedError, match="get_codebook_entry"):
        model.decode_code(indices)
    looked_up = model.decode(model.quantize.get_codebook_entry(indices, (1, 8, 8, 4)))
    assert torch.allclose(looked_up, model.decode(quant), atol=1e-5)


def test_segmentations_are_drawn_with_the_likeliest_labels():
    model = build("VQSegmentationModel").eval()
    batch = {"segmentation": torch.stack([Batches(2)[i]["segmentation"] for i in range(2)])}
    log = model.log_images(batch)
    assert list(log) == ["inputs", "reconstructions"]
    assert all(v.shape == (2, 3, 16, 16) and v.min() == -1 and v.max() == 1 for v in log.values())
    colours = log["reconstructions"].permute(0, 2, 3, 1).reshape(-1, 3)
    labels = model(model.get_input(batch, "segmentation"))[0].argmax(dim=1).flatten()
    assert len(colours.unique(dim=0)) == labels.unique().numel()
    assert len({tuple(c) for c in colours[labels == labels[0]].tolist()}) == 1


def test_the_colours_of_labels_come_back_with_the_checkpoint(tmp_path):
    first = build("VQSegmentationModel")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    torch.manual_seed(9)
    second = VQSegmentationModel(
        5, ddconfig(channels=5), BCE, 8, 4, image_key="segmentation", ckpt_path=str(tmp_path / "a.ckpt")
    )
    assert torch.equal(first.colorize, second.colorize)


def test_pictures_show_the_averaged_weights_where_there_are_any():
    batch = {"image": Batches(1)[0]["image"][None]}
    assert list(build("VQModel").log_images(batch)) == ["inputs", "reconstructions"]
    model = build("VQModel", ema_decay=0.5)
    model.get_last_layer().data.zero_()
    log = model.log_images(batch)
    assert list(log) == ["inputs", "reconstructions", "reconstructions_ema"]
    assert not torch.allclose(log["reconstructions"], log["reconstructions_ema"])
    assert not model.get_last_layer().any()  # the live weights are back


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "params", "cls", "n_embed", "embed_dim"),
    [("FSQ", {"levels": [8, 5, 5, 5]}, FSQ, 1000, 4), ("LFQ", {"bits": 10}, LFQ, 1024, 10),
     ("VectorQuantizer2", {"n_e": 32, "e_dim": 8, "beta": 0.25, "legacy": False, "l2_norm": True}, VectorQuantizer2, 32, 8)],
)  # fmt: skip
def test_a_configuration_names_any_quantiser(name, params, cls, n_embed, embed_dim):
    config = {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "ddconfig": ddconfig(), "lossconfig": NONE, "n_embed": n_embed, "embed_dim": embed_dim,
            "quantizer_config": quantizer(name, **params),
        },
    }  # fmt: skip
    model = instantiate_from_config(config)
    assert type(model.quantize) is cls
    assert model(torch.rand(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)


def test_a_quantiser_of_another_size_than_the_models_is_named():
    with pytest.raises(
        ConfigError, match=r"makes 60 codes of 3 channels, but the model's n_embed=64 and embed_dim=3"
    ):
        VQModel(ddconfig(), NONE, 64, 3, quantizer_config=quantizer("FSQ", levels=[5, 4, 3]))
    with pytest.raises(ConfigError, match="remap and sane_index_shape belong into its params"):
        VQModel(ddconfig(), NONE, 60, 3, sane_index_shape=True, quantizer_config=quantizer("FSQ", levels=[5, 4, 3]))  # fmt: skip


def test_gumbel_with_other_code_channels_than_the_encoders_is_named():
    with pytest.raises(ConfigError, match=r"embed_dim=3 equal to ddconfig.z_channels=4"):
        GumbelVQ(ddconfig(), NONE, 8, 3, temperature_scheduler_config=COOLING)


@pytest.mark.parametrize("name", ["GumbelVQ", "EMAVQ"])
def test_the_checkpoint_is_read_into_the_models_own_quantiser(name, tmp_path):
    first = build(name)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "a.ckpt")
    torch.manual_seed(9)
    options = {"temperature_scheduler_config": COOLING} if name == "GumbelVQ" else {}
    second = type(first)(ddconfig(), NONE, 8, 4, ckpt_path=str(tmp_path / "a.ckpt"), **options)
    ours, theirs = first.quantize.state_dict(), second.quantize.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
