import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from sgm.models.autoencoder import (
    AEIntegerWrapper,
    AutoencoderKL,
    AutoencoderKLInferenceWrapper,
    AutoencoderKLModeOnly,
    AutoencoderLegacyVQ,
    AutoencodingEngine,
    IdentityFirstStage,
)
from sgm.modules.checkpoint import CheckpointEngine
from taming.checkpoint import CheckpointError

LAYERS = {
    "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


class Judge(nn.Module):
    """A loss with one weight for the discriminator to train, which keeps what it was told."""

    forward_keys = ["optimizer_idx", "global_step", "split", "regularization_log"]

    def __init__(self):
        super().__init__()
        self.discriminator = nn.Parameter(torch.zeros(1))
        self.told = []

    def get_trainable_parameters(self):
        return [self.discriminator]

    def forward(self, x, y, optimizer_idx, global_step, split, regularization_log):
        self.told.append((optimizer_idx, global_step, split, y.requires_grad))
        value = (
            (x - y).square().mean()
            if optimizer_idx == 0
            else self.discriminator.square().sum() + self.discriminator.sum()
        )
        return value, {f"{split}/loss/{('rec', 'disc')[optimizer_idx]}": value.detach()}


def engine(**options):
    part = "sgm.modules.diffusionmodules.model."
    configs = {
        "encoder_config": {"target": part + "Encoder", "params": LAYERS},
        "decoder_config": {"target": part + "Decoder", "params": LAYERS},
        "loss_config": {"target": "torch.nn.MSELoss"},
        "regularizer_config": {"target": "sgm.modules.autoencoding.regularizers.DiagonalGaussianRegularizer"},
    }
    model = AutoencodingEngine(**{**configs, **options})
    model.learning_rate = 0.1
    return model


def train(model, batches=4, **options):
    data = DataLoader([{"jpg": torch.rand(3, 16, 16) * 2 - 1} for _ in range(batches)], batch_size=1)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, data, data if options else None)
    return trainer


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({}, [(0, 0), (1, 1), (0, 2), (1, 3)]),
        ({"disc_start_iter": 3}, [(0, 0), (0, 1), (0, 2), (1, 3)]),
        ({"alternate": False}, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]),
        ({"alternate": False, "disc_start_iter": 3}, [(0, 0), (0, 1), (0, 2), (0, 3), (1, 3)]),
    ],
)
def test_a_batch_updates_one_optimizer_in_turn_or_both(options, turns):
    """(optimizer, steps so far); both together count as one step."""
    model = engine(**options)
    model.loss = Judge()
    before = model.decoder.conv_out.weight.detach().clone()
    train(model)
    assert [told[:2] for told in model.loss.told] == turns
    # the discriminator judges a reconstruction without its graph
    assert [told[3] for told in model.loss.told] == [player == 0 for player, _ in turns]
    assert model.loss.discriminator.item() != 0 and not torch.equal(model.decoder.conv_out.weight, before)


def test_turns_outlast_accumulated_batches():
    model = engine()
    model.loss, model.accumulate_grad_batches = Judge(), 2
    train(model)
    assert [told[0] for told in model.loss.told] == [0, 0, 1, 1]
    assert model.global_step == 2


def test_validation_reports_both_weights_psnr_and_the_name_that_old_monitors_ask_for():
    model = engine(monitor="val/rec_loss", ema_decay=0.5)
    metrics = train(model, batches=2, limit_val_batches=1, num_sanity_val_steps=0).callback_metrics
    assert metrics["val/rec_loss"] == metrics["val/loss/rec"] != metrics["val_ema/loss/rec"]
    assert {"val/psnr", "val_ema/psnr"} <= metrics.keys()


def test_the_average_covers_every_weight_the_projections_too():
    model = AutoencoderKL(embed_dim=2, ddconfig=LAYERS, ema_decay=0.9)
    shadow = model.model_ema.m_name2s_name
    assert {"quant_conv.weight", "encoder.conv_in.weight"} <= shadow.keys()
    with torch.no_grad():
        model.quant_conv.bias.fill_(7.0)
    with model.ema_scope():
        assert not (model.quant_conv.bias == 7.0).any()
    assert (model.quant_conv.bias == 7.0).all()


def test_groups_of_parameters_are_chosen_by_pattern_with_options_of_their_own(caplog):
    model = engine(
        trainable_ae_params=[["decoder.conv_out", "decoder.norm_out"], ["encoder.conv_in", "nothing"]],
        ae_optimizer_args=[{"lr": 0.5}, {}], lr_g_factor=3.0,
    )  # fmt: skip
    (optimizer,) = model.configure_optimizers()
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [
        (4, 0.5),
        (2, pytest.approx(0.3)),
    ]
    assert "'nothing'" in caplog.text
    with pytest.raises(AssertionError, match="1 groups .* options for 2"):
        engine(trainable_ae_params=[["decoder"]], ae_optimizer_args=[{}, {}])


