"""The transformer over a first stage: trained by a real Trainer, sampled, guided, windowed, re-drawn."""

import math
import subprocess
import sys

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from taming.checkpoint import CheckpointError, save_checkpoint
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.redraw import redraw
from taming.models.sliding_window import sample_windows

DD = {
    "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 0,
    "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
LABELS = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 6}}


def vq(channels=3, **params):
    dd = {**DD, "in_channels": channels, "out_ch": channels}
    params = {"ddconfig": dd, "lossconfig": NO_LOSS, "n_embed": 12, "embed_dim": 4, **params}
    return {"target": "taming.models.vqgan.VQModel", "params": params}


def build(cond=LABELS, block_size=32, vocab_size=20, gpt=None, **options):
    torch.manual_seed(2)
    params = {
        "vocab_size": vocab_size,
        "block_size": block_size,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        **(gpt or {}),
    }
    model = Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": params}, vq(), cond, **{"cond_stage_key": "class_label", **options}
    )  # fmt: skip
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stage = model.first_stage_model
    with torch.no_grad():  # a codebook of latents, so that images have many codes
        latents = stage.encode_to_prequant(torch.randn(1, 3, 16, 16)).flatten(2)[0].t()
        stage.quantize.embedding.weight.copy_(latents[:12])
    model.learning_rate = 1e-3
    return model.eval()


def batch(n=2):
    return {"image": torch.rand(n, 16, 16, 3) * 2 - 1, "class_label": torch.arange(n) % 6}


def fit(model, tmp_path, data=None, **options):
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **{"max_epochs": 1, **options},
    )  # fmt: skip
    data = data or [{k: v[0] for k, v in batch(1).items()} for _ in range(4)]
    trainer.fit(model.train(), DataLoader(data, batch_size=2), DataLoader(data, batch_size=2))
    return trainer


# --------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_the_cross_entropy_of_codes_given_condition_and_codes_before():
    model, data = build(), batch()
    z, c = model.encode_to_z(model.get_xc(data)[0])[1], data["class_label"][:, None]
    loss = 0
    for n in range(16):
        logits = model.transformer(torch.cat([c, z[:, :n]], dim=1))[0][:, -1]
        loss += F.cross_entropy(logits, z[:, n]) / 16
    torch.testing.assert_close(model.shared_step(data, 0), loss)


def test_a_trainer_moves_the_transformer_only_and_logs_bits(tmp_path):
    model = build(use_ema=True, monitor="val/loss")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    metrics = fit(model, tmp_path).callback_metrics
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"transformer"}
    assert not model.first_stage_model.training
    for split in ("val", "val_ema"):
        bits = float(metrics[f"{split}/loss"]) / math.log(2)
        assert float(metrics[f"{split}/bits_per_token"]) == pytest.approx(bits, rel=1e-5)
    assert "train/loss" in metrics and float(metrics["val/loss"]) != float(metrics["val_ema/loss"])


def test_the_learning_rate_follows_its_multiplier(tmp_path):
    schedule = {
        "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
        "params": {"warm_up_steps": 4, "lr_min": 0.0, "lr_max": 1.0, "lr_start": 0.0, "max_decay_steps": 8},
    }
    trainer = fit(build(scheduler_config=schedule), tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 2 / 4)


def test_a_model_learns_what_class_means(tmp_path):
    """Codes that depend on the class alone: the loss falls far below that of guessing."""
    model = build(gpt={"n_layer": 1})
    images = batch(6)
    data = [{k: v[i] for k, v in images.items()} for i in range(6)] * 4
    model.learning_rate = 2e-2
    start = float(model.shared_step(images, 0))
    fit(model, tmp_path, data, max_epochs=8)
    assert float(model.eval().shared_step(images, 0)) < 0.3 * min(start, math.log(20))


def test_dropped_conditions_become_the_null_token_in_training_only():
    model, data = build(cond_drop_prob=1.0, null_cond=6), batch()
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0].tolist()))
    model.shared_step(data, 0)
    model.train()
    model.shared_step(data, 0)
    assert seen == [[0, 1], [6, 6]]


