import open_clip
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ldm.modules.encoders.image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
    resize,
)
from taming.checkpoint import CheckpointError


def test_corners_stay_and_a_picture_of_the_right_size_stays_as_it_is():
    x = torch.randn(1, 3, 56, 40)
    corners = [0, 0, -1, -1], [0, -1, 0, -1]
    assert torch.allclose(resize(x)[:, :, *corners], x[:, :, *corners], atol=1e-5)
    x = torch.randn(1, 3, 224, 224)
    assert torch.allclose(resize(x), x, atol=1e-6)


def test_a_larger_picture_is_blurred_first_by_half_the_factor_less_one():
    x = torch.randn(1, 3, 448, 672)
    # factor 2: sigma 0.5, three taps; factor 3: sigma 1, five (4 made odd)
    vertical, horizontal = (
        torch.exp(-(torch.arange(-r, r + 1.0) ** 2) / (2 * s * s)) for r, s in ((1, 0.5), (2, 1.0))
    )
    kernel = torch.outer(vertical / vertical.sum(), horizontal / horizontal.sum())
    padded = F.pad(x, (2, 2, 1, 1), mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    assert torch.allclose(resize(x), resize(blurred, antialias=False), atol=1e-5)
    assert torch.equal(resize(x[..., :200, :200]), resize(x[..., :200, :200], antialias=False))


def test_the_picture_encoder_equals_open_clip(open_clip_model):
    peer, config, path = open_clip_model
    model = FrozenOpenCLIPImageEmbedder(config, str(path), device="cpu")
    x = torch.rand(2, 3, 224, 224) * 2 - 1
    normal = open_clip.image_transform(224, is_train=False).transforms[-1]  # CLIP's mean and deviation
    assert torch.allclose(model(x), peer.visual(normal((x + 1) / 2)), atol=1e-5)
    assert not hasattr(model.model, "transformer") and not {"mean", "std"} & model.state_dict().keys()
    with pytest.raises(ValueError, match=r"pictures must come as \(b, 3, h, w\), not \(3, 8, 8\)"):
        model(x[0, :, :8, :8])


def of_transformers(model, config):
    """open_clip's visual tower as a model of transformers, an independent implementation."""
    vision = config["vision_cfg"]
    sizes = {
        "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "num_hidden_layers": vision["layers"],
        "num_attention_heads": vision["width"] // vision["head_width"], "image_size": vision["image_size"],
        "patch_size": vision["patch_size"], "projection_dim": config["embed_dim"], "hidden_act": "gelu",
    }  # fmt: skip
    hub = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval()
    renamed = {}
    for key, value in model.visual.state_dict().items():
        key = "visual_projection.weight" if key == "proj" else key
        for old, new in NAMES.items():
            key = key.replace(old, new)
        if "in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("in_proj_", f"{part}_proj.")] = third
        else:
            renamed[key] = value.t() if key == "visual_projection.weight" else value
    hub.load_state_dict(renamed)
    return hub


NAMES = {
    "class_embedding": "vision_model.embeddings.class_embedding", "conv1": "vision_model.embeddings.patch_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight", "ln_pre": "vision_model.pre_layrnorm",
    "ln_post": "vision_model.post_layernorm", "transformer.resblocks": "vision_model.encoder.layers", "attn.": "self_attn.",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2",
}  # fmt: skip


def test_the_picture_encoder_equals_that_of_transformers(open_clip_model):
    peer, config, path = open_clip_model
    model = FrozenOpenCLIPImageEmbedder(config, str(path))
    pixels = model.preprocess(torch.rand(2, 3, 300, 240) * 2 - 1)
    with torch.no_grad():
        expected = of_transformers(peer, config)(pixel_values=pixels).image_embeds
        assert torch.allclose(model.model.visual(pixels), expected, atol=1e-5)


def test_guidance_dropout_zeroes_whole_vectors(open_clip_model):
    _, config, path = open_clip_model
    model = FrozenOpenCLIPImageEmbedder(config, str(path), ucg_rate=0.4)
    x = (torch.rand(1, 3, 224, 224) * 2 - 1).expand(200, -1, -1, -1)
    z = model(x)
    dropped = (z == 0).all(dim=1)
    assert float(dropped.float().mean()) == pytest.approx(0.4, abs=0.1)
    assert torch.allclose(z[~dropped], model(x[:1], no_dropout=True), atol=1e-5)
    with pytest.raises(NotImplementedError, match="use 'pooled'"):
        FrozenOpenCLIPImageEmbedder(config, str(path), layer="penultimate")
    with pytest.raises(AssertionError, match="layer='last' is unknown"):
        FrozenOpenCLIPImageEmbedder(config, str(path), layer="last")


def test_openais_clip_wants_only_its_visual_tower(open_clip_model, monkeypatch):
    peer, config, _ = open_clip_model
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(config))
    quick = open_clip.CLIP(**config, quick_gelu=True).eval()
    quick.load_state_dict(peer.state_dict())

    def fail(tag):
        raise OSError("no connection")

    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    x = torch.rand(1, 3, 224, 224) * 2 - 1
    for kind in (ClipImageEmbedder, FrozenClipImageEmbedder):
        model = kind("ViT-L/14")
        model.load_state_dict(
            {f"model.{k}": v for k, v in peer.state_dict().items() if k.startswith("visual.")}, strict=False
        )
        assert hasattr(model.model, "transformer")
        assert torch.allclose(model.encode(x), quick.visual(model.preprocess(x)), atol=1e-5)
        with pytest.raises(OSError, match="weights 'openai' of ViT-L-14.*no connection"):
            kind("ViT-L/14")(x)
    assert ClipImageEmbedder("ViT-L/14").antialias and not FrozenClipImageEmbedder("ViT-L/14").antialias