def test_log_images_shows_the_error_from_black_to_white():
    model = engine()
    model.forward = lambda x: (None, torch.zeros_like(x), {})
    log = model.log_images({"jpg": torch.full((1, 3, 4, 4), 0.5)})
    assert list(log) == [
        "inputs",
        "reconstructions",
        "diff",
        "diff_boost",
        "reconstructions_ema",
        "diff_ema",
        "diff_boost_ema",
    ]
    assert log["diff"].unique().tolist() == [-0.5] and log["diff_boost"].unique().tolist() == [0.5]


def test_pictures_of_the_chapters_below_are_turned_round():
    picture = torch.rand(2, 16, 12, 3)
    assert torch.equal(engine(input_key="image").get_input({"image": picture}), picture.permute(0, 3, 1, 2))
    with pytest.raises(KeyError, match="no entry 'jpg'"):
        engine().get_input({"image": picture})


@torch.no_grad()
def test_the_kl_autoencoders_draw_or_take_the_mean():
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    drawing, mean = AutoencoderKL(4, LAYERS), AutoencoderKLModeOnly(4, LAYERS)
    mean.load_state_dict(drawing.state_dict())
    moments = drawing.encode(x, unregularized=True)[0]
    torch.testing.assert_close(mean.encode(x), moments.chunk(2, dim=1)[0])
    assert not torch.equal(drawing.encode(x), drawing.encode(x))
    assert isinstance(AutoencoderKLInferenceWrapper(4, LAYERS), AutoencoderKL)


@torch.no_grad()
def test_tiles_and_chunks_of_a_batch_are_available():
    model = AutoencoderKLModeOnly(4, LAYERS, max_batch_size=2).eval()
    z = torch.randn(3, 4, 24, 24)
    whole = model.decode(z)
    assert whole.shape == (3, 3, 48, 48)
    model.enable_tiling(size=16, exact=True)
    torch.testing.assert_close(model.decode(z), whole, atol=1e-4, rtol=1e-4)


def test_the_default_is_stable_diffusions_first_stage():
    from sgm.models import AutoencoderKL as Public

    with torch.device("meta"):
        model = Public(embed_dim=4)
        assert model.decode(torch.empty(1, 4, 8, 8)).shape == (1, 3, 64, 64)
    assert (
        sum(p.numel() for p in model.parameters()) == 83_653_863
    )  # as diffusers counts it, stabilityai/sdxl-vae


@torch.no_grad()
def test_an_sdxl_shaped_autoencoder_equals_that_of_diffusers():
    from diffusers import AutoencoderKL as Peer

    from ldm.conversion.autoencoder import autoencoder_table

    ours = AutoencoderKLModeOnly(4, {**LAYERS, "ch_mult": [1, 2, 2, 2], "num_res_blocks": 2}).eval()
    theirs = Peer(
        block_out_channels=(32, 64, 64, 64), layers_per_block=2, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()  # fmt: skip
    theirs.load_state_dict(autoencoder_table(ours).to_diffusers(ours.state_dict()))
    x, z = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(ours.encode(x), theirs.encode(x).latent_dist.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_whole_numbers_decode_to_what_their_codes_do():
    model = AutoencoderLegacyVQ(4, 9, ddconfig={**LAYERS, "double_z": False}, sane_index_shape=True)
    wrapper = AEIntegerWrapper(model, shape=(8, 8)).eval()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = wrapper.encode(x)
    assert codes.shape == (2, 64)
    torch.testing.assert_close(wrapper.decode(codes), model.decode(model.encode(x)))
    with pytest.raises(ValueError, match="do not fill a map of 4×4"):
        wrapper.decode(codes, shape=(4, 4))
    with pytest.raises(AssertionError, match="eval"):
        wrapper.train().encode(x)
    with pytest.raises(TypeError, match="no codebook"):
        AEIntegerWrapper(model, regularization_key="decoder")


def test_weights_come_from_a_file_that_may_hold_more_or_less(tmp_path):
    source = AutoencoderKL(4, LAYERS)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("quant_conv")}
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    for name in ("ckpt_path", "ckpt_engine"):
        model = AutoencoderKL(4, LAYERS, **{name: str(tmp_path / "vae.ckpt")})
        assert torch.equal(model.decoder.conv_in.weight, source.decoder.conv_in.weight)
    with pytest.raises(CheckpointError, match="does not fit"):
        CheckpointEngine(tmp_path / "vae.ckpt")(AutoencoderKL(4, {**LAYERS, "ch": 64}))


def test_no_first_stage_has_no_weights_and_changes_nothing():
    x, same = torch.randn(1, 3, 4, 4), IdentityFirstStage()
    assert same.encode(x) is x and same.decode(x) is x and not same.state_dict()