def test_conditions_drop_with_their_probability():
    model, data = build(cond_drop_prob=0.25, null_cond=6).train(), batch()
    data = {k: v[:1].repeat(400, *[1] * (v.ndim - 1)) for k, v in data.items()}
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 0]))
    with torch.no_grad():
        model.shared_step(data, 0)
    assert float((seen[0] == 6).float().mean()) == pytest.approx(0.25, abs=0.1)  # over four deviations


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cond_drop_prob": 1.5}, "cond_drop_prob=1.5"),
        ({"cond_drop_prob": 0.1}, "needs null_cond"),
        ({"null_cond": 20}, "null_cond=20 needs a row in the transformer's vocabulary of 20"),
    ],
)
def test_bad_guidance_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_ignored_keys_are_left_out_and_other_sizes_are_named(tmp_path):
    model, path = build(), tmp_path / "model.ckpt"
    save_checkpoint({"state_dict": build().state_dict()}, path)
    with torch.no_grad():
        model.transformer.pos_emb.zero_()
        model.transformer.ln_f.bias.fill_(7)
    model.init_from_ckpt(path, ignore_keys=["transformer.ln_f"])
    assert model.transformer.pos_emb.abs().max() > 0 and (model.transformer.ln_f.bias == 7).all()
    with pytest.raises(CheckpointError, match="does not fit Net2NetTransformer"):
        build(gpt={"n_embd": 8}, ckpt_path=path)


def test_the_averaged_transformer_stands_in_within_its_scope_and_is_saved(tmp_path):
    model = build(use_ema=True)
    assert any(name.startswith("model_ema.") for name in model.state_dict())
    live = model.transformer.head.weight.detach().clone()
    model.model_ema.headweight.zero_()
    with model.ema_scope():
        assert (model.transformer.head.weight == 0).all()
    assert torch.equal(model.transformer.head.weight, live)


# --------------------------------------------------------------------------------------------------------- sampling


def test_codes_are_the_likeliest_ones_given_condition_and_start():
    model = build()
    z, c = torch.randint(0, 12, (2, 5)), torch.tensor([[1], [4]])
    codes = model.sample(z, c, 7)
    assert torch.equal(codes[:, :5], z)
    for n in range(5, 12):
        logits = model.transformer(torch.cat([c, codes[:, :n]], dim=1))[0][:, -1]
        assert torch.equal(logits[:, :12].argmax(dim=-1), codes[:, n])


def test_the_short_call_draws_codes_for_a_condition():
    model = build()
    torch.manual_seed(7)
    short = model.sample(torch.tensor([3, 5]), num_steps=16, temperature=1.3)
    torch.manual_seed(7)
    empty = torch.empty(2, 0, dtype=torch.long)
    published = model.sample(empty, torch.tensor([[3], [5]]), 16, temperature=1.3, sample=True)
    assert torch.equal(short, published) and short.shape == (2, 16)
    assert model.sample(3, num_steps=4, num_samples=3).shape == (3, 4)
    assert model.sample(condition=[1, 2], num_steps=4, sample=False).shape == (2, 4)
    with pytest.raises(AssertionError, match="100 tokens .* block holds 32"):
        model.sample(2)


def test_an_unconditional_model_needs_no_condition():
    model = build("__is_unconditional__", sos_token=13)
    assert model.generate(num_steps=5, num_samples=2).shape == (2, 5)
    assert model.condition_tokens().tolist() == [[13]]
    with pytest.raises(ValueError, match="conditioned on 'class_label'"):
        build().generate()


def test_a_flat_condition_of_a_vqgan_works_everywhere():
    model = build(vq(1, n_embed=10), cond_stage_key="depth")
    data = batch() | {"depth": torch.rand(2, 16, 16)}
    x, c = model.get_xc(data)
    flat = model.encode_to_c(c)[1]
    assert flat.shape == (32,)
    assert model(x, c)[0].shape == (2, 16, 20)
    assert model.sample(torch.empty(2, 0, dtype=torch.long), flat, 3).shape == (2, 3)
    assert model.condition_tokens(c).shape == (2, 16)


