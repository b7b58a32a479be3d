"""Low-rank adapters: their arithmetic, their files in every layout, and training them."""

import copy
import json

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm import conversion
from ldm.lora import Lora, inject, load_lora
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.clip import CLIPTextConfig, CLIPTextModel
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder
from taming.checkpoint import CheckpointError, load_into, load_model_from_config, load_state_dict
from taming.util import instantiate_from_config

UNET = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [1, 2],
    "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 16, "legacy": False,
}  # fmt: skip
CLIP = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 8,
}  # fmt: skip
OPEN_CLIP = {
    "embed_dim": 24,
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2},
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},
}
EVERYTHING = ["*"]


def filled(network):
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3 * p[0].numel() ** -0.5) if p.ndim > 1 else torch.nn.init.normal_(
            p, 0.8, 0.2
        )
    return network.eval()


def trained(lora):
    """As after a training: B is not zero."""
    for p in lora.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return lora


class Pipe(torch.nn.Module):
    """A UNet and text encoders, as models hold them."""

    def __init__(self, two=False, **unet):
        super().__init__()
        self.unet = filled(UNetModel(**{**UNET, **unet}))
        self.text = filled(CLIPTextModel(CLIPTextConfig(**CLIP)))
        if two:
            self.second = FrozenOpenCLIPEmbedder(arch=OPEN_CLIP, version=None)
            filled(self.second.model)

    def forward(self, x, ids):
        return self.unet(x, torch.tensor([5, 300]), self.text(ids).last_hidden_state)


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def inputs():
    return torch.randn(2, 4, 8, 8), torch.randint(0, 50, (2, 8))


# ---------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "layer, x",
    [
        (torch.nn.Linear(6, 5), torch.randn(3, 6)),
        (torch.nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 8, 8)),
        (torch.nn.Conv2d(4, 6, 1), torch.randn(2, 4, 8, 8)),
    ],
    ids=["linear", "convolution", "pointwise"],
)
def test_a_layer_computes_with_w_plus_scale_alpha_over_r_ba(layer, x):
    expected, model = copy.deepcopy(layer), torch.nn.Module()
    model.cond_stage_model = torch.nn.Module()
    model.cond_stage_model.to_q = layer
    lora = trained(inject(model, rank=2, alpha=3, text_encoder=True))
    lora.scale = 0.7
    (adapter,) = lora.values()
    b, a = adapter.lora_up.weight.flatten(1), adapter.lora_down.weight.flatten(1)
    expected.weight.data += (0.7 * 3 / 2 * b @ a).reshape(layer.weight.shape)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected(x), atol=1e-5)


def test_fresh_adapters_change_nothing_and_no_name(pipe, inputs):
    names, before = list(pipe.state_dict()), pipe(*inputs)
    lora = inject(pipe, rank=4, text_encoder=True)
    assert list(pipe.state_dict()) == names and torch.equal(pipe(*inputs), before)
    # transformers × attentions × projections, and those of CLIP's layers
    assert len(lora) == 7 * 2 * 4 + 2 * 4


@pytest.mark.parametrize("kind", ["layers of ours", "PyTorch's fused attention"])
def test_attached_and_merged_give_the_same_and_both_go_without_a_trace(kind):
    if kind == "layers of ours":
        model = Pipe()
        run = lambda: model(torch.ones(2, 4, 8, 8), torch.arange(16).reshape(2, 8))  # noqa: E731
    else:
        model = filled_open_clip()
        run = lambda: model.encode_with_transformer(torch.arange(16).reshape(2, 8))  # noqa: E731
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loras = [trained(inject(model, rank, 1.5, EVERYTHING, text_encoder=True)) for rank in (2, 3)]
    loras[1].scale = 0.5
    with torch.no_grad():
        attached = run()
        for lora in loras:
            lora.merge()
        merged = run()
        assert torch.allclose(attached, merged, atol=1e-4 * float(attached.abs().max()))
        loras[0].unmerge()  # the first to come is the first to go
        alone = run()
        loras[1].unmerge().attach()
        assert torch.allclose(run(), alone, atol=1e-4 * float(alone.abs().max()))
        loras[1].detach()
        plain = run()
    assert not torch.allclose(plain, attached, atol=1e-2) and not torch.allclose(plain, alone, atol=1e-3)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def filled_open_clip():
    encoder = FrozenOpenCLIPEmbedder(arch=OPEN_CLIP, version=None)
    filled(encoder.model)
    return encoder


