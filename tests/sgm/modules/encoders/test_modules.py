import math
import sys
import types

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from ldm.modules.encoders import modules as ldm_modules
from sgm.modules import GeneralConditioner
from sgm.modules.encoders.modules import (
    ClassEmbedder,
    ClassEmbedderForMultiCond,
    ConcatTimestepEmbedderND,
    GaussianEncoder,
    IdentityEncoder,
    InceptionV3,
    LowScaleEncoder,
    SpatialRescaler,
)

MODULES = "sgm.modules.encoders.modules."
ENCODER = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "resolution": 8, "z_channels": 2}  # fmt: skip


def test_classes_are_looked_up_as_vectors_or_tokens_and_wrong_ones_are_named():
    model = ClassEmbedder(4, n_classes=6)
    labels = torch.tensor([5, 0])
    assert torch.equal(model(labels), model.embedding.weight[labels])
    model.add_sequence_dim = True
    assert model(labels).shape == (2, 1, 4) and list(model.state_dict()) == ["embedding.weight"]
    with pytest.raises(ValueError, match="labels from 2 to 6 for 6 classes"):
        model(torch.tensor([2, 6]))


def test_no_class_comes_as_a_batch_for_the_embedders_own_entry():
    params = {"embed_dim": 4, "n_classes": 6}
    (model,) = GeneralConditioner(
        [{"target": MODULES + "ClassEmbedder", "params": params, "input_key": "cls"}]
    ).embedders
    uncond = model.get_unconditional_conditioning(3)
    assert uncond["cls"].tolist() == [5, 5, 5] and model(uncond["cls"]).shape == (3, 4)
    with pytest.raises(KeyError, match="has no input_key"):
        ClassEmbedder(4).get_unconditional_conditioning(3)


def test_several_conditions_keep_their_batch_and_its_labels_become_vectors():
    model = ClassEmbedderForMultiCond(4, n_classes=6)
    batch = {"cls": torch.tensor([1, 2]), "list": [torch.tensor([3, 4])], "other": 7}
    out = model(batch, key="cls")
    assert torch.equal(out["cls"], model.embedding(batch["cls"])) and out["other"] == 7
    assert torch.equal(model(batch, "list")["list"][0], model.embedding(batch["list"][0]))
    assert batch["cls"].tolist() == [1, 2]  # the caller's batch stays
    model.input_key = "cls"
    assert torch.equal(model(batch)["cls"], out["cls"])
    with pytest.raises(KeyError, match="no labels under 'class'"):
        model(batch, "class")


def test_numbers_become_the_sines_and_cosines_of_diffusers():
    numbers = torch.tensor([[1024.0, 768.0], [0.0, 6.5]])
    peer = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
    model = ConcatTimestepEmbedderND(64)
    assert torch.allclose(model(numbers), peer(numbers.flatten()).reshape(2, 128), atol=1e-5)
    assert torch.equal(model(numbers[:, 0]), model(numbers)[:, :64])
    assert not model.state_dict()
    with pytest.raises(ValueError, match=r"numbers must come as \(b,\) or \(b, n\), not \(1, 2, 3\)"):
        model(torch.zeros(1, 2, 3))


def test_a_video_is_rescaled_frame_by_frame():
    video = torch.randn(2, 3, 4, 8, 8)
    for options in ({}, {"out_channels": 5, "kernel_size": 3}):
        model = SpatialRescaler(wrap_video=True, **options)
        out = model(video)
        assert out.shape == (2, options.get("out_channels", 3), 4, 4, 4)
        for frame in range(4):
            assert torch.allclose(out[:, :, frame], model(video[:, :, frame]), atol=1e-6)


def test_channels_are_mapped_by_a_kernel_that_keeps_the_size():
    x = torch.randn(1, 3, 8, 8)
    assert SpatialRescaler(remap_output=True).channel_mapper.weight.shape == (3, 3, 1, 1)
    assert SpatialRescaler(n_stages=0, out_channels=2, kernel_size=5)(x).shape == (1, 2, 8, 8)
    old, new = ldm_modules.SpatialRescaler(out_channels=2), SpatialRescaler(out_channels=2)
    new.load_state_dict(old.state_dict())
    assert torch.equal(old(x), new.encode(x))


