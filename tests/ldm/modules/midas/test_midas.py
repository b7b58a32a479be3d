import numpy as np
import pytest
import torch
from PIL import Image

from ldm.modules.midas import api, utils
from ldm.modules.midas.midas.dpt_depth import DPTDepthModel
from ldm.modules.midas.midas.transforms import NormalizeImage, PrepareForNet, Resize
from ldm.modules.midas.midas.vit import ViTBackbone
from taming.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    return DPTDepthModel(backbone="vitb_rn50_384").eval().requires_grad_(False)


def as_transformers_names(state):
    """Published names → those of transformers' DPT for the same, hybrid network."""
    names = {}
    for key, value in state.items():
        new = key
        if key.startswith("pretrained.model.blocks."):
            rest = key.removeprefix("pretrained.model.blocks.")
            number, part = rest.split(".", 1)
            layer = f"dpt.encoder.layer.{number}."
            if part.startswith("attn.qkv"):
                for name, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    names[f"{layer}attention.attention.{name}.{part.rsplit('.', 1)[1]}"] = third
                continue
            table = {
                "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
                "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
            }  # fmt: skip
            module, kind = part.rsplit(".", 1)
            new = f"{layer}{table[module]}.{kind}"
        names[new] = value
    return names


def test_token_blocks_agree_with_transformers(hybrid):
    from transformers import DPTConfig
    from transformers.models.dpt.modeling_dpt import DPTViTEncoder

    peer = DPTViTEncoder(DPTConfig(num_hidden_layers=12, layer_norm_eps=1e-6)).eval()
    names = {
        k.removeprefix("dpt.encoder."): v
        for k, v in as_transformers_names(hybrid.state_dict()).items()
        if k.startswith("dpt.encoder.")
    }
    peer.load_state_dict(names)
    tokens = torch.randn(1, 25, 768)
    ours = tokens
    for block in hybrid.pretrained.model.blocks:
        ours = block(ours)
    assert torch.allclose(peer(tokens).last_hidden_state, ours, atol=1e-3)


def test_maps_have_a_quarter_to_a_32nd_of_the_size(hybrid):
    maps = hybrid.pretrained(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (1, 256, 16, 24),
        (1, 512, 8, 12),
        (1, 768, 4, 6),
        (1, 768, 2, 3),
    ]
    depth = hybrid(torch.randn(2, 3, 32, 64))
    assert depth.shape == (2, 32, 64) and float(depth.min()) >= 0


def test_two_networks_do_not_share_their_activations(hybrid):
    x = torch.randn(1, 3, 32, 32)
    before = hybrid(x)
    DPTDepthModel(backbone="vitb_rn50_384").eval()(torch.randn(1, 3, 64, 32))
    assert torch.equal(hybrid(x), before)


def test_the_published_names_of_the_large_network_are_there():
    with torch.device("meta"):
        names = DPTDepthModel(backbone="vitl16_384").state_dict()
    assert names["pretrained.act_postprocess1.4.weight"].shape == (256, 256, 4, 4)
    assert names["pretrained.act_postprocess2.4.weight"].shape == (512, 512, 2, 2)
    assert names["pretrained.act_postprocess3.0.project.0.weight"].shape == (1024, 2048)
    assert names["pretrained.model.blocks.23.attn.qkv.weight"].shape == (3072, 1024)


def test_sizes_and_names_that_do_not_fit_are_refused(hybrid):
    with pytest.raises(ValueError, match="multiples of 32, not 48 x 32"):
        hybrid(torch.randn(1, 3, 32, 48))
    with pytest.raises(ValueError, match="backbone='vit'"):
        ViTBackbone("vit")
    with pytest.raises(ValueError, match="readout='none'"):
        ViTBackbone("vitb16_384", "none")
    with pytest.raises(AssertionError, match="dpt_hybrid"):
        api.MiDaSInference("midas_v21")
    with pytest.raises(AssertionError, match="midas_v21_small"):
        api.load_midas_transform("dpt")


