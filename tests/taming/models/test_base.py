"""The two-player training loop, run by a real Trainer on a tiny VQGAN."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from taming.models.vqgan import VQModel

DD = {
    "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def build(disc_start=0, **options):
    torch.manual_seed(1)
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": disc_start, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0},
    }
    model = VQModel(DD, loss, n_embed=8, embed_dim=4, monitor="val/rec_loss", **options)
    model.learning_rate = 1e-3
    return model


def images(n=12):
    generator = torch.Generator().manual_seed(3)
    return [{"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1} for _ in range(n)]


def fit(model, data=None, ckpt_path=None, tmp_path=None, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(
        model,
        DataLoader(data or images(), batch_size=2),
        DataLoader(images(4), batch_size=2),
        ckpt_path=ckpt_path,
    )
    return trainer


def discriminator(model):
    return torch.cat([p.detach().flatten() for p in model.loss.discriminator.parameters()])


@pytest.fixture(autouse=True)
def vgg(random_vgg):
    return random_vgg


def test_both_players_move_and_steps_are_counted_in_batches():
    model = build()
    before, start = model.get_last_layer().detach().clone(), discriminator(model)
    trainer = fit(model, max_steps=4)
    assert (
        trainer.global_step == model.batch_counter == 4
    )  # max_steps means batches, though two optimizers moved
    assert not torch.equal(before, model.get_last_layer())
    assert not torch.equal(start, discriminator(model))


def test_the_discriminator_rests_until_its_start_in_batches():
    for batches, moves in ((3, False), (4, True)):
        model = build(disc_start=3)
        start = discriminator(model)
        fit(model, max_steps=batches)
        assert (not torch.equal(start, discriminator(model))) is moves


def test_accumulated_batches_make_the_step_of_one_large_batch(monkeypatch):
    """The step after two half batches equals that after the whole one (the discriminator rests)."""
    monkeypatch.setattr(
        torch.optim, "Adam", lambda parameters, lr, betas: torch.optim.SGD(parameters, lr=1.0)
    )
    data = images(4)
    results = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = build(disc_start=100)
        model.accumulate_grad_batches = accumulate
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(data, batch_size=size))
        assert model.batch_counter == trainer.global_step == 1
        results.append(model.encoder.conv_in.weight.detach().clone())
    assert torch.allclose(*results, atol=1e-5)


def test_gradients_are_clipped_by_norm(monkeypatch):
    norms = []

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            if closure is not None:
                closure()
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
            return super().step()

    monkeypatch.setattr(torch.optim, "Adam", Spy)
    model = build(disc_start=100)
    model.gradient_clip_val = 0.01
    fit(model, max_steps=2)
    assert len(norms) == 2 and all(n == pytest.approx(0.01, rel=1e-3) for n in norms)


def test_a_resumed_run_takes_up_counters_optimizers_and_weights(tmp_path):
    """Four batches in one go equal two, a checkpoint, and two more."""
    whole = build(disc_start=1)
    fit(whole, max_steps=4)
    first = build(disc_start=1)
    trainer = fit(first, max_steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = build(disc_start=1)
    resumed = fit(second, data=images()[4:], ckpt_path=tmp_path / "half.ckpt", max_steps=4, max_epochs=2)
    assert resumed.global_step == second.batch_counter == 4
    assert torch.allclose(whole.get_last_layer(), second.get_last_layer(), atol=1e-6)
    assert torch.allclose(discriminator(whole), discriminator(second), atol=1e-6)


def test_a_checkpoint_of_an_old_trainer_counts_its_global_step_as_batches():
    model = build()
    model.on_load_checkpoint({"global_step": 123})
    assert model.batch_counter == 123


def test_validation_reports_losses_and_psnr():
    trainer = fit(build())
    assert {"val/rec_loss", "val/aeloss", "val/psnr", "val/disc_loss"} <= set(trainer.callback_metrics)


def test_psnr_is_that_of_its_definition():
    x = torch.zeros(1, 3, 4, 4)
    assert float(VQModel.psnr(x, x + 0.2)) == pytest.approx(20.0, abs=1e-4)  # 10 log10(2² / 0.2²)


def test_codes_lead_to_the_same_image_as_the_quantised_latent():
    model = build(sane_index_shape=True).eval()
    quant, _, (_, _, indices) = model.encode(torch.rand(2, 3, 16, 16))
    assert torch.allclose(model.decode_code(indices), model.decode(quant), atol=1e-5)


def test_a_batch_without_the_image_says_what_it_holds():
    with pytest.raises(KeyError, match=r"no entry 'image'. Did you mean 'images'.*holds: images, caption"):
        build().get_input({"images": torch.zeros(1, 4, 4, 3), "caption": ["a"]}, "image")


def test_only_segmentations_are_drawn_in_colours():
    with pytest.raises(AssertionError, match="only segmentations"):
        build().to_rgb(torch.zeros(1, 5, 4, 4))
