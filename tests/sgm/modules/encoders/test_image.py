import pytest
import torch

from sgm.modules import GeneralConditioner
from sgm.modules.encoders.modules import (
    FrozenOpenCLIPImageEmbedder,
    FrozenOpenCLIPImagePredictionEmbedder,
    VideoPredictionEmbedderWithEncoder,
)

ARCH = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
    "text_cfg": {"context_length": 77, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1},
}
MODULES = "sgm.modules.encoders.modules."
HALF = {"target": "torch.nn.AvgPool2d", "params": {"kernel_size": 2}}  # an encoder whose answer is known
LEVELS = {"target": "sgm.modules.diffusionmodules.sigma_sampling.EDMSampling"}
EMBED = {"target": MODULES + "ConcatTimestepEmbedderND", "params": {"outdim": 6}}


def embedder(**options):
    torch.manual_seed(0)
    return FrozenOpenCLIPImageEmbedder(ARCH, None, **options)


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(1)
    return torch.rand(4, 3, 40, 56) * 2 - 1


def test_a_picture_becomes_a_vector_a_sequence_or_patches(pictures):
    z = embedder()(pictures)
    assert z.shape == (4, 8) and torch.equal(embedder(unsqueeze_dim=True)(pictures), z[:, None])
    repeated, alone = embedder(repeat_to_max_len=True, max_length=3)(pictures)
    assert torch.equal(repeated, z[:, None].repeat(1, 3, 1)) and torch.equal(alone, z)
    tokens, alone = embedder(output_tokens=True)(pictures)
    assert tokens.shape == (4, 4, 32) and torch.equal(alone, z)  # four patches of 112² make 224²


def test_crops_fill_the_beginning_of_a_sequence_of_zeros(pictures):
    z = embedder()(pictures)
    crops, first = embedder(num_image_crops=2, max_length=3)(pictures.reshape(2, 2, 3, 40, 56))
    assert torch.allclose(crops[:, :2].flatten(0, 1), z, atol=1e-6) and not crops[:, 2].any()
    assert torch.equal(first, crops[:, 0])
    for options in ({"repeat_to_max_len": True}, {"output_tokens": True}, {"max_length": 1}):
        with pytest.raises(ValueError, match="num_image_crops=2 goes up to max_length="):
            embedder(num_image_crops=2, **options)
    with pytest.raises(ValueError, match=r"crops must come as \(b, 2, 3, h, w\), not \(4, 3, 40, 56\)"):
        embedder(num_image_crops=2)(pictures)


def test_its_own_dropout_is_silent_on_demand_and_inside_guidance(pictures):
    model = embedder(ucg_rate=1.0)
    assert not model(pictures).any() and model(pictures, no_dropout=True).any()
    tokens, z = embedder(ucg_rate=1.0, output_tokens=True)(pictures)
    assert not tokens.any() and not z.any()
    config = {
        "target": MODULES + "FrozenOpenCLIPImageEmbedder",
        "params": {"arch": ARCH, "version": None, "ucg_rate": 1.0},
    }
    params = {"open_clip_embedding_config": config, "n_cond_frames": 1, "n_copies": 1}
    target = MODULES + "FrozenOpenCLIPImagePredictionEmbedder"
    conditioner = GeneralConditioner([{"target": target, "params": params, "input_key": "frames"}])
    assert not conditioner({"frames": pictures})["crossattn"].any()
    c, uc = conditioner.get_unconditional_conditioning({"frames": pictures}, None, ["frames"])
    assert c["crossattn"].any() and not uc["crossattn"].any()


def test_frames_become_a_sequence_for_each_copy(pictures):
    config = {"target": MODULES + "FrozenOpenCLIPImageEmbedder", "params": {"arch": ARCH, "version": None}}
    model = FrozenOpenCLIPImagePredictionEmbedder(config, n_cond_frames=2, n_copies=3)
    z = model.open_clip(pictures)
    out = model(pictures)
    assert out.shape == (6, 2, 8)
    for copy in range(3):  # a clip's copies lie side by side
        assert torch.equal(out[copy], z[:2]) and torch.equal(out[3 + copy], z[2:])
    with pytest.raises(ValueError, match="3 frames do not make clips of n_cond_frames=2"):
        model(pictures[:3])