def test_the_scale_of_merged_adapters_can_still_be_changed(pipe, inputs):
    lora = trained(inject(pipe, rank=2, targets=["attn2.*"])).merge()
    with torch.no_grad():
        full = pipe(*inputs)
        lora.scale = 0.25
        quarter = pipe(*inputs)
        lora.unmerge().attach()
        assert torch.allclose(pipe(*inputs), quarter, atol=1e-5) and not torch.allclose(full, quarter)
        with pytest.raises(RuntimeError, match="unmerge it before"):
            lora.merge().attach()


def test_half_precision_weights_come_back_to_the_bit(pipe):
    pipe.half()
    before = {k: v.clone() for k, v in pipe.state_dict().items()}
    lora = trained(inject(pipe, rank=2))
    lora.merge()
    assert any(not torch.equal(v, before[k]) for k, v in pipe.state_dict().items())
    lora.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in pipe.state_dict().items())


def test_gradients_reach_adapters_of_fused_attention_and_nothing_else():
    encoder = filled_open_clip()  # frozen
    lora = trained(inject(encoder, rank=2, text_encoder=True, dropout=0.1)).train()
    encoder.encode_with_transformer(torch.arange(8)[None]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())
    assert all(p.grad is None for p in encoder.parameters())


def test_a_copy_of_a_model_has_adapters_of_its_own(pipe, inputs):
    lora = trained(inject(pipe, rank=2))
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        before = twin(*inputs)
        lora.scale = 0.0
        assert torch.equal(twin(*inputs), before) and not torch.allclose(pipe(*inputs), before)


# --------------------------------------------------------------------------------------------------------------- files


def everything(model, **options):
    return trained(inject(model, rank=2, alpha=5, targets=EVERYTHING, text_encoder=True, **options))


@pytest.mark.parametrize("layout", ["kohya", "kohya-ldm", "diffusers"])
@pytest.mark.parametrize("two", [False, True], ids=["one text encoder", "two"])
def test_every_layout_is_read_back_as_it_was_written(layout, two, inputs, tmp_path):
    pipe = Pipe(two)
    lora = everything(pipe)
    with torch.no_grad():
        expected = pipe(*inputs)
        lora.save(tmp_path / "lora.safetensors", layout)
        lora.detach()
        plain = pipe(*inputs)
        again = load_lora(pipe, tmp_path / "lora.safetensors")
        assert torch.allclose(pipe(*inputs), expected, atol=1e-4 * float(expected.abs().max()))
    assert len(again) == len(lora) and not again.unused and not torch.allclose(plain, expected, atol=1e-2)
    for name, adapter in again.items():
        assert torch.allclose(adapter.delta(), lora[name].delta(), atol=1e-5)


def test_kohyas_names_are_those_that_are_published():
    """Names as they stand in LoRA files for SD 1, and for SDXL with its blocks as in the originals."""
    one, two = everything(Pipe()), everything(Pipe(two=True))
    first = set(one.weights("kohya"))
    assert (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in first
    )
    assert "lora_unet_mid_block_attentions_0_proj_in.alpha" in first
    assert "lora_unet_up_blocks_0_upsamplers_0_conv.lora_up.weight" in first
    assert "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight" in first
    second = set(two.weights("kohya-ldm"))
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_ff_net_0_proj.lora_down.weight" in second
    assert "lora_unet_middle_block_0_in_layers_2.alpha" in second
    assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight" in second
    assert "lora_te2_text_model_encoder_layers_1_self_attn_v_proj.lora_down.weight" in second
    assert "lora_te2_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight" in second


