import contextlib

import open_clip
import pytest
import torch
import transformers
from diffusers.models.embeddings import Timesteps

from ldm import conversion
from sgm.modules import GeneralConditioner
from sgm.modules.encoders import modules
from sgm.modules.encoders.modules import (
    FrozenByT5Embedder,
    FrozenCLIPEmbedder,
    FrozenCLIPT5Encoder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    FrozenT5Embedder,
)

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
ARCH = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 3},
}
MODULES = "sgm.modules.encoders.modules."
SDXL_SECOND = {"layer": "penultimate", "legacy": False, "always_return_pooled": True}
TEXTS = ["a photograph of an astronaut riding a horse", ""]


def sdxl(first=None, second=None):
    """SDXL's conditioner, its text encoders small and random."""
    first = {"version": SIZES, "layer": "hidden", "layer_idx": 2, **(first or {})}
    second = {"arch": ARCH, "version": None, **SDXL_SECOND, **(second or {})}
    numbers = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
    conditioner = GeneralConditioner([
        {"target": MODULES + "FrozenCLIPEmbedder", "input_key": "txt", "params": first},
        {"target": MODULES + "FrozenOpenCLIPEmbedder2", "input_key": "txt", "params": second},
        *({"target": MODULES + "ConcatTimestepEmbedderND", "input_key": key, "params": {"outdim": 256}} for key in numbers),
    ])  # fmt: skip
    with torch.no_grad():
        for p in conditioner.parameters():  # biases and norms too, and states that are not nearly 0
            p.add_(0.1 * torch.randn_like(p))
    return conditioner


def batch(texts=TEXTS):
    sizes = {"original_size_as_tuple": [512.0, 768.0], "crop_coords_top_left": [0.0, 64.0], "target_size_as_tuple": [1024.0, 1024.0]}  # fmt: skip
    return {"txt": list(texts), **{k: torch.tensor([v] * len(texts)) for k, v in sizes.items()}}


def test_sdxls_condition_is_that_of_transformers_towers_and_diffusers_timesteps():
    conditioner = sdxl()
    first, second = (e for e in conditioner.embedders[:2])
    sizes = conversion.clip_config(first.transformer)
    one = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, pad_token_id=49407)).eval()
    # transformers 5 has no `text_model.` level here
    one.load_state_dict(
        {
            k.removeprefix("text_model."): v
            for k, v in first.transformer.state_dict().items()
            if "_ids" not in k
        }
    )
    sizes = conversion.openclip_config(second.model)
    two = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**sizes, pad_token_id=0)
    ).eval()
    two.load_state_dict(conversion.openclip_table(second.model).to_diffusers(second.model.state_dict()))
    ids = open_clip.tokenize(
        TEXTS
    )  # padded with 0, as the second tower was trained; the first with the end token
    padded_by_end = torch.where(torch.arange(77) > ids.argmax(-1, keepdim=True), 49407, ids)
    with torch.no_grad():
        a = one(padded_by_end, output_hidden_states=True).hidden_states[-2]
        b = two(ids, output_hidden_states=True)
        c = conditioner(batch())
    torch.testing.assert_close(c["crossattn"], torch.cat([a, b.hidden_states[-2]], 2), rtol=1e-4, atol=1e-4)
    numbers = torch.tensor([512.0, 768.0, 0.0, 64.0, 1024.0, 1024.0])
    ramps = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(numbers).flatten().expand(2, -1)
    torch.testing.assert_close(c["vector"], torch.cat([b.text_embeds, ramps], 1), rtol=1e-4, atol=1e-4)


def test_the_pooled_vector_of_the_first_encoder_is_that_of_transformers():
    encoder = FrozenCLIPEmbedder(SIZES, always_return_pooled=True)
    peer = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**conversion.clip_config(encoder.transformer), pad_token_id=49407)
    ).eval()
    peer.load_state_dict({k.removeprefix("text_model."): v for k, v in encoder.transformer.state_dict().items() if "_ids" not in k})  # fmt: skip
    ids = encoder.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    z, pooled = encoder(TEXTS)
    with torch.no_grad():
        theirs = peer(ids)
    torch.testing.assert_close(z, theirs.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, theirs.pooler_output, rtol=1e-4, atol=1e-4)


def test_the_older_order_puts_the_final_norm_behind_the_layer():
    torch.manual_seed(0)
    for layer in ("last", "penultimate"):
        plain = FrozenOpenCLIPEmbedder(ARCH, None, layer=layer)
        old = FrozenOpenCLIPEmbedder2(ARCH, None, layer=layer)
        raw = FrozenOpenCLIPEmbedder2(ARCH, None, layer=layer, legacy=False)
        for model in (old, raw):
            model.load_state_dict(plain.state_dict())
        assert torch.equal(old(TEXTS), plain(TEXTS))
        assert torch.equal(raw.model.ln_final(raw(TEXTS)), plain(TEXTS))