def test_the_published_video_encoder_builds_at_full_size_with_its_names():
    with torch.device("meta"):
        config = {"target": MODULES + "FrozenOpenCLIPImageEmbedder", "params": {"freeze": True}}
        state = FrozenOpenCLIPImagePredictionEmbedder(config, n_cond_frames=1, n_copies=1).state_dict()
    visual = "open_clip.model.visual."
    assert (
        state[visual + "proj"].shape == (1280, 1024)
        and visual + "transformer.resblocks.31.ln_2.bias" in state
    )
    assert {k for k in state if not k.startswith(visual)} == {
        f"open_clip.model.{k}"
        for k in ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight", "ln_final.bias")
    }  # fmt: skip


def test_one_frame_is_encoded_scaled_and_copied(pictures):
    model = VideoPredictionEmbedderWithEncoder(1, 3, HALF, scale_factor=0.5)
    z = torch.nn.functional.avg_pool2d(pictures[:2], 2) * 0.5
    assert torch.allclose(model(pictures[:2]), z.repeat_interleave(3, 0))
    chunked = VideoPredictionEmbedderWithEncoder(1, 1, HALF, en_and_decode_n_samples_a_time=3)
    sizes = []
    chunked.encoder.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    assert torch.allclose(chunked(pictures), torch.nn.functional.avg_pool2d(pictures, 2)) and sizes == [3, 1]


@pytest.mark.parametrize(("frames", "copies", "expected"), [(1, 2, (8, 8)), (2, 1, (4, 4)), (4, 1, (4, 4))])
def test_a_clip_has_one_noise_level_which_is_embedded_for_each_of_its_latents(
    pictures, frames, copies, expected
):
    model = VideoPredictionEmbedderWithEncoder(frames, copies, HALF, LEVELS, EMBED)
    torch.manual_seed(5)
    z, level = model(pictures)
    assert (len(z), len(level)) == expected
    torch.manual_seed(5)
    sigmas = torch.exp(-1.2 + 1.2 * torch.randn(4 // frames))
    noise = torch.randn_like(pictures)
    each = sigmas.repeat_interleave(frames)[:, None, None, None]
    noisy = torch.nn.functional.avg_pool2d(pictures + each * noise, 2)
    assert torch.allclose(z, noisy.repeat_interleave(copies, 0), atol=1e-6)
    assert torch.allclose(level[:, 0], sigmas.cos().repeat_interleave(len(level) // len(sigmas)))
    with torch.no_grad():
        assert not torch.equal(model(pictures)[0], z)


def test_an_autoencoder_is_asked_to_encode_and_its_names_stay(pictures, monkeypatch):
    class Autoencoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(2.0))

        def encode(self, x):
            return self.weight * x

    monkeypatch.setattr("sgm.modules.encoders.image.Autoencoder", Autoencoder, raising=False)
    config = {"target": "sgm.modules.encoders.image.Autoencoder"}
    model = VideoPredictionEmbedderWithEncoder(1, 1, config, is_ae=True)
    assert torch.equal(model(pictures), 2 * pictures) and list(model.state_dict()) == ["encoder.weight"]


def test_wrong_options_and_shapes_are_named(pictures):
    with pytest.raises(
        ValueError, match="sigma_cond_config embeds noise levels: it needs a sigma_sampler_config"
    ):
        VideoPredictionEmbedderWithEncoder(1, 1, HALF, sigma_cond_config=EMBED)
    with pytest.raises(ValueError, match="4 frames do not make clips of n_cond_frames=3"):
        VideoPredictionEmbedderWithEncoder(3, 1, HALF)(pictures)
    with pytest.raises(ValueError, match=r"pictures must come as \(b, 3, h, w\), not \(4, 1, 8, 8\)"):
        embedder()(torch.zeros(4, 1, 8, 8))