@pytest.mark.parametrize("layout", ["kohya", "kohya-ldm"])
def test_diffusers_own_reader_makes_our_diffusers_file_of_our_kohya_file(layout):
    """Its conversion of kohya's files, up to where it hands over to peft, gives names, weights and alphas."""
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    pipe = Pipe(two=True)
    lora = trained(inject(pipe, rank=2, alpha=5, targets=["transformer_blocks.*", "proj_in", "proj_out", "q_proj", "fc1"], text_encoder=True))  # fmt: skip
    kohya = _maybe_map_sgm_blocks_to_diffusers(
        dict(lora.weights(layout)), SimpleNamespace(layers_per_block=1)
    )
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(kohya)
    ours = lora.weights("diffusers")
    unet = convert_unet_state_dict_to_peft({k: v for k, v in converted.items() if k.startswith("unet.")})
    unet = {k.replace(".processor.", "."): v for k, v in unet.items()}
    assert unet.keys() == {k for k in ours if k.startswith("unet.")}
    for name, value in unet.items():
        assert torch.allclose(value * (5 / 2 if ".lora_B." in name else 1), ours[name])
    assert set(alphas.values()) == {5.0}
    # and we read what it made, old names of processors and all
    scaled = {k: v * (5 / 2 if ".up." in k else 1) for k, v in converted.items()}
    lora.detach()
    again = load_lora(pipe, scaled)
    assert len(again) == len(lora) and not again.unused
    assert all(torch.allclose(again[k].delta(), lora[k].delta(), atol=1e-5) for k in again)


def test_diffusers_writer_of_kohyas_layout_is_read():
    from diffusers.utils import convert_state_dict_to_kohya

    pipe = Pipe()
    lora = everything(pipe)
    written = convert_state_dict_to_kohya(lora.weights("diffusers"))  # with alphas of its own, the ranks
    again = load_lora(pipe, written)
    assert len(again) == len(lora) and not again.unused
    assert all(torch.allclose(again[k].delta(), lora[k].delta(), atol=1e-5) for k in again)


@pytest.mark.parametrize(
    "prefix, infix", [("unet.", ".lora.{}"), ("", ".lora.{}"), ("diffusion_model.", ".lora_{}"), ("base_model.model.", ".lora_{}")]
)  # fmt: skip
def test_further_spellings_in_the_wild_are_read(pipe, prefix, infix):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    if prefix == "diffusion_model.":
        layer = "middle_block.1.transformer_blocks.0.attn1.to_q"
    state = {
        f"{prefix}{layer}{infix.format('down')}.weight": torch.randn(4, 64),
        f"{prefix}{layer}{infix.format('up')}.weight": torch.randn(64, 4),
    }
    lora = load_lora(pipe, state)
    assert list(lora) == ["lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"] and not lora.unused


def test_pefts_alphas_are_read_from_the_metadata(pipe, tmp_path):
    layers = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "kq"]
    state = {f"{n}.lora_{side}.weight": torch.randn(s) for n in layers for side, s in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    notes = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}}
    save_file(state, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(notes)})
    assert [float(a.alpha) for a in load_lora(pipe, tmp_path / "peft.safetensors").values()] == [2, 8]
    notes["unet.use_rslora"] = True  # α/√r
    save_file(state, tmp_path / "peft.safetensors", {"lora_adapter_metadata": json.dumps(notes)})
    assert [float(a.factor) for a in load_lora(pipe, tmp_path / "peft.safetensors").values()] == [1, 4]


def peft_layers():
    names = [f"base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "kq"]
    return {f"{n}.lora_{side}.weight": torch.randn(s) for n in names for side, s in (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip


def test_pefts_alphas_are_read_from_the_configuration_beside_its_file(pipe, tmp_path, caplog):
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(peft_layers(), file)
    notes = {"r": 4, "lora_alpha": 8, "alpha_pattern": {r"attn\d\.to_k": 2}, "use_rslora": False}
    config.write_text(json.dumps(notes))
    assert [float(a.alpha) for a in load_lora(pipe, file).values()] == [2, 8]
    config.write_text(json.dumps({**notes, "use_rslora": True, "alpha_pattern": {"to_k": 2, "^to_q": 5}}))
    assert [float(a.factor) for a in load_lora(pipe, file).values()] == [1, 4]
    assert "α is taken to be the rank" not in caplog.text
    config.write_text(json.dumps({**notes, "alpha_pattern": {"(": 2}}))
    with pytest.raises(CheckpointError, match=r"alpha_pattern '\(' is no pattern"):
        load_lora(pipe, file)
    config.write_text("[1")
    with pytest.raises(
        CheckpointError, match=r"adapter_config.json: its notes on the LoRA are no JSON object"
    ):
        load_lora(pipe, file)


def test_a_file_of_pefts_without_its_configuration_is_warned_of(pipe, tmp_path, caplog):
    save_file(peft_layers(), tmp_path / "adapter_model.safetensors")
    lora = load_lora(pipe, tmp_path / "adapter_model.safetensors")
    assert [float(a.factor) for a in lora.values()] == [1, 1]
    assert (
        "adapter_model.safetensors does not say its α" in caplog.text and "adapter_config.json" in caplog.text
    )


def test_a_configuration_that_lies_beside_a_file_of_another_layout_is_not_its(pipe, tmp_path):
    state = {n.replace("base_model.model.", "unet."): v for n, v in peft_layers().items()}
    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8}))
    lora = load_lora(pipe, tmp_path / "pytorch_lora_weights.safetensors")
    assert [float(a.factor) for a in lora.values()] == [1, 1]