def test_guidance_of_one_changes_nothing_and_more_moves_away_from_the_null_class():
    model = build(null_cond=6)
    c = torch.tensor([2])
    plain = model.generate(c, 12, sample=False)
    assert torch.equal(plain, model.generate(c, 12, sample=False, guidance=1.0))
    guided = model.generate(c, 12, sample=False, guidance=4.0)
    first = torch.stack([model.transformer(torch.tensor([[t]]))[0][0, -1] for t in (2, 6)])
    assert guided[0, 0] == (first[1] + 4 * (first[0] - first[1]))[:12].argmax()
    with pytest.raises(ValueError, match="has no null_cond"):
        build().generate(c, 2, guidance=2.0)


def test_labels_outside_the_classes_training_mode_and_bad_shapes_are_named():
    model = build()
    with pytest.raises(ValueError, match=r"labels \[6\] must lie between 0 and 5"):
        model.generate(6, 2)
    with pytest.raises(AssertionError, match="must be"):
        model.sample(torch.zeros(3, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), 2)
    with pytest.raises(AssertionError, match=r"model.eval\(\)"):
        model.train().generate(1, 2)
    with pytest.raises(KeyError, match="Did you mean 'image'"):
        model.get_input("imag", batch())


def test_a_model_that_keeps_no_codes_fills_from_its_condition():
    model = build("__is_first_stage__", pkeep=0.0, cond_stage_key="image")
    c = model.encode_to_z(torch.randn(2, 3, 16, 16))[1]
    codes = model.sample(c[:, :0], c, 16)
    logits = model.transformer(torch.cat([c, c[:, :-1]], dim=1))[0]
    assert torch.equal(codes, logits[:, 15:, :12].argmax(dim=-1))
    with pytest.raises(ValueError, match="too few"):
        model.sample(c[:, :8], c, 12)


def test_codes_in_another_order_decode_to_the_same_image():
    order = {"target": "taming.modules.transformer.permuter.SpiralOut", "params": {"H": 4, "W": 4}}
    plain, spiral = build(), build(permuter_config=order)
    x = torch.randn(2, 3, 16, 16)
    quant, z = spiral.encode_to_z(x)
    assert len(z.unique()) > 3 and not torch.equal(z, plain.encode_to_z(x)[1])
    image = plain.decode_to_img(plain.encode_to_z(x)[1], quant.shape)
    torch.testing.assert_close(spiral.decode_to_img(z, quant.shape), image)


def test_pictures_are_logged_for_classes_and_small_vocabularies():
    log = build(use_ema=True, block_size=16).log_images(batch(6), split="val")
    assert list(log) == ["inputs", "reconstructions", "samples_half", "samples_nopix", "samples_det"]
    assert all(v.shape == (4, 3, 16, 16) for v in log.values())


def test_texts_are_a_condition_like_any_other(tmp_path):
    text = {
        "target": "ldm.modules.encoders.tokenizers.BPETokenizer",
        "params": {"device": "cpu", "vocab_size": 600, "max_length": 6, "offset": 12},
    }
    model = build(text, vocab_size=612, cond_stage_key="caption")
    captions = ["red heart", "ghost"]
    data = {"image": batch()["image"], "caption": captions}
    fit(model, tmp_path, data=[{k: v[i] for k, v in data.items()} for i in (0, 1)])
    model.eval()
    log = model.log_images(data)
    assert log["conditioning"].shape == (2, 3, 16, 16) and log["samples_det"].shape == (2, 3, 16, 16)
    codes = model.sample(captions, num_steps=16, sample=False)
    assert torch.equal(codes[:1], model.sample("red heart", num_steps=16, sample=False))
    tokens = model.condition_tokens("ghost")
    assert tokens.shape == (1, 6) and int(tokens.min()) >= 12  # behind the codes
    assert not torch.equal(tokens, model.condition_tokens("red heart"))


def test_only_tokens_that_are_codes_are_drawn():
    """The vocabulary holds 20 tokens, the codebook 12 codes: the others are classes."""
    model = build()
    with torch.no_grad():
        model.transformer.head.weight[12:] *= 100  # the likeliest tokens by far
    for sample in (True, False):
        assert model.generate([1, 2, 3], 16, sample=sample).max() < 12
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    assert sample_windows(model, codes, torch.tensor([[1]]), window=4).max() < 12


