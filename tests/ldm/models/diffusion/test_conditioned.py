import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.models.diffusion import ddpm
from ldm.models.diffusion.conditioned import FIRST_CONVOLUTION, stretch
from ldm.models.diffusion.wrapper import DiffusionWrapper
from taming.util import instantiate_from_config

NOISED = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"max_noise_level": 20, "noise_schedule_config": {"linear_end": 0.02}},
}


class Lengths(nn.Module):
    """Stands in for a text encoder: the length of a text is its meaning."""

    def encode(self, texts):
        return torch.stack([torch.full((4, 8), 0.1 * len(text)) for text in texts])


WORDS = ["a cat", "a dog", "two birds"]


def build(tiny, kind, **params):
    config = copy.deepcopy(tiny.latent_diffusion(**{"timesteps": 20, "log_every_t": 10, **params}))
    config["target"] = f"ldm.models.diffusion.ddpm.{kind}"
    model = instantiate_from_config(config)
    if isinstance(model.cond_stage_model, nn.Identity):
        model.cond_stage_model = Lengths()
    model.learning_rate = 1e-3
    return model


def filled(model):
    """Networks begin with outputs of zero: give them some that tell weights apart."""
    for p in model.parameters():
        p.data.normal_(0, 0.1)
    return model


def pictures(*names, n=3, size=8, channels=3):
    return {name: torch.rand(n, size, size, channels) * 2 - 1 for name in names}


def inpainting(tiny, **params):
    return build(
        tiny, "LatentInpaintDiffusion",
        **{"finetune_keys": None, "conditioning_key": "hybrid", "cond_stage_key": "txt", "unet": {"in_channels": 7}, **params},
    )  # fmt: skip


def inpainting_batch():
    masks = (torch.rand(3, 16, 16, 1) > 0.5).float()
    return {**pictures("image", "masked_image"), "mask": masks, "txt": WORDS}


# ------------------------------------------------------------------------------------------------------- inpainting


def test_the_mask_comes_first_and_in_the_latents_size_then_the_masked_picture_encoded(tiny):
    model, batch = inpainting(tiny, scale_factor=0.5), inpainting_batch()
    z, cond = model.get_input(batch, "image", bs=2)
    joined = cond["c_concat"][0]
    assert joined.shape == (2, 4, 8, 8) and len(z) == len(cond["c_crossattn"][0]) == 2
    assert torch.equal(joined[:, :1], batch["mask"][:2, ::2, ::2].permute(0, 3, 1, 2))
    assert torch.allclose(joined[:, 1:], 0.5 * batch["masked_image"][:2].permute(0, 3, 1, 2))
    assert len(model.get_input(batch, "image", return_first_stage_outputs=True)) == 5


def test_masks_need_no_channel_axis(tiny):
    model, batch = inpainting(tiny), inpainting_batch()
    expected = model.get_input(batch, "image")[1]["c_concat"][0]
    flat = model.get_input({**batch, "mask": batch["mask"][..., 0]}, "image")[1]["c_concat"][0]
    assert torch.equal(flat, expected)


def test_an_inpainting_model_trains_and_logs_its_masked_pictures(tiny):
    model, batch = inpainting(tiny, c_concat_log_start=1), inpainting_batch()
    model.training_step(batch, 0).backward()
    assert float(model.model.diffusion_model.out[-1].weight.grad.abs().sum()) > 0
    log = model.eval().log_images(
        batch, N=2, ddim_steps=2, unconditional_guidance_scale=3.0, unconditional_guidance_label=[""]
    )
    assert list(log) == [
        "inputs", "reconstruction", "c_concat_decoded", "masked_image", "conditioning", "diffusion_row", "samples", "samples_cfg_scale_3.00",
    ]  # fmt: skip
    assert torch.allclose(log["c_concat_decoded"], batch["masked_image"][:2].permute(0, 3, 1, 2))
    kept = model.log_images(batch, N=1, ddim_steps=2, return_keys=["samples"])
    assert list(kept) == ["samples"] and len(kept["samples"]) == 1


