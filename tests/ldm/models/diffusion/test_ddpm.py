import copy

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ldm.models.diffusion.ancestral import trim
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.models.diffusion.latent_cache import LatentCache
from ldm.models.diffusion.pixel import spread_weights
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from taming.checkpoint import CheckpointError
from taming.util import instantiate_from_config


def build(tiny, **params):
    model = instantiate_from_config(copy.deepcopy(tiny.latent_diffusion(**params)))
    model.learning_rate = 1e-3
    return model


@pytest.fixture
def text_model(tiny):
    return build(
        tiny, first_stage_config=tiny.kl, cond_stage_config=tiny.text, cond_stage_key="caption", cond_stage_trainable=True, timesteps=50,
        use_ema=True, scale_by_std=True, cache_latents=True, ucg_training={"caption": {"p": 0.5, "val": ""}},
    )  # fmt: skip


def pictures(n=8):
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1, "caption": f"number {i}", "index": i}
        for i in range(n)
    ]


def fit(model, data, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=4))
    return trainer


def test_a_text_conditional_model_trains_end_to_end(text_model):
    """Loss falls, the text encoder learns, the first stage does not, and each picture is encoded once."""
    frozen = copy.deepcopy(text_model.first_stage_model.state_dict())
    words = text_model.cond_stage_model.transformer.token_emb.weight.detach().clone()
    encoded = []
    original = text_model.first_stage_model.encode
    text_model.first_stage_model.encode = lambda x: (encoded.append(len(x)), original(x))[1]
    trainer = fit(text_model, pictures(), max_epochs=20)
    assert float(trainer.callback_metrics["train/loss_simple_epoch"]) < 0.95
    assert (
        sum(encoded) == 8 + 4 and len(text_model.latent_cache) == 8
    )  # and once for the scale, on the first batch
    assert all(torch.equal(v, frozen[k]) for k, v in text_model.first_stage_model.state_dict().items())
    assert not torch.equal(words, text_model.cond_stage_model.transformer.token_emb.weight)
    assert float(text_model.scale_factor) != 1.0 and int(text_model.model_ema.num_updates) == 40


def test_pictures_of_a_batch_show_the_conditions_and_the_samples(text_model):
    batch = next(iter(DataLoader(pictures(3), batch_size=3)))
    text_model.eval()
    log = text_model.log_images(
        batch,
        N=2,
        ddim_steps=2,
        plot_denoise_rows=True,
        plot_progressive_rows=False,
        unconditional_guidance_scale=2.0,
        unconditional_guidance_label=[""],
    )
    assert list(log) == [
        "inputs", "reconstruction", "conditioning", "diffusion_row", "samples", "denoise_row", "samples_cfg_scale_2.00",
        "samples_inpainting", "mask", "samples_outpainting",
    ]  # fmt: skip
    assert log["samples"].shape == (2, 3, 16, 16) and log["conditioning"].shape == (2, 3, 16, 16)
    assert log["denoise_row"].ndim == 3
    assert set(
        text_model.log_images(batch, N=1, ddim_steps=2, return_keys=["samples"], plot_progressive_rows=False)
    ) == {"samples"}


def test_captions_are_dropped_in_training_only(text_model):
    batch = {"image": torch.rand(64, 16, 16, 3), "caption": ["x"] * 64}
    text_model.training_step(batch, 0)
    assert 10 < batch["caption"].count("") < 54
    kept = {"image": torch.rand(4, 16, 16, 3), "caption": ["x"] * 4}
    text_model.eval().validation_step(kept, 0)
    assert kept["caption"] == ["x"] * 4


def test_the_scale_makes_the_first_batchs_latents_of_unit_variance(tiny):
    model = build(
        tiny,
        scale_by_std=True,
        cond_stage_config="__is_unconditional__",
        unet={"use_spatial_transformer": False, "context_dim": None},
    )
    batch = {"image": 5 * torch.randn(16, 8, 8, 3)}
    model.on_train_batch_start(batch, 0)
    assert float(model.get_first_stage_encoding(batch["image"]).std()) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(AssertionError, match="leave scale_factor at 1"):
        model.on_train_batch_start(batch, 0)