def test_a_matrix_for_a_pointwise_convolution_and_its_scale_are_understood(pipe):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    state = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(1.0),
    }
    lora = load_lora(pipe, state, scale=0.5)
    (adapter,) = lora.values()
    assert torch.allclose(adapter.delta().flatten(1), 0.5 * (1 / 2) * up @ down)


def test_other_text_encoders_are_adapted_under_their_own_names(tiny, tmp_path):
    model = instantiate_from_config(
        tiny.latent_diffusion(cond_stage_config=tiny.text, cond_stage_key="caption")
    )
    lora = trained(inject(model, rank=2, text_encoder=True))
    encoder = [name for name in lora if name.startswith("lora_te_transformer_attn_layers")]
    assert {name.rpartition("_to_")[2] for name in encoder} == {"q", "k", "v", "out"}
    lora.save(tmp_path / "bert.safetensors")
    assert load_lora(model, tmp_path / "bert.safetensors").keys() == lora.keys()
    with pytest.raises(ValueError, match="no counterpart in diffusers; save in layout 'kohya-ldm'"):
        lora.weights("diffusers")


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_named(pipe, caplog):
    good = "lora_unet_mid_block_attentions_0_proj_in"
    state = {
        f"{good}.lora_down.weight": torch.randn(2, 64, 1, 1),
        f"{good}.lora_up.weight": torch.randn(64, 2, 1, 1),
    }
    stray = {
        "lora_unet_up_blocks_7_proj.lora_down.weight": torch.ones(2, 3),
        "lora_unet_up_blocks_7_proj.lora_up.weight": torch.ones(3, 2),
        "emb_params": torch.ones(1),
        "lora_te_gone.alpha": torch.ones(()),
    }
    lora = load_lora(pipe, state | stray)
    assert sorted(lora.unused) == ["emb_params", "lora_te_gone.alpha", "lora_unet_up_blocks_7_proj"]
    assert "3 entries fit nowhere" in caplog.text and "lora_unet_up_blocks_7_proj" in caplog.text
    with pytest.raises(CheckpointError, match="No layer of the LoRA belongs to Pipe: it holds lora_unet_up"):
        load_lora(pipe, stray)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s, n: s | {f"{n}.lora_down.weight": torch.ones(2, 32, 1, 1)}, r"\(64, 32\) there and \(64, 64, 1, 1\) here"),
        (lambda s, n: s | {f"{n}.lora_up.weight": torch.ones(64, 3)}, r"\(64, 3\) where \(64, 2, 1, 1\) is wanted"),
        (lambda s, n: {k: v for k, v in s.items() if "up" not in k}, "has no up weight"),
        (lambda s, n: s | {f"{n}.dora_scale": torch.ones(64)}, "holds DoRA"),
        (lambda s, n: s | {f"{n}.hada_w1_a": torch.ones(64)}, "holds LoHa"),
    ],
    ids=["another model's", "ranks differ", "half", "DoRA", "LoHa"],
)  # fmt: skip
def test_files_of_another_kind_are_refused(pipe, inputs, change, message):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state = {f"{name}.lora_down.weight": torch.ones(2, 64), f"{name}.lora_up.weight": torch.ones(64, 2)}
    before = pipe(*inputs)
    with pytest.raises(CheckpointError, match=message):
        load_lora(pipe, change(state, name))
    assert torch.equal(pipe(*inputs), before)