def test_a_widened_model_begins_as_the_checkpoint_it_goes_on_from(tiny, tmp_path):
    base = filled(build(tiny, "LatentDiffusion", use_ema=True))
    torch.save({"state_dict": base.state_dict()}, tmp_path / "base.ckpt")
    model = inpainting(
        tiny, ckpt_path=str(tmp_path / "base.ckpt"), finetune_keys=FIRST_CONVOLUTION, keep_finetune_dims=3, use_ema=True
    )  # fmt: skip
    x, t, context = torch.randn(2, 3, 8, 8), torch.tensor([3, 12]), torch.randn(2, 4, 8)
    joined = {"c_concat": [torch.randn(2, 4, 8, 8)], "c_crossattn": [context]}
    for averaged in (False, True):
        old, new = (m.ema_scope() if averaged else torch.no_grad() for m in (base, model))
        with old, new:
            assert torch.allclose(model.apply_model(x, t, joined), base.apply_model(x, t, context), atol=1e-6)


def test_a_widened_model_can_be_resumed_without_losing_its_new_channels(tiny, tmp_path, caplog):
    trained = filled(inpainting(tiny))
    path = str(tmp_path / "trained.ckpt")
    torch.save({"state_dict": trained.state_dict()}, path)
    name = FIRST_CONVOLUTION[0]
    resumed = inpainting(tiny, ckpt_path=path, finetune_keys=None)
    assert torch.equal(resumed.state_dict()[name], trained.state_dict()[name])
    with caplog.at_level(logging.WARNING):
        emptied = inpainting(tiny, ckpt_path=path, finetune_keys=[name], keep_finetune_dims=3)
    assert float(emptied.state_dict()[name][:, 3:].abs().sum()) == 0
    assert "finetune_keys: null keeps them" in caplog.text
    with pytest.raises(ValueError, match=r"input_blocks.0.0.weight is \(32, 7, 3, 3\).*keep_finetune_dims"):
        inpainting(tiny, ckpt_path=path, finetune_keys=[name], keep_finetune_dims=8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"finetune_keys": FIRST_CONVOLUTION}, "name it as ckpt_path"),
        ({"masked_image_key": "hidden"}, "must be one of concat_keys"),
    ],
)
def test_inpainting_options_that_do_not_go_together_are_refused(tiny, params, message):
    with pytest.raises(AssertionError, match=message):
        inpainting(tiny, **params)


def test_models_with_joined_pictures_refuse_to_train_their_text_encoder(tiny):
    model = inpainting(tiny, cond_stage_trainable=True)
    with pytest.raises(AssertionError, match="set cond_stage_trainable to false"):
        model.get_input(inpainting_batch(), "image")


# ------------------------------------------------------------------------------------------------------------ depth


def depth_model(tiny, **params):
    stage = {"target": "torch.nn.Conv2d", "params": {"in_channels": 3, "out_channels": 1, "kernel_size": 1}}
    return build(
        tiny, "LatentDepth2ImageDiffusion",
        **{"depth_stage_config": stage, "finetune_keys": None, "conditioning_key": "hybrid", "cond_stage_key": "txt",
           "unet": {"in_channels": 4}, **params},
    )  # fmt: skip


def test_depth_is_stretched_for_each_picture_to_the_whole_range():
    ramp = torch.linspace(2, 6, 5).reshape(1, 1, 1, 5)
    assert stretch(ramp).flatten().tolist() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert stretch(torch.full((1, 1, 2, 2), 3.0)).unique().tolist() == [-1.0]
    both = stretch(torch.cat([ramp, 10 * ramp]), slack=0.001)
    assert torch.allclose(both[0], both[1], atol=1e-3) and float(both[0].max()) == pytest.approx(1 - 2 * 0.001 / 4, abs=1e-4)  # fmt: skip