def test_weights_and_windows_keep_both_encoders_in_step_and_pool_the_first_window():
    long = " ".join(["word"] * 74) + " first (second:1.5)"  # the 75 words of a window, and one more
    options = {"windows": 2, "prompt_weights": True}
    torch.manual_seed(0)
    plain = sdxl()
    both = sdxl(options, options)
    both.load_state_dict(plain.state_dict())
    windows = [" ".join(["word"] * 74) + " first", "second"]
    c, parts = both(batch([long])), plain(batch(windows))
    assert c["crossattn"].shape == (1, 154, 40)
    assert torch.allclose(c["vector"], parts["vector"][:1], atol=1e-6)
    assert torch.allclose(c["crossattn"][:, :77], parts["crossattn"][:1], atol=1e-5)
    empty = plain(batch([""]))["crossattn"][0]
    own, weighted = parts["crossattn"][1], c["crossattn"][0, 77:]
    expected = own.clone()
    expected[1] = empty[1] + 1.5 * (own[1] - empty[1])  # in both halves at the same token
    assert torch.allclose(weighted, expected, atol=1e-5)
    # weights within the first window leave the pooled vector alone
    assert torch.equal(both(batch(["a (cat:1.4)"]))["vector"], both(batch(["a cat"]))["vector"])
    with pytest.raises(ValueError, match=r"for 'crossattn' must agree .* \(1, 154, 16\), \(1, 77, 24\)"):
        sdxl({"windows": 2})(batch(["a cat"]))


def test_sdxls_encoders_build_at_full_size_with_the_published_names_and_widths():
    with torch.device("meta"):
        conditioner = GeneralConditioner([
            {"target": MODULES + "FrozenCLIPEmbedder", "input_key": "txt", "params": {"layer": "hidden", "layer_idx": 11}},
            {"target": MODULES + "FrozenOpenCLIPEmbedder2", "input_key": "txt", "params": {"arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", **SDXL_SECOND}},
        ])  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in conditioner.state_dict().items()}
    first, second = "embedders.0.transformer.text_model.", "embedders.1.model."
    assert shapes[first + "embeddings.position_ids"] == (1, 77)
    assert shapes[first + "encoder.layers.11.mlp.fc1.weight"] == (3072, 768)
    assert shapes[second + "text_projection"] == (1280, 1280) and shapes[second + "logit_scale"] == ()
    assert shapes[second + "transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert not any(k.startswith(second + "visual") for k in shapes)
    assert sum(1 for k in shapes if k.startswith(first)) == 12 * 16 + 5
    assert sum(1 for k in shapes if k.startswith(second)) == 32 * 12 + 6


def test_a_checkpoint_that_lacks_only_what_is_not_read_is_whole(monkeypatch):
    """Only the pooled vector needs the last layer and the projection."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(ARCH))

    def offline(tag):
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    torch.manual_seed(0)
    source = FrozenOpenCLIPEmbedder2(ARCH, None, **SDXL_SECOND)
    part = {
        k: v for k, v in source.state_dict().items() if not k.startswith(("model.transformer.resblocks.2.", "model.text_proj"))
    }  # fmt: skip
    plain = FrozenOpenCLIPEmbedder2("ViT-bigG-14", "laion2b_s39b_b160k", layer="penultimate", legacy=False)
    plain.load_state_dict(part, strict=False)
    assert torch.equal(plain(TEXTS), source(TEXTS)[0])
    pooling = FrozenOpenCLIPEmbedder2("ViT-bigG-14", "laion2b_s39b_b160k", **SDXL_SECOND)
    pooling.load_state_dict(part, strict=False)
    with pytest.raises(OSError, match=r"no connection"):
        pooling(TEXTS)


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="always_return_pooled=True needs legacy=False"):
        FrozenOpenCLIPEmbedder2(ARCH, None, always_return_pooled=True)
    with pytest.raises(AssertionError, match="choose one of last, penultimate"):
        FrozenOpenCLIPEmbedder2(ARCH, None, layer="pooled")


def test_t5_reads_words_or_bytes_and_stays_out_of_autocast(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = FrozenByT5Embedder(str(tmp_path), max_length=8)
    z = encoder.encode(["Käse", ""])
    ids = torch.tensor(
        [[b + 3 for b in "Käse".encode()] + [1, 0, 0], [1] + [0] * 7]
    )  # bytes behind 3 special ids
    assert torch.equal(z, encoder.transformer(input_ids=ids).last_hidden_state)
    for scope in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with scope:
            assert torch.equal(encoder(["Käse", ""]), z)
    both = FrozenCLIPT5Encoder(SIZES, str(tmp_path), t5_max_length=8)
    c = GeneralConditioner([{"target": MODULES + "IdentityEncoder", "input_key": "txt"}])
    assert [tuple(o.shape) for o in both(["a", "b"])] == [(2, 77, 16), (2, 8, 16)] and not list(
        c.parameters()
    )
    with torch.device("meta"):
        widths = [m().transformer.config.d_model for m in (FrozenT5Embedder, FrozenByT5Embedder)]
    assert widths == [4096, 1536]  # t5-v1_1-xxl and byt5-base


@pytest.mark.parametrize("name", [n for n in modules.__all__ if n.startswith("Frozen")])
def test_every_frozen_encoder_is_an_embedder(name):
    assert issubclass(getattr(modules, name), modules.AbstractEmbModel)