def test_cached_posteriors_still_draw_anew():
    cache = LatentCache()
    calls = []

    def encode(x):
        calls.append(len(x))
        return DiagonalGaussianDistribution(torch.cat([x, torch.zeros_like(x)], dim=1))

    x = torch.randn(4, 2, 3, 3)
    first = cache.encode(x, torch.tensor([7, 3, 9, 1]), encode)
    again = cache.encode(x[[2, 0]], torch.tensor([9, 7]), encode)
    assert calls == [4] and torch.equal(again.mean, first.mean[[2, 0]])
    assert not torch.equal(again.sample(), again.sample())
    plain = LatentCache()
    assert torch.equal(plain.encode(x, torch.arange(4), lambda x: x + 1), x + 1)


def test_conditions_by_route(tiny):
    x, t, c = torch.randn(2, 3, 8, 8), torch.tensor([3, 400]), torch.randn(2, 5, 8)
    model = build(tiny)
    torch.nn.init.normal_(model.model.diffusion_model.out[2].weight)
    expected = model.apply_model(x, t, {"c_crossattn": [c]})
    assert torch.equal(model.apply_model(x, t, c), expected) and torch.equal(
        model.apply_model(x, t, [c]), expected
    )
    with pytest.raises(
        AssertionError, match=r"'crossattn' needs c_crossattn, but the condition holds \['c_concat'\]"
    ):
        model.apply_model(x, t, {"c_concat": [x]})
    with pytest.raises(AssertionError, match="Did you mean 'crossattn'"):
        DiffusionWrapper({"target": "torch.nn.Identity"}, "crosattn")


def test_a_shared_context_list_can_stay_a_list(tiny):
    unet = {
        **tiny.unet,
        "params": {**tiny.unet["params"], "transformer_depth": 2},
        "sequential_crossattn": True,
    }
    wrapper = DiffusionWrapper(copy.deepcopy(unet), "crossattn")
    contexts = [torch.randn(2, 5, 8), torch.randn(2, 3, 8)]
    assert wrapper(torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), c_crossattn=contexts).shape == (2, 3, 8, 8)


def test_classes_condition_through_their_embedder_with_and_without_a_class(tiny):
    classes = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"embed_dim": 8, "n_classes": 5, "key": "class_label"},
    }
    model = build(tiny, cond_stage_config=classes, cond_stage_key="class_label", timesteps=20)
    batch = {
        "image": torch.rand(3, 8, 8, 3),
        "class_label": torch.tensor([0, 3, 2]),
        "human_label": ["a", "b", "c"],
    }
    _, c = model.get_input(batch, "image", bs=2)
    assert c.shape == (2, 1, 8)
    assert model.get_unconditional_conditioning(4).shape == (4, 1, 8)  # the original's float labels crashed
    log = model.log_images(batch, N=2, ddim_steps=None, inpaint=False, plot_progressive_rows=False)
    assert log["conditioning"].shape == (2, 3, 8, 8) and log["samples"].shape == (2, 3, 8, 8)
    without = {k: v for k, v in batch.items() if k != "human_label"}
    assert "conditioning" not in model.log_images(
        without, N=1, sample=False, inpaint=False, plot_progressive_rows=False
    )


def test_ancestral_sampling_of_the_exact_denoiser_gives_the_datas_distribution(tiny, gaussian_denoiser):
    exact = gaussian_denoiser(timesteps=200)
    model = build(
        tiny,
        cond_stage_config="__is_unconditional__",
        unet={"use_spatial_transformer": False, "context_dim": None},
        timesteps=200,
        linear_start=exact.linear_start,
        linear_end=exact.linear_end,
        channels=1,
        image_size=1,
    )
    model.apply_model = lambda x, t, c, return_ids=False: exact.apply_model(x, t)
    out = model.sample(None, batch_size=4000, verbose=False)
    assert float(out.mean()) == pytest.approx(0.5, abs=0.05) and float(out.std()) == pytest.approx(
        0.7, abs=0.05
    )


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_plain_ddpm_samples_and_trains_in_every_parameterization(tiny, kind):
    unet = {
        **tiny.unet,
        "params": {**tiny.unet["params"], "use_spatial_transformer": False, "context_dim": None},
    }
    model = DDPM(unet, timesteps=4, image_size=8, channels=3, parameterization=kind, log_every_t=1)
    model.learning_rate = 1e-3
    loss, log = model.shared_step({"image": torch.rand(2, 8, 8, 3)})
    assert torch.isfinite(loss) and sorted(log) == ["train/loss", "train/loss_simple", "train/loss_vlb"]
    images, kept = model.sample(2, return_intermediates=True)
    assert images.shape == (2, 3, 8, 8) and images.abs().max() < 5 and len(kept) == 5