def test_a_depth_model_reads_the_estimators_own_input_and_logs_its_depth(tiny):
    model = depth_model(tiny)
    batch = {**pictures("image"), "midas_in": torch.randn(3, 3, 24, 24), "txt": WORDS}
    z, cond = model.get_input(batch, "image", bs=2)
    depth = cond["c_concat"][0]
    assert z.shape == (2, 3, 8, 8) and depth.shape == (2, 1, 8, 8)
    assert depth.amin(dim=(1, 2, 3)).tolist() == [-1.0, -1.0]
    model.training_step(batch, 0).backward()
    assert all(p.grad is None for p in model.depth_model.parameters())
    log = model.eval().log_images(batch, N=2, ddim_steps=2)
    assert log["depth"].shape == (2, 1, 24, 24) and float(log["depth"].max()) == pytest.approx(1.0)
    with pytest.raises(AssertionError, match="from one entry of a batch"):
        depth_model(tiny, concat_keys=("a", "b"))


def test_a_checkpoint_reaches_the_estimator_too(tiny, tmp_path):
    trained = filled(depth_model(tiny))
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "depth.ckpt")
    model = depth_model(tiny, ckpt_path=str(tmp_path / "depth.ckpt"))
    assert torch.equal(model.depth_model.weight, trained.depth_model.weight)


# --------------------------------------------------------------------------------------------------------- upscaling


def upscaler(tiny, **params):
    return build(
        tiny, "LatentUpscaleDiffusion",
        **{"low_scale_config": NOISED, "low_scale_key": "lr", "conditioning_key": "hybrid-adm", "cond_stage_key": "txt",
           "parameterization": "v", "unet": {"in_channels": 6, "num_classes": 20}, **params},
    )  # fmt: skip


def test_an_upscaler_tells_the_network_how_noisy_the_small_picture_is(tiny):
    model, batch = upscaler(tiny), {**pictures("image", "lr"), "txt": WORDS}
    z, cond, x, _, text, small, seen, level = model.get_input(batch, "image", log_mode=True)
    assert torch.equal(cond["c_adm"], level) and int(level.min()) >= 0 and int(level.max()) < 20
    assert torch.equal(seen, cond["c_concat"][0]) and text == WORDS
    assert torch.equal(small, batch["lr"].permute(0, 3, 1, 2)) and x.shape == z.shape
    error = (seen - small).square().mean(dim=(1, 2, 3)) / (1 - model.low_scale_model.alphas_cumprod[level])
    assert ((error > 0.5) & (error < 2)).all()
    model.training_step(batch, 0).backward()
    log = model.eval().log_images(
        batch, N=2, ddim_steps=2, unconditional_guidance_scale=2.0, unconditional_guidance_label=[""]
    )
    assert [name.rstrip("-0123456789") for name in log][:4] == ["inputs", "reconstruction", "x_lr", "x_lr_rec_@noise_levels"]  # fmt: skip
    assert "samples_inpainting" not in log and log["samples_cfg_scale_2.00"].shape == (2, 3, 8, 8)


def test_an_upscaler_draws_its_noise_levels(tiny):
    model = upscaler(tiny, noise_level_key="level")
    with pytest.raises(NotImplementedError, match="leave it at null"):
        model.get_input({**pictures("image", "lr"), "txt": WORDS}, "image")