# --------------------------------------------------------------------------------------------------- sliding windows


def published_windows(model, cond, codes, window):
    """The published procedure: full windows, stale codes behind the causal mask, the likeliest code."""
    codes = codes.clone()
    _, height, width = codes.shape
    half = window // 2
    for i in range(height):
        li = i if i <= half else window - (height - i) if height - i < half else half
        for j in range(width):
            lj = j if j <= half else window - (width - j) if width - j < half else half
            crop = (slice(None), slice(i - li, i - li + window), slice(j - lj, j - lj + window))
            patch = torch.cat([cond[crop].flatten(1), codes[crop].flatten(1)], dim=1)[:, :-1]
            logits = model.transformer(patch)[0][:, -(window**2) :]
            codes[:, i, j] = logits.reshape(-1, window, window, logits.shape[-1])[:, li, lj, :12].argmax(
                dim=-1
            )
    return codes


@pytest.mark.parametrize("size", [(4, 4), (7, 10), (4, 9), (11, 4)])
def test_a_sliding_window_draws_what_the_published_loop_draws(size):
    model = build(vq(1, n_embed=10), cond_stage_key="depth", block_size=31)
    cond, stale = torch.randint(0, 10, (2, *size)), torch.randint(0, 12, (2, *size))
    with torch.no_grad():
        expected = published_windows(model, cond, stale, 4)
    kept, seen = stale.clone(), []
    codes = sample_windows(
        model, stale, cond, window=4, sample=False, callback=lambda i, j, idx: seen.append((i, j))
    )
    assert torch.equal(codes, expected) and torch.equal(stale, kept)
    assert seen == [(i, j) for i in range(size[0]) for j in range(size[1])]


def test_completion_keeps_the_upper_half_and_equals_plain_sampling_in_one_window():
    model, codes = build(), torch.randint(0, 12, (2, 4, 4))
    c = torch.tensor([[1], [4]])
    completed = sample_windows(model, codes, c, window=4, first_row=2, sample=False)
    assert torch.equal(completed[:, :2], codes[:, :2])
    assert torch.equal(completed.flatten(1), model.sample(codes.flatten(1)[:, :8], c, 8))


def test_a_mask_says_what_is_drawn_for_each_image():
    model, codes = build(), torch.full((2, 4, 6), 15)
    mask = torch.zeros(2, 4, 6, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, 5] = True
    drawn = sample_windows(model, codes, torch.tensor([[1], [4]]), window=4, mask=mask, top_k=3)
    assert (drawn[~mask] == 15).all()


def test_a_condition_can_be_made_for_each_window():
    model, asked = build(), []

    def layout(top, left):
        asked.append((top, left))
        return torch.tensor([[top], [left]])

    codes = torch.zeros(2, 4, 6, dtype=torch.long)
    out = sample_windows(model, codes, layout, window=4, lead=1, sample=False)
    assert asked == [(0, left) for _ in range(4) for left in (0, 1, 2)]
    first = model.transformer(torch.tensor([[0], [0]]))[0][:, -1, :12].argmax(dim=-1)
    assert torch.equal(out[:, 0, 0], first)


