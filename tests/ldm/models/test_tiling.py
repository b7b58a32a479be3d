from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
from ldm.models.tiling import Tiling, _scale_and_shift, _shared_statistics, _shrunk, tile_starts

DDCONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2, 1],
    "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip
IDENTITY = {"target": "torch.nn.Identity"}


@pytest.fixture
def kl():
    model = AutoencoderKL({**DDCONFIG}, IDENTITY, embed_dim=4).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)  # zeros would hide a bias added twice
    return model


@pytest.mark.parametrize("height, width", [(64, 96), (100, 50), (36, 128)])
def test_exact_tiling_decodes_and_encodes_as_without(kl, height, width):
    x, z = torch.randn(2, 3, height + 3, width + 1), torch.randn(2, 4, height // 4, width // 4)
    whole, code = kl.decode(z), kl.encode(x).parameters
    kl.enable_tiling(size=16, exact=True)
    assert torch.allclose(kl.decode(z), whole, atol=1e-5 * float(whole.abs().max()))
    assert torch.allclose(kl.encode(x).parameters, code, atol=1e-5 * float(code.abs().max()))


def test_exact_tiling_serves_all_options_of_the_networks():
    options = {**DDCONFIG, "resamp_with_conv": False, "attn_type": "linear", "tanh_out": True}
    model = AutoencoderKL(options, IDENTITY, embed_dim=4).eval().requires_grad_(False)
    z, x = torch.randn(1, 4, 12, 9), torch.randn(1, 3, 48, 36)
    whole, code = model.decode(z), model.encode(x).parameters
    model.enable_tiling(size=8, exact=True)
    assert torch.allclose(model.decode(z), whole, atol=1e-5)
    assert torch.allclose(model.encode(x).parameters, code, atol=1e-5)


@pytest.mark.parametrize("length", range(5, 70, 3))
def test_tiles_cover_everything_and_overlap_enough(length):
    starts = tile_starts(length, tile=16, overlap=4)
    covered = {i for start in starts for i in range(start, min(start + 16, length))}
    assert covered == set(range(length))
    assert all(16 - (b - a) >= 4 for a, b in pairwise(starts))


class Doubling(nn.Module):
    """Stands in for networks without memory of a picture's rest: tiles must then make no difference at all."""

    num_resolutions = 3

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=self.factor, mode="nearest")


@pytest.mark.parametrize("size", [(40, 132), (116, 116), (64, 67), (31, 200)])
def test_blending_changes_nothing_where_pixels_do_not_depend_on_each_other(kl, monkeypatch, size):
    monkeypatch.setattr(kl.decoder, "forward", Doubling(4).forward)
    kl.enable_tiling(size=64)
    z = torch.randn(1, 4, *size)
    assert torch.allclose(kl.run_decoder(z), Doubling(4)(z), atol=1e-6)
    x = torch.randn(1, 3, 4 * size[0] + 3, 4 * size[1])
    monkeypatch.setattr(kl.encoder, "forward", lambda x: nn.functional.avg_pool2d(x, 4))
    assert torch.allclose(kl.run_encoder(x), nn.functional.avg_pool2d(x, 4), atol=1e-6)


def test_blended_tiles_come_closer_to_the_whole_the_larger_they_are_and_leave_no_seam(kl):
    z = torch.randn(1, 4, 32, 24)
    whole = kl.decode(z)
    distances = []
    for size in (24, 48, 96):
        kl.enable_tiling(size=size)
        tiled = kl.decode(z)
        assert tiled.shape == whole.shape
        distances.append(float((tiled - whole).norm() / whole.norm()))
        # no seam: nowhere does the error jump from one column to the next much more than elsewhere
        steps = (tiled - whole).diff(dim=-1).abs().mean(dim=(0, 1, 2))
        assert steps.max() < 5 * steps.mean()
    assert distances[0] > distances[1] > distances[2]


def test_small_pictures_are_not_cut_and_disabling_restores_the_whole(kl, monkeypatch):
    calls = []
    forward = kl.decoder.forward
    monkeypatch.setattr(kl.decoder, "forward", lambda z: (calls.append(z.shape), forward(z))[1])
    z = torch.randn(1, 4, 16, 16)
    kl.enable_tiling(size=64)
    kl.decode(z)
    assert calls == [(1, 4, 16, 16)]
    kl.decode(torch.randn(3, 4, 8, 8))
    assert calls[1:] == [(1, 4, 8, 8)] * 3  # sliced: one image at a time
    kl.disable_tiling()
    kl.decode(torch.randn(3, 4, 20, 20))
    assert calls[4:] == [(3, 4, 20, 20)]


def test_vector_quantised_first_stages_tile_too():
    options = {**DDCONFIG, "double_z": False}
    model = VQModelInterface(4, ddconfig=options, lossconfig=IDENTITY, n_embed=8).eval().requires_grad_(False)
    x = torch.randn(1, 3, 64, 80)
    whole, code = model.decode(torch.ones(1, 4, 16, 20)), model.encode(x)
    model.enable_tiling(size=16, exact=True)
    assert torch.allclose(model.decode(torch.ones(1, 4, 16, 20)), whole, atol=1e-4)
    assert torch.allclose(model.encode(x), code, atol=1e-4)


def test_blended_tiles_pass_gradients_and_exact_ones_say_that_they_do_not(kl):
    z = torch.randn(1, 4, 24, 24, requires_grad=True)
    kl.enable_tiling(size=32)
    kl.decode(z).sum().backward()
    assert z.grad.abs().min() > 0
    kl.enable_tiling(size=32, exact=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        kl.decode(z)


@pytest.mark.parametrize("options, message", [({"size": 0}, "size=0"), ({"overlap": 0.6}, "overlap=0.6")])
def test_impossible_tiles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tiling(**options)


def test_tiles_without_overlap_lie_side_by_side(kl):
    """Also where sides are multiples of a tile's, so that each but the first begins where another ends."""
    kl.enable_tiling(size=32, overlap=0.0)
    assert kl.decode(torch.randn(1, 4, 16, 24)).shape[2:] == (64, 96)
    assert kl.encode(torch.randn(1, 3, 64, 96)).mode().shape[2:] == (16, 24)


def test_neighbouring_tiles_agree_where_they_overlap():
    """With shared statistics and no attention a pixel depends on its surroundings only, whichever tile it is in: no seam."""
    model = AutoencoderKL({**DDCONFIG, "attn_type": "none", "attn_resolutions": []}, IDENTITY, embed_dim=4)
    decoder = model.eval().requires_grad_(False).decoder
    z = torch.randn(1, 4, 16, 64)
    z[..., 32:] = 0.5

    def differences():
        left, right = decoder(z[..., :48])[..., 124:132], decoder(z[..., 16:])[..., 60:68]
        return float((left - right).abs().max() / left.std())

    assert differences() > 1e-2  # statistics of their own
    with _shared_statistics(decoder, _shrunk(z, 48, 1)):
        assert differences() < 1e-4
    assert not any("forward" in vars(m) for m in decoder.modules())  # as they were


class Apple(torch.Tensor):
    """A tensor that says it is on an Apple GPU, which refuses float64."""

    device = property(lambda self: torch.device("mps"))


class NoDouble(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), "MPS has no float64"
        return out


def test_group_norms_by_strips_need_no_float64_on_an_apple_gpu():
    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 12, 10) + 3
    with NoDouble():
        factor, shift = _scale_and_shift(x.as_subclass(Apple), norm, pixels=30)
    assert torch.allclose(torch.Tensor(x * factor + shift), norm(x), atol=1e-5)