def test_reshuffling_turns_blocks_of_the_picture_into_channels(tiny):
    model = build(
        tiny, "LatentUpscaleFinetuneDiffusion", reshuffle_patch_size=2, finetune_keys=None, conditioning_key="hybrid",
        cond_stage_key="txt", unet={"in_channels": 15},
    )  # fmt: skip
    batch = {**pictures("image"), **pictures("lr", size=16), "txt": WORDS}
    z, cond = model.get_input(batch, "image")
    joined, lr = cond["c_concat"][0], batch["lr"].permute(0, 3, 1, 2)
    assert set(cond) == {"c_concat", "c_crossattn"} and joined.shape == (3, 12, 8, 8)
    quarters = [lr[..., :8, :8], lr[..., :8, 8:], lr[..., 8:, :8], lr[..., 8:, 8:]]
    assert torch.equal(joined, torch.cat(quarters, dim=1))
    assert model.apply_model(z, torch.zeros(3).long(), cond).shape == z.shape
    assert torch.equal(model.log_images(batch, N=2, ddim_steps=2)["lr"], lr[:2])
    with pytest.raises(ValueError, match="multiples of reshuffle_patch_size=2"):
        model.get_input({**batch, **pictures("lr", size=9)}, "image")


def test_a_finetuned_upscaler_may_noise_one_of_its_pictures(tiny):
    model = build(
        tiny, "LatentUpscaleFinetuneDiffusion", concat_keys=("edges", "lr"), low_scale_config=NOISED, low_scale_key="lr",
        finetune_keys=None, conditioning_key="hybrid-adm", cond_stage_key="txt", unet={"in_channels": 9, "num_classes": 20},
    )  # fmt: skip
    batch = {**pictures("image", "edges", "lr"), "txt": WORDS}
    _, cond = model.get_input(batch, "image")
    assert torch.equal(cond["c_concat"][0][:, :3], batch["edges"].permute(0, 3, 1, 2))
    assert not torch.equal(cond["c_concat"][0][:, 3:], batch["lr"].permute(0, 3, 1, 2))
    assert cond["c_adm"].shape == (3,)


# --------------------------------------------------------------------------------------------------- image embedding


class Doubler(nn.Module):
    """Stands in for what noises embeddings: the vector doubled, and a code of its noise level."""

    def forward(self, x):
        return 2 * x, torch.ones(len(x), 4)


def unclip(tiny, **params):
    embedder = {"target": "torch.nn.Sequential"}
    model = build(
        tiny, "ImageEmbeddingConditionedLatentDiffusion",
        **{"embedder_config": embedder, "embedding_key": "pixels", "conditioning_key": "crossattn-adm", "cond_stage_key": "txt",
           "unet": {"num_classes": "sequential", "adm_in_channels": 12}, **params},
    )  # fmt: skip
    model.embedder.append(nn.Flatten())
    return model


def unclip_batch(n=3):
    return {**pictures("image", n=n), **pictures("pixels", n=n, size=2), "txt": ["a cat"] * n}


def test_embeddings_are_noised_and_told_how_much(tiny):
    model = unclip(tiny, unet={"num_classes": "sequential", "adm_in_channels": 16}).eval()
    model.noise_augmentor = Doubler()
    batch = unclip_batch()
    z, cond = model.get_input(batch, "image", bs=2)
    flat = batch["pixels"][:2].permute(0, 3, 1, 2).flatten(1)
    assert torch.equal(cond["c_adm"], torch.cat([2 * flat, torch.ones(2, 4)], dim=1))
    assert model.apply_model(z, torch.zeros(2).long(), cond).shape == z.shape


def test_embeddings_are_dropped_in_training_only(tiny):
    model, batch = unclip(tiny, embedding_dropout=0.25), unclip_batch(n=400)
    dropped = (model.get_input(batch, "image")[1]["c_adm"].abs().sum(dim=1) == 0).float().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.08)
    assert (model.eval().get_input(batch, "image")[1]["c_adm"].abs().sum(dim=1) > 0).all()


def test_an_embedder_learns_exactly_if_it_is_not_frozen(tiny):
    for frozen in (True, False):
        layer = {
            "target": "torch.nn.Conv2d",
            "params": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
        }
        model = build(
            tiny, "ImageEmbeddingConditionedLatentDiffusion", embedder_config=layer, embedding_key="pixels", embedding_dropout=0.0,
            freeze_embedder=frozen, conditioning_key="crossattn-adm", cond_stage_key="txt",
            unet={"num_classes": "sequential", "adm_in_channels": 12},
        )  # fmt: skip
        flat = nn.Flatten()
        model.embedder.register_forward_hook(lambda module, given, out, flat=flat: flat(out))
        for p in model.model.parameters():
            p.data.normal_(0, 0.1)
        model.training_step(unclip_batch(), 0).backward()
        weight = model.embedder.weight
        trained = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
        assert (weight.grad is None) == frozen and (id(weight) not in trained) == frozen