def test_the_gaussian_bottleneck_reports_the_divergence_from_the_unit_gaussian():
    model = GaussianEncoder(0.3, False, **ENCODER)
    x = torch.randn(2, 3, 8, 8)
    log, z = model(x)
    p = torch.distributions.Normal(*moments(model, x))
    kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1).mean()
    assert log["loss"].item() == pytest.approx(kl.item(), rel=1e-4) and log["kl_loss"] is log["loss"]
    assert log["weight"] == 0.3 and z.shape == (2, 2, 4, 4)
    model.flatten_output = True
    assert model(x)[1].shape == (2, 16, 2)
    with pytest.raises(TypeError, match=r"emb_models\[0\] \(GaussianEncoder\) gives a dict"):
        GeneralConditioner([{"target": MODULES + "GaussianEncoder", "params": ENCODER, "input_key": "x"}])(
            {"x": x}
        )


def moments(model, x):
    from sgm.modules.diffusionmodules.model import Encoder

    mean, logvar = Encoder.forward(model, x).chunk(2, dim=1)
    return mean, (logvar / 2).exp()


AUTOENCODER = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 2, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": {**ENCODER, "double_z": True, "dropout": 0.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_small_picture_is_encoded_noised_and_brought_to_size(schedule):
    options = {"linear_start": 1e-4, "linear_end": 2e-2, "beta_schedule": schedule, "scale_factor": 0.5}
    model = LowScaleEncoder(AUTOENCODER, output_size=8, max_noise_level=250, **options).train()
    assert not model.model.training and not any(p.requires_grad for p in model.parameters())
    x = torch.randn(3, 3, 8, 8)
    torch.manual_seed(1)
    z, level = model(x)
    assert z.shape == (3, 2, 8, 8) and level.shape == (3,) and int(level.max()) < 250
    torch.manual_seed(1)
    clean = 0.5 * model.model.encode(x).sample()
    torch.randint(0, 250, (3,))
    bar = model.alphas_cumprod[level][:, None, None, None]
    noised = bar.sqrt() * clean + (1 - bar).sqrt() * torch.randn_like(clean)
    assert torch.allclose(z, noised.repeat_interleave(2, -1).repeat_interleave(2, -2), atol=1e-5)
    assert torch.allclose(model.decode(clean), model.model.decode(clean / 0.5))
    if schedule == "cosine":  # ᾱ_t = cos²((t/T + s)/(1 + s) π/2), over its value at 0
        f = lambda u: math.cos((u + 8e-3) / 1.008 * math.pi / 2) ** 2  # noqa: E731
        assert model.alphas_cumprod[499].item() == pytest.approx(f(0.5) / f(0.0), rel=1e-4)


def test_the_low_scale_encoder_serves_a_network_that_knows_noise_levels():
    entry = {
        "target": MODULES + "LowScaleEncoder",
        "params": {"model_config": AUTOENCODER, "output_size": None},
        "input_key": "lr",
    }
    c = GeneralConditioner([entry])({"lr": torch.randn(2, 3, 8, 8)})
    assert c["concat"].shape == (2, 2, 4, 4) and c["vector"].dtype == torch.long


def test_inception_is_pytorch_fids_and_its_absence_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    with pytest.raises(ImportError, match="InceptionV3 needs pytorch_fid: python -m pip install pytorch-fid"):
        InceptionV3()

    class Network(torch.nn.Module):
        """What pytorch_fid's network answers: a list of one map for each block asked for."""

        def __init__(self, output_blocks=(3,), resize_input=True, normalize_input=True):
            super().__init__()
            self.blocks, self.options = output_blocks, (resize_input, normalize_input)

        def forward(self, x):
            shapes = {0: (64, 73, 73), 3: (2048, 1, 1)}
            return [torch.zeros(len(x), *shapes[b]) for b in self.blocks]

    package = types.ModuleType("pytorch_fid")
    package.inception = types.SimpleNamespace(InceptionV3=Network)
    monkeypatch.setitem(sys.modules, "pytorch_fid", package)
    x = torch.zeros(1, 3, 32, 32)
    assert InceptionV3()(x).shape == (1, 2048) and InceptionV3().model.options == (True, False)
    assert InceptionV3(normalize_input=True, output_blocks=[0])(x).shape == (1, 64, 73, 73)
    assert [tuple(m.shape[1:]) for m in InceptionV3(output_blocks=[0, 3])(x)] == [(64, 73, 73), (2048, 1, 1)]


def test_an_embedder_knows_nothing_of_a_conditioner_until_it_is_in_one():
    model = IdentityEncoder()
    assert model.is_trainable is None and model.ucg_rate is None and model.input_key is None