def test_options_that_mean_nothing_are_refused(pipe, tiny):
    with pytest.raises(ValueError, match=r"no layer's path ends with 'to_kk'. Did you mean 'to_k'\?"):
        inject(pipe, targets=["to_kk"])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        inject(pipe, rank=0)
    with pytest.raises(ValueError, match="no layer to adapt with unet=False"):
        inject(pipe, unet=False)
    with pytest.raises(ValueError, match="no UNet and no text encoder"):
        inject(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="layout='koya' is unknown"):
        inject(pipe).weights("koya")
    with pytest.raises(ValueError, match="no option 'rnak'. Did you mean 'rank'"):
        instantiate_from_config(tiny.latent_diffusion(lora_config={"rnak": 4}))
    with pytest.raises(ValueError, match="set use_ema to False"):
        instantiate_from_config(tiny.latent_diffusion(lora_config={}, use_ema=True))


# ------------------------------------------------------------------------------------------------------------ training


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"image": torch.full((8, 8, 3), 0.5), "caption": "red heart"}


@pytest.fixture
def config(tiny):
    def make(**lora):
        return tiny.latent_diffusion(
            cond_stage_config=tiny.text, cond_stage_key="caption", lora_config={"rank": 4, "targets": ["*"], **lora},
        )  # fmt: skip

    return make


def fit(model, folder, epochs=1, **options):
    model.learning_rate = 5e-3
    checkpoint = pl.callbacks.ModelCheckpoint(folder, filename="last", save_last=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[checkpoint],
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(Pictures(), 4), **options)
    return folder / "last.ckpt"


def loss_of(model):
    model.eval()
    with torch.no_grad():
        batch = torch.utils.data.default_collate([Pictures()[0]] * 8)
        x, c = model.get_input(batch, "image")
        c = model.get_learned_conditioning(c) if model.cond_stage_trainable else c
        return float(
            model.p_losses(
                x,
                c,
                torch.arange(0, 800, 100),
                noise=torch.randn(x.shape, generator=torch.Generator().manual_seed(3)),
            )[0]
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text_encoder", [False, True])
def test_training_changes_adapters_only_and_its_checkpoint_loads_without_lora(config, text_encoder, tmp_path):
    settings = config(text_encoder=text_encoder)
    model = instantiate_from_config(settings)
    filled(model.model), filled(model.cond_stage_model)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("lora.")}
    loss = loss_of(model)
    path = fit(model, tmp_path, epochs=10)
    assert loss_of(model) < 0.6 * loss
    moved = {k for k, v in model.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert not moved
    # the adapters of text move if there are any: gradients pass through the encoder
    assert any(a.lora_up.weight.any() for n, a in model.lora.items() if "lora_te" in n) == text_encoder

    # without LoRA: the published names and nothing else
    plain_config = {**settings, "params": {k: v for k, v in settings["params"].items() if k != "lora_config"}}
    plain = instantiate_from_config(plain_config)
    plain.load_state_dict(torch.load(path, weights_only=False)["state_dict"])  # strict
    # the file beside the checkpoint is all that it takes to get the trained model
    load_lora(plain, tmp_path / "lora.safetensors")
    plain.cond_stage_trainable = model.cond_stage_trainable
    assert loss_of(plain) == pytest.approx(loss_of(model), rel=1e-4)
    # and so is the checkpoint, with the switch
    again = instantiate_from_config(settings)
    assert load_into(again, load_state_dict(path), strict=True) == ([], [])
    assert loss_of(again) == pytest.approx(loss_of(model), rel=1e-5)
    reloaded = load_model_from_config(OmegaConf.create({"model": settings}), path)  # as scripts do
    assert loss_of(reloaded) == pytest.approx(loss_of(model), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_from_a_checkpoint(config, tmp_path):
    model = instantiate_from_config(config())
    path = fit(model, tmp_path)
    again = instantiate_from_config(config())
    fit(again, tmp_path / "more", ckpt_path=path)  # one epoch in all: nothing is left to do
    assert isinstance(again.lora, Lora)
    assert all(torch.equal(v, again.lora.state_dict()[k]) for k, v in model.lora.state_dict().items())
    names = load_file(tmp_path / "lora.safetensors")
    assert all(k.startswith("lora_unet_down_blocks") or k.startswith(("lora_unet_mid", "lora_unet_up", "lora_unet_conv", "lora_unet_time")) for k in names)  # fmt: skip


def test_a_networks_names_are_found_wherever_it_stands(pipe):
    assert [(n.part, n.path) for n in conversion.networks(pipe)] == [
        ("unet", "unet"),
        ("text_encoder", "text"),
    ]
    assert inject(pipe.unet, rank=1).keys() == inject(pipe, rank=1).keys()
