import math

import pytest
import torch
from torch import nn

from sgm.modules.autoencoding.losses import GeneralLPIPSWithDiscriminator, LatentLPIPS
from sgm.modules.autoencoding.lpips.loss.lpips import LPIPS
from sgm.modules.autoencoding.lpips.model.model import NLayerDiscriminator
from sgm.modules.autoencoding.lpips.util import ActNorm
from sgm.modules.autoencoding.lpips.vqperceptual import hinge_d_loss
from taming.modules.discriminator.model import NLayerDiscriminator as HomeDiscriminator
from taming.modules.losses.adversarial import hinge_d_loss as home_hinge
from taming.modules.losses.lpips import LPIPS as HomeLPIPS
from taming.modules.util import ActNorm as HomeActNorm

PIXEL_DISCRIMINATOR = {
    "target": "torch.nn.Conv2d",
    "params": {"in_channels": 3, "out_channels": 1, "kernel_size": 1},
}


@pytest.fixture
def build(random_vgg):
    def make(**options):
        options = {
            "disc_start": 5,
            "perceptual_weight": 0.0,
            "discriminator_config": PIXEL_DISCRIMINATOR,
            **options,
        }
        return GeneralLPIPSWithDiscriminator(**options)

    return make


def call(loss, x, y, player=0, step=0, reg=None, **options):
    options = {"last_layer": None, **options}
    return loss(x, y, regularization_log=reg or {}, optimizer_idx=player, global_step=step, **options)


def test_the_old_paths_lead_to_the_one_implementation():
    assert (LPIPS, NLayerDiscriminator, ActNorm, hinge_d_loss) == (
        HomeLPIPS,
        HomeDiscriminator,
        HomeActNorm,
        home_hinge,
    )


def test_the_likelihood_is_that_of_the_closed_form_and_regularizers_are_weighed(build):
    loss = build(logvar_init=math.log(2.0), regularization_weights={"kl_loss": 0.5}).train()
    x = torch.zeros(2, 3, 4, 4)
    value, log = call(loss, x, x + 1, reg={"kl_loss": torch.tensor(6.0), "perplexity": torch.tensor(1.0)})
    nll = 48 * (1 / 2 + math.log(2.0))
    assert float(value) == pytest.approx(nll + 3.0)
    assert log["train/kl_loss"] == 6.0 and "train/perplexity" not in log
    assert float(log["train/loss/rec"]) == 1.0 and float(log["train/loss/nll"]) == pytest.approx(nll)


def test_the_generator_hears_the_discriminator_from_its_start_on_and_always_outside_training(build):
    last = nn.Parameter(torch.ones(3, 3, 1, 1))
    loss, x = build(disc_weight=0.5), torch.randn(2, 3, 4, 4)
    weights = {}
    for training, step in ((True, 4), (True, 5), (False, 0)):
        y = torch.nn.functional.conv2d(x, last)
        weights[training, step] = float(
            call(loss.train(training), x, y, step=step, last_layer=last)[1]["train/scalars/d_weight"]
        )
    assert weights[True, 4] == 0 and weights[False, 0] == 1
    y = torch.nn.functional.conv2d(x, last)
    pulls = [
        torch.autograd.grad(t, last, retain_graph=True)[0].norm()
        for t in ((x - y).abs().sum() / 2, loss.discriminator(y).mean())
    ]
    assert weights[True, 5] == pytest.approx(float(0.5 * pulls[0] / (pulls[1] + 1e-4)), rel=1e-4)


def test_the_discriminators_turn_reaches_the_discriminator_only(build):
    loss, y = build().train(), torch.randn(2, 3, 4, 4, requires_grad=True)
    call(loss, torch.randn(2, 3, 4, 4), y, player=1, step=9)[0].backward()
    assert y.grad is None and all(p.grad is not None for p in loss.get_trainable_parameters())


def test_clips_are_taken_as_images_one_by_one(build):
    x, y = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 3, 4, 8, 8)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (x, y)]
    clips, images = build(dims=3).train(), build().train()
    assert float(call(clips, x, y)[0]) == pytest.approx(float(call(images, *flat)[0]))


def test_its_pictures_are_green_where_the_discriminator_says_real(build):
    loss = build().eval()
    nn.init.zeros_(loss.discriminator.weight)
    loss.discriminator.bias.data.fill_(1.0)
    log = loss.log_images(torch.zeros(2, 3, 4, 6), torch.zeros(2, 3, 4, 6))
    assert log["vis_logits"].shape == (2, 3, 4, 12)
    red, green, blue = log["vis_logits"].unbind(1)
    assert (green > red).all() and (green > blue).all()
    assert log["vis_logits_blended"].abs().max() <= 1


def test_a_learned_log_variance_is_the_autoencoders_to_train(build):
    learned, fixed = build(learn_logvar=True), build()
    assert list(learned.get_trainable_autoencoder_parameters()) == [learned.logvar]
    assert not list(fixed.get_trainable_autoencoder_parameters()) and not fixed.logvar.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [({"disc_loss": "wgan"}, AssertionError, "wgan"), ({"dims": 4}, ValueError, "dims=4")],
)
def test_unknown_options_are_refused(build, options, error, says):
    with pytest.raises(error, match=says):
        build(**options)


def test_there_is_no_third_player(build):
    with pytest.raises(ValueError, match="optimizer_idx=2"):
        call(build(), torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), player=2)


def test_the_loss_of_latents_compares_what_they_decode_to(random_vgg):
    decoder = {"target": "sgm.models.autoencoder.IdentityFirstStage"}
    loss = LatentLPIPS(
        decoder,
        perceptual_weight=0.5,
        latent_weight=2.0,
        perceptual_weight_on_inputs=0.25,
        scale_input_to_tgt_size=True,
    )
    a, b, image = (torch.randn(1, 3, n, n) for n in (32, 32, 48))
    value, log = loss(a, b, image, split="val")
    terms = [
        log[f"val/{name}"] for name in ("latent_l2_loss", "perceptual_loss", "perceptual_loss_on_inputs")
    ]
    assert float(terms[0]) == pytest.approx(float((a - b).square().mean()))
    assert float(value) == pytest.approx(float(2.0 * terms[0] + 0.5 * terms[1] + 0.25 * terms[2]), rel=1e-5)
    assert float(loss(a, a, a)[1]["train/perceptual_loss_on_inputs"]) == 0