def test_the_checkpoint_comes_last_and_says_when_it_does_not_fit(tiny, tmp_path):
    source = build(tiny, beta_schedule="cosine", timesteps=20)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "a.ckpt")
    loaded = build(tiny, timesteps=20, ckpt_path=str(tmp_path / "a.ckpt"))
    assert torch.equal(loaded.betas, source.betas) and loaded.restarted_from_ckpt
    with pytest.raises(CheckpointError, match=r"betas is \(20,\) there and \(1000,\) here"):
        build(tiny, ckpt_path=str(tmp_path / "a.ckpt"))


def test_wider_layers_take_a_narrower_checkpoints_weights():
    old = torch.arange(6.0).reshape(2, 3)
    fitted = spread_weights(
        {"w": old, "b": torch.tensor([1.0, 2.0])}, {"w": torch.zeros(4, 4), "b": torch.zeros(3)}
    )
    assert fitted["b"].tolist() == [1.0, 2.0, 1.0]
    # column 3 repeats column 0, which is then used twice: divided by 1 + 2, the others by 1 + 1
    assert torch.allclose(
        fitted["w"][:2], torch.stack([old[:, 0] / 3, old[:, 1] / 2, old[:, 2] / 2, old[:, 0] / 3], dim=1)
    )
    with pytest.raises(ValueError, match="make_it_fit: w is"):
        spread_weights({"w": torch.zeros(2, 2, 3, 3)}, {"w": torch.zeros(2, 2, 1, 1)})


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"parameterization": "epsilon"}, AssertionError, r"choose one of \['eps', 'flow', 'v', 'x0'\]"),
        ({"num_timesteps_cond": 2000}, ValueError, "exceeds timesteps"),
        ({"reset_num_ema_updates": True, "ckpt_path": "x.ckpt"}, Exception, "x.ckpt|use_ema"),
        ({"loss_type": "huber"}, NotImplementedError, "choose 'l1' or 'l2'"),
    ],
)
def test_wrong_options_are_refused(tiny, params, error, message):
    with pytest.raises(error, match=message):
        build(tiny, **params).get_loss(torch.zeros(1), torch.zeros(1))


def test_a_misspelt_option_of_a_base_class_is_found_from_the_yaml(tiny):
    config = OmegaConf.create({"model": tiny.latent_diffusion(linear_strat=0.1)})
    with pytest.raises(
        ValueError, match="at model has no parameter 'linear_strat'. Did you mean 'linear_start'"
    ):
        instantiate_from_config(config.model)


def test_conditions_are_cut_to_a_batch():
    c = torch.arange(6).reshape(3, 2)
    assert torch.equal(trim(c, 2), c[:2]) and trim(["a", "b", "c"], 2) == ["a", "b"]
    cut = trim({"x": [c, c], "y": c, "t": ["a", "b", "c"]}, 1)
    assert [v.shape[0] for v in cut["x"]] == [1, 1] and cut["y"].shape[0] == 1 and cut["t"] == ["a"]


def test_next_steps_name_a_command_that_fits_the_model(text_model):
    assert "scripts/txt2img.py --ckpt logs/x" in text_model.next_steps("logs/x")


def test_the_door_to_the_published_names_stays_open():
    for name in ("q_sample", "p_losses", "apply_model", "get_learned_conditioning", "decode_first_stage", "encode_first_stage",
                 "differentiable_decode_first_stage", "progressive_denoising", "p_sample_loop", "sample_log", "ema_scope", "to_rgb"):  # fmt: skip
        assert callable(getattr(LatentDiffusion, name))


def test_pictures_of_conditions_are_as_wide_and_as_high_as_the_images(text_model):
    log = text_model.eval()._condition_pictures(
        {"caption": ["a", "b"]}, None, torch.zeros(2, 3, 16, 48), None, 2
    )
    assert log["conditioning"].shape == (2, 3, 16, 48)
