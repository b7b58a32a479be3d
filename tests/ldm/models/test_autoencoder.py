import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from taming.util import instantiate_from_config


@pytest.fixture
def kl(tiny):
    model = instantiate_from_config(tiny.kl)
    model.learning_rate = 1e-3
    return model


@pytest.fixture
def vq_options(tiny):
    return {
        "ddconfig": {**tiny.ddconfig, "double_z": False},
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
        "n_embed": 16,
        "embed_dim": 3,
    }


def fit(model, data, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4))
    return trainer


def test_training_lowers_the_reconstruction_error(kl):
    pictures = [{"image": torch.rand(1, 1, 3).expand(16, 16, 3) * 2 - 1} for _ in range(8)]  # plain colours
    x = torch.stack([p["image"] for p in pictures]).permute(0, 3, 1, 2)
    before = (kl(x, sample_posterior=False)[0] - x).square().mean()
    trainer = fit(kl, pictures, max_epochs=30)
    after = (kl(x, sample_posterior=False)[0] - x).square().mean()
    assert after < before / 3
    assert trainer.global_step == kl.batch_counter == 60  # one optimizer: the loss has no discriminator


def test_latents_have_the_posteriors_shape_and_forward_draws_from_it(kl):
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = kl.encode(x)
    assert posterior.mode().shape == (2, 3, 8, 12) and kl.decode(posterior.mode()).shape == x.shape
    assert torch.equal(kl(x, sample_posterior=False)[0], kl(x, sample_posterior=False)[0])
    assert not torch.equal(kl(x)[0], kl(x)[0])


def test_the_average_moves_with_training_and_is_swapped_in_for_pictures(tiny):
    model = instantiate_from_config({**tiny.kl, "params": {**tiny.kl["params"], "ema_decay": 0.9}})
    model.learning_rate = 1e-3
    batch = {"image": torch.rand(4, 16, 16, 3) * 2 - 1}
    fit(model, [{"image": i} for i in batch["image"]], max_epochs=3)
    assert int(model.model_ema.num_updates) == 3
    log = model.log_images(batch)
    assert set(log) == {"inputs", "samples", "reconstructions", "samples_ema", "reconstructions_ema"}
    live = model.decoder.conv_out.weight.detach().clone()
    with model.ema_scope():
        assert not torch.equal(live, model.decoder.conv_out.weight)
    assert torch.equal(live, model.decoder.conv_out.weight)


def test_a_kl_model_needs_two_moments(tiny):
    with pytest.raises(AssertionError, match="double_z=True"):
        AutoencoderKL({**tiny.ddconfig, "double_z": False}, {"target": "torch.nn.Identity"}, embed_dim=3)


def test_learning_rates_and_multipliers_of_both_players(vq_options, random_vgg):
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": 0, "disc_ndf": 8, "disc_num_layers": 1},
    }
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [4],
            "f_min": [0.0],
            "f_max": [1.0],
            "f_start": [0.0],
            "cycle_lengths": [100],
        },
    }
    model = VQModel(**{**vq_options, "lossconfig": loss}, lr_g_factor=2.0, scheduler_config=schedule)
    model.learning_rate = 1e-3
    optimizers, schedulers = model.configure_optimizers()
    assert [o.defaults["lr"] for o in optimizers] == [2e-3, 1e-3] and len(schedulers) == 2
    picture = {"image": torch.rand(16, 16, 3)}
    fit(model, [picture] * 4, max_steps=3, max_epochs=3)
    (first, second) = model.lr_schedulers()
    assert first.last_epoch == second.last_epoch == 3  # stepped by hand with the batches
    assert first.get_last_lr()[0] == pytest.approx(2e-3 * 0.75)


def test_batches_are_resized_within_their_range(vq_options):
    model = VQModel(**vq_options, batch_resize_range=[16, 48])
    batch = {"image": torch.rand(1, 16, 16, 3)}
    assert model.get_input(batch, "image").shape[-1] == 48  # the largest first, to reserve memory early
    model.batch_counter = 5
    sizes = {model.get_input(batch, "image").shape[-1] for _ in range(60)}
    assert sizes == {16, 32, 48}


def test_the_interface_stops_before_the_codebook_and_decodes_through_it(vq_options):
    model = VQModelInterface(**vq_options).eval()
    z = model.encode(torch.rand(1, 3, 16, 16))
    assert torch.allclose(model.decode(z), model.decode(model.quantize(z)[0]), atol=1e-3)
    assert not torch.allclose(model.decode(z), model.decode(z, force_not_quantize=True), atol=1e-2)


def test_vq_pictures_with_and_without_the_average(vq_options):
    model = VQModel(**vq_options, use_ema=True)
    batch = {"image": torch.rand(2, 16, 16, 3)}
    assert set(model.log_images(batch, plot_ema=True)) == {"inputs", "reconstructions", "reconstructions_ema"}
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}


def test_no_first_stage_passes_everything_through():
    x = torch.randn(2, 3)
    plain, quantising = IdentityFirstStage(), IdentityFirstStage(vq_interface=True)
    assert plain.encode(x, 1) is plain.decode(x) is plain.quantize(x) is plain(x) is x
    assert quantising.quantize(x)[0] is x and quantising.quantize(x)[2] == [None, None, None]


def test_the_autoencoder_equals_diffusers_class(kl):
    """AutoencoderKL of diffusers, with the weights under its own names (converted by diffusers itself)."""
    from diffusers import AutoencoderKL as Peer
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    peer = Peer(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), layers_per_block=1, latent_channels=3,
    ).eval()  # fmt: skip
    converted = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{k}": v for k, v in kl.eval().state_dict().items()}, peer.config
    )
    peer.load_state_dict(converted, strict=True)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    z = kl.encode(x)
    theirs = peer.encode(x).latent_dist
    assert torch.allclose(z.mode(), theirs.mode(), atol=1e-4) and torch.allclose(
        z.logvar, theirs.logvar, atol=1e-4
    )
    assert torch.allclose(kl.decode(z.mode()), peer.decode(z.mode()).sample, atol=1e-4)