def test_guided_windows_equal_guided_sampling_where_one_window_is_all():
    model, c = build(null_cond=6), torch.tensor([[1], [4]])
    codes = sample_windows(
        model, torch.zeros(2, 4, 4, dtype=torch.long), c, window=4, guidance=3.0, sample=False
    )
    expected = model.sample(c[:, :0], c, 16, guidance=3.0)
    assert torch.equal(codes.flatten(1), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"codes": torch.zeros(1, 3, 9, dtype=torch.long)}, "3x9, smaller than the window of 4"),
        ({"condition": torch.zeros(1, 5, 5, dtype=torch.long)}, r"\(1, 5, 5\) must be a map of the codes' size \(1, 4, 6\)"),
        ({"first_row": 5}, "first_row=5"),
        ({"window": 6}, "4x6, smaller than the window of 6"),
        ({"temperature": -1.0}, "temperature"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_named(change, message):
    arguments = {"codes": torch.zeros(1, 4, 6, dtype=torch.long), "condition": torch.ones(1, 1, dtype=torch.long), "window": 4, **change}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sample_windows(build(), **arguments)


def test_other_orders_and_short_blocks_cannot_slide():
    order = {"target": "taming.modules.transformer.permuter.ZCurve", "params": {"H": 4, "W": 4}}
    codes, c = torch.zeros(1, 4, 6, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="order ZCurve"):
        sample_windows(build(permuter_config=order), codes, c, window=4)
    with pytest.raises(AssertionError, match="16 tokens .* block holds 12"):
        sample_windows(build(block_size=12), codes, c, window=4)


# ----------------------------------------------------------------------------------------------------------- redraw


@pytest.mark.parametrize("strength, kept", [(0.0, 16), (0.25, 12), (1.0, 0)])
def test_redrawing_changes_the_last_share_of_the_codes(strength, kept):
    model = build()
    x, label = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    quant, z = model.encode_to_z(x)
    out = redraw(model.first_stage_model, x, label, strength, model, sample=False)
    short = model.first_stage_model.transform(x, label, strength, transformer=model, sample=False)
    assert torch.equal(short, out)
    codes = model.sample(z[:, :kept], label[:, None], 16 - kept)
    torch.testing.assert_close(out, model.decode_to_img(codes, quant.shape))


def test_redrawing_follows_the_permuter():
    order = {"target": "taming.modules.transformer.permuter.Subsample", "params": {"H": 4, "W": 4}}
    model = build(permuter_config=order)
    x = torch.randn(1, 3, 16, 16)
    quant, z = model.encode_to_z(x)
    out = redraw(model.first_stage_model, x, 2, 0.5, model, sample=False)
    expected = model.decode_to_img(model.sample(z[:, :8], torch.tensor([[2]]), 8), quant.shape)
    torch.testing.assert_close(out, expected)


def test_a_larger_image_is_redrawn_by_the_window():
    model = build(block_size=256)
    x = torch.randn(1, 3, 64, 68)  # 16 x 17 codes: more than the block
    quant, z = model.encode_to_z(x)
    out = redraw(model.first_stage_model, x, 2, 0.1, model, sample=False, compiled=True)
    mask = (torch.arange(272) >= 272 - 27).reshape(16, 17)
    codes = sample_windows(model, z.reshape(1, 16, 17), torch.tensor([[2]]), mask=mask, sample=False)
    torch.testing.assert_close(out, model.decode_to_img(codes.flatten(1), quant.shape))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"strength": 1.2}, "strength=1.2 must lie between 0 .* and 1"),
        ({"image": torch.zeros(3, 16, 16)}, r"must be \(b, c, h, w\)"),
        ({"transformer": None}, "needs transformer="),
        ({"condition": [1, 2, 3]}, "2 images came with 3 conditions"),
    ],
)
def test_what_cannot_be_redrawn_is_named(change, message):
    model = build()
    arguments = {"image": torch.zeros(2, 3, 16, 16), "condition": 1, "transformer": model, **change}
    with pytest.raises(ValueError, match=message):
        redraw(model.first_stage_model, **arguments)


def test_a_transformer_of_another_codebook_is_refused():
    from taming.models.vqgan import VQModel

    with pytest.raises(ValueError, match="codebook of 12 codes, this model has 9"):
        redraw(VQModel(**vq(n_embed=9)["params"]), torch.zeros(1, 3, 16, 16), 1, transformer=build())


# ------------------------------------------------------------------------------------------------------------ names


def test_models_have_short_names_and_importing_the_package_stays_light():
    code = "import sys, taming.models; print('torch' in sys.modules, 'pytorch_lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    import taming.models
    from taming.models import Transformer, VQModel

    assert (Transformer.__name__, VQModel.__name__) == ("Net2NetTransformer", "VQModel")
    with pytest.raises(AttributeError, match="VQModell"):
        taming.models.VQModell  # noqa: B018