def test_variations_of_a_picture_are_logged_with_guidance_away_from_the_text(tiny):
    model = unclip(tiny, cond_stage_config=tiny.text).eval()
    batch = {**unclip_batch(), "txt": ["a cat", "a dog", "a bird"]}
    log = model.log_images(batch, N=2, ddim_steps=2, plot_diffusion_rows=False)
    assert list(log) == ["inputs", "reconstruction", "conditioning", "samples", "samplescfg_scale_5.00"]
    model.cond_stage_key = "image"
    with pytest.raises(AssertionError, match="'caption' or 'txt', not 'image'"):
        model.log_images(batch)


# ------------------------------------------------------------------------------------------------------------ layout


def test_layouts_are_drawn_by_the_data_set_being_trained_on(tiny):
    text = {
        **tiny.text,
        "params": {**tiny.text["params"], "use_tokenizer": False, "vocab_size": 32, "tokenizer": "bert"},
    }
    model = build(
        tiny, "Layout2ImgDiffusion", cond_stage_key="coordinates_bbox", cond_stage_config=text
    ).eval()
    batch = {**pictures("image"), "coordinates_bbox": torch.randint(0, 32, (3, 6))}
    assert "bbox_image" not in model.log_images(batch, N=2, ddim_steps=2, plot_progressive_rows=False)

    def plot(row, label, size):
        return torch.full((3, *size), float(row.sum()) + len(label(0)))

    dataset = SimpleNamespace(
        conditional_builders={"coordinates_bbox": SimpleNamespace(plot=plot)},
        get_textual_label_for_category_no=lambda number: "cat",
    )
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets={"validation": dataset}))
    log = model.log_images(batch, N=2, ddim_steps=2, plot_progressive_rows=False)
    assert log["bbox_image"].shape == (2, 3, 256, 256)
    assert float(log["bbox_image"][1, 0, 0, 0]) == float(batch["coordinates_bbox"][1].sum()) + 3
    with pytest.raises(AssertionError, match="not on cond_stage_key='image'"):
        build(tiny, "Layout2ImgDiffusion", cond_stage_key="image")


# ----------------------------------------------------------------------------------------------------------- together


def test_every_model_has_its_published_path():
    assert {name for name in ddpm.__all__ if not hasattr(ddpm, name)} == set()
    assert all(issubclass(getattr(ddpm, name), ddpm.LatentDiffusion) for name in ddpm.__all__ if "Diffusion" in name and name != "DiffusionWrapper")  # fmt: skip


def test_pictures_that_do_not_fit_the_latents_are_refused_with_both_shapes(tiny):
    wrapper = DiffusionWrapper(copy.deepcopy({**tiny.unet, "params": {**tiny.unet["params"], "in_channels": 4}}), "hybrid")  # fmt: skip
    x, t, context = torch.randn(1, 3, 8, 8), torch.zeros(1).long(), [torch.randn(1, 4, 8)]
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\).*\(1, 3, 8, 8\).*must be the same"):
        wrapper(x, t, c_concat=[torch.randn(1, 1, 4, 4)], c_crossattn=context)
    with pytest.raises(ValueError, match="takes 4 channels, but the input has 3.*5 in all"):
        wrapper(x, t, c_concat=[torch.randn(1, 2, 8, 8)], c_crossattn=context)
    assert wrapper(x, t, c_concat=[torch.randn(1, 1, 8, 8)], c_crossattn=context).shape == (1, 3, 8, 8)