def test_the_published_image_encoders_build_on_the_meta_device():
    with torch.device("meta"):
        large, huge = ClipImageEmbedder("ViT-L/14"), FrozenOpenCLIPImageEmbedder()
    assert large.state_dict()["model.visual.proj"].shape == (1024, 768)
    assert huge.state_dict()["model.visual.proj"].shape == (1280, 1024)
    assert "model.token_embedding.weight" in huge.state_dict()


SCHEDULE = {
    "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    "timestep_dim": 6,
}


def test_noise_is_added_to_standardised_vectors(tmp_path):
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    torch.save((mean, std), tmp_path / "stats.th")
    model = CLIPEmbeddingNoiseAugmentation(**SCHEDULE, clip_stats_path=tmp_path / "stats.th")
    x, level = torch.randn(4, 6), torch.tensor([0, 10, 500, 999])
    torch.manual_seed(3)
    noisy, embedded = model(x, noise_level=level)
    torch.manual_seed(3)
    bar = model.alphas_cumprod[level][:, None]
    expected = (bar.sqrt() * (x - mean) / std + (1 - bar).sqrt() * torch.randn(4, 6)) * std + mean
    assert torch.allclose(noisy, expected, atol=1e-5)
    assert torch.allclose(embedded[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))  # cosines, then sines, of level 0
    assert torch.allclose(model.unscale(model.scale(x)), x, atol=1e-6)
    assert "data_mean" not in model.state_dict()
    assert model(x)[1].shape == (4, 6)


def test_the_statistics_file_is_wanted_at_first_use(tmp_path):
    path = tmp_path / "stats.th"
    model = CLIPEmbeddingNoiseAugmentation(**SCHEDULE, clip_stats_path=path)
    with pytest.raises(FileNotFoundError, match=r"no statistics of CLIP's image vectors at .*stats.th"):
        model(torch.randn(1, 6))
    torch.save((torch.ones(1, 6), torch.full((1, 6), 2.0)), path)
    assert torch.equal(model.scale(torch.full((1, 6), 5.0)), torch.full((1, 6), 2.0))
    torch.save({"mean": torch.ones(6)}, path)
    with pytest.raises(CheckpointError, match="must hold two tensors"):
        CLIPEmbeddingNoiseAugmentation(**SCHEDULE, clip_stats_path=path)
    with torch.device("meta"):
        CLIPEmbeddingNoiseAugmentation(**SCHEDULE, clip_stats_path=path)