def test_inference_wants_real_weights_and_takes_them_from_a_checkpoint(hybrid, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(url, path):
        raise OSError(f"Could not download {url}. Fetch it elsewhere and put it at {path}.")

    monkeypatch.setattr(api, "download", offline)
    inference = api.MiDaSInference("dpt_hybrid")
    x = torch.randn(1, 3, 32, 64)
    with pytest.raises(OSError, match="midas_models/dpt_hybrid"):
        inference(x)
    inference.train()
    assert not inference.model.training
    holder = torch.nn.ModuleDict({"depth_model": inference})
    holder.load_state_dict({f"depth_model.model.{k}": v for k, v in hybrid.state_dict().items()})
    depth = inference(x)
    assert depth.shape == (1, 1, 32, 64) and torch.equal(depth[:, 0], hybrid(x))
    torch.save(hybrid.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "midas_models").mkdir()
    (tmp_path / "weights.pt").rename(tmp_path / api.ISL_PATHS["dpt_hybrid"])
    assert torch.equal(api.load_model("dpt_hybrid")[0](x), hybrid(x))
    torch.save({"a": torch.ones(1)}, tmp_path / api.ISL_PATHS["dpt_hybrid"])
    with pytest.raises(CheckpointError):
        api.load_model("dpt_hybrid")


@pytest.mark.parametrize(
    "method, size, expected",
    [
        ("minimal", (640, 480), (512, 384)),
        ("upper_bound", (640, 480), (384, 288)),
        ("lower_bound", (640, 480), (512, 384)),
        ("upper_bound", (20, 2000), (32, 384)),
    ],
)
def test_sides_are_multiples_near_the_target(method, size, expected):
    resize = Resize(384, 384, keep_aspect_ratio=True, ensure_multiple_of=32, resize_method=method)
    assert resize.get_size(*size) == expected


def test_targets_are_scaled_with_the_picture_and_everything_becomes_float32():
    sample = {"image": np.ones((8, 8, 3)), "depth": np.arange(64.0).reshape(8, 8), "mask": np.ones((8, 8))}
    sample = PrepareForNet()(NormalizeImage([0.5] * 3, [0.5] * 3)(Resize(4, 4)(sample)))
    assert sample["image"].shape == (3, 4, 4) and sample["image"].dtype == np.float32
    assert float(sample["image"].max()) == 1.0
    assert sample["depth"].tolist() == np.arange(64.0).reshape(8, 8)[::2, ::2].tolist()
    with pytest.raises(ValueError, match="resize_method='exact'"):
        Resize(4, 4, resize_method="exact")


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
def test_a_float_map_survives_its_file(tmp_path, shape):
    image = np.random.RandomState(0).randn(*shape).astype(np.float32)
    utils.write_pfm(tmp_path / "a.pfm", image, scale=2)
    data, scale = utils.read_pfm(tmp_path / "a.pfm")
    assert np.array_equal(data, image) and scale == 2.0


def test_damaged_float_maps_and_wrong_arrays_are_named(tmp_path):
    (tmp_path / "a.pfm").write_bytes(b"P6\n2 2\n255\n")
    with pytest.raises(ValueError, match="no portable float map"):
        utils.read_pfm(tmp_path / "a.pfm")
    (tmp_path / "b.pfm").write_bytes(b"Pf\n2 2\n-1\n" + bytes(8))
    with pytest.raises(ValueError, match="2 numbers instead of the 4"):
        utils.read_pfm(tmp_path / "b.pfm")
    with pytest.raises(ValueError, match="float64"):
        utils.write_pfm(tmp_path / "c.pfm", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="bits=4"):
        utils.write_depth(tmp_path / "d", np.zeros((2, 2), np.float32), bits=4)


def test_a_flat_depth_map_is_black_and_others_use_the_whole_range(tmp_path):
    utils.write_depth(tmp_path / "flat", np.ones((3, 3), np.float32))
    assert not np.asarray(Image.open(tmp_path / "flat.png")).any()
    utils.write_depth(tmp_path / "ramp", np.linspace(-3, 5, 6, dtype=np.float32).reshape(2, 3), bits=2)
    pixels = np.asarray(Image.open(tmp_path / "ramp.png"))
    assert pixels.min() == 0 and pixels.max() == 65535


def test_networks_whose_transforms_alone_are_here_are_named():
    with pytest.raises(
        AssertionError, match="'midas_v21' has a transform here, but no network; choose one of"
    ):
        api.load_model("midas_v21")
    with pytest.raises(AssertionError, match="'midas_v22' is unknown; choose one of"):
        api.load_model("midas_v22")
