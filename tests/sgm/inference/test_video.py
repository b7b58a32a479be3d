"""sgm.inference.video and .multiview: cameras, conditions, chunks, and the order in which views are made."""

import math

import pytest
import torch

from ldm.inference import InferenceError
from sgm.inference.multiview import AlternatingGuider, MultiviewSampler, ViewGrid
from sgm.inference.video import VIDEO_BUILDERS, decode_in_chunks, for_every_frame, orbit
from sgm.modules.diffusionmodules.guiders import IdentityGuider, LinearPredictionGuider
from sgm.modules.diffusionmodules.sampling import EulerEDMSampler


def test_an_orbit_goes_evenly_around_and_ends_where_the_picture_was_taken():
    camera = orbit(4, 10.0, None)
    assert camera["azimuths_rad"] == pytest.approx([math.pi / 2, math.pi, 3 * math.pi / 2, 0.0])
    assert camera["polars_rad"] == pytest.approx([math.radians(80)] * 4)
    given = orbit(3, [0, 10, 20], [30, 90, 350])
    assert given["azimuths_rad"] == pytest.approx([math.radians(a) for a in (40, 100, 0)])
    with pytest.raises(InferenceError, match="elevations_deg holds 2 numbers; one, or 3 are needed"):
        orbit(3, [0, 10], None)


def test_numbers_are_given_to_every_frame():
    build = VIDEO_BUILDERS["fps_id"]
    c, uc = build({"fps_id": 6}, [1, 4], "cpu")
    assert c.tolist() == [6] * 4 == uc.tolist()
    with pytest.raises(InferenceError, match="fps_id holds 3 numbers; one, or 4"):
        build({"fps_id": [1, 2, 3]}, [1, 4], "cpu")


def test_pictures_are_given_to_every_frame_and_vectors_are_frames_already():
    cond = {"crossattn": torch.rand(1, 1, 8), "concat": torch.rand(1, 4, 2, 2), "vector": torch.rand(5, 3)}
    out = for_every_frame(cond, 5)
    assert {k: len(v) for k, v in out.items()} == {"crossattn": 5, "concat": 5, "vector": 5}
    assert torch.equal(out["concat"][4], cond["concat"][0]) and out["vector"] is cond["vector"]


@pytest.mark.parametrize(("decoding_t", "seen"), [(2, [2, 2, 1]), (None, [5]), (9, [5])])
def test_memory_of_decoding_does_not_grow_with_the_number_of_frames(decoding_t, seen):
    calls = []

    class Model:
        def decode_first_stage(self, z):
            calls.append(len(z))
            return z * 2

    z = torch.rand(5, 4, 2, 2)
    assert torch.equal(decode_in_chunks(Model(), z, decoding_t), z * 2) and calls == seen
    with pytest.raises(InferenceError, match="decoding_t=0"):
        decode_in_chunks(Model(), z, 0)


def test_every_other_step_sees_the_clip_backwards_under_its_own_condition():
    """A denoiser that pulls towards its condition's clip: both ways lead to the same one if the backward one is turned."""
    T, V, clip = 3, 2, torch.arange(6.0)[:, None]
    turned = clip.unflatten(0, (T, V)).flip(0).flatten(0, 1)
    seen = []

    def denoiser(x, sigma, cond):
        seen.append(cond["name"])
        return cond["clip"].expand_as(x)

    cond = ({"name": "forwards", "clip": clip}, {"name": "backwards", "clip": turned})
    levels = {"target": "sgm.modules.diffusionmodules.discretizer.EDMDiscretization"}
    sampler = EulerEDMSampler(
        discretization_config=levels, num_steps=4, guider_config=AlternatingGuider(IdentityGuider(), T)
    )
    assert torch.allclose(sampler(denoiser, torch.randn(6, 1), cond), clip, atol=1e-4)
    assert seen == ["forwards", "backwards"] * 2


def test_both_ways_are_guided_alike():
    def denoiser(x, sigma, cond):
        return cond["concat"]

    ones, zeros = ({"concat": torch.full((4, 1, 1, 1), value)} for value in (1.0, 0.0))
    guider = AlternatingGuider(LinearPredictionGuider(4.0, 4, 1.0), T=4)
    x, sigma = torch.zeros(4, 1, 1, 1), torch.ones(4)
    there, back = (
        guider.denoise(denoiser, x, sigma, (ones, ones), (zeros, zeros)).flatten().tolist() for _ in range(2)
    )
    assert there == pytest.approx([1, 2, 3, 4]) and back == pytest.approx([4, 3, 2, 1])


def grid(n_frames, n_views):
    video = torch.arange(n_frames).float()[:, None, None, None].expand(-1, 3, 2, 2) / 100
    return ViewGrid(video, 0.0, [360.0 * v / n_views for v in range(n_views)])


class Painter(MultiviewSampler):
    """Paints the number of the clip instead of sampling."""

    def __init__(self, grid, T):
        super().__init__(None, grid, T)
        self.clips = []

    def clip(self, reference, times, knows_views=True):
        if knows_views:
            assert all((reference, v) in self.grid.pictures for v in self.grid.new_views)
        self.clips.append((reference, list(times), knows_views))
        return torch.full((len(times), len(self.grid.new_views), 3, 2, 2), float(len(self.clips)))

    def clip_between(self, times):
        assert all((t, v) in self.grid.pictures for t in (times[0], times[-1]) for v in self.grid.new_views)
        return self.clip(times[0], times)


def test_sv4d_makes_anchors_first_and_then_what_is_between_them():
    views = grid(21, 9)
    views.set_views(0, torch.zeros(8, 3, 2, 2))
    painter = Painter(views, 5)
    painter.fill_between_anchors()
    assert painter.clips[0] == (0, [4, 8, 12, 16, 20], True)
    assert [times for _, times, _ in painter.clips[1:]] == [list(range(t, t + 5)) for t in (0, 4, 8, 12, 16)]
    made = [int(views.pictures[t, 3][0, 0, 0]) for t in range(21)]
    assert made == [0, 2, 2, 2, 1, 3, 3, 3, 1, 4, 4, 4, 1, 5, 5, 5, 1, 6, 6, 6, 1]
    with pytest.raises(InferenceError, match="has 20 frames; this way needs 21"):
        Painter(grid(20, 9), 5).fill_between_anchors()


@pytest.mark.parametrize(
    ("n_frames", "T", "starts"),
    [(21, 12, [0, 9]), (21, 5, [0, 4, 8, 12, 16]), (12, 12, [0]), (13, 12, [0, 1])],
)
def test_sv4d2_goes_clip_by_clip_and_each_continues_a_frame_that_is_known(n_frames, T, starts):
    views = grid(n_frames, 5)
    painter = Painter(views, T)
    painter.fill_in_turn()
    assert [(times[0], knows) for _, times, knows in painter.clips] == [(s, s > 0) for s in starts]
    assert len(views.pictures) == n_frames * 5
    assert int(views.pictures[starts[-1], 1][0, 0, 0]) < len(starts) or len(starts) == 1
    with pytest.raises(InferenceError, match=f"has {T - 1} frames; this model needs {T}"):
        Painter(grid(T - 1, 5), T)


def test_a_grid_tells_the_conditioner_where_the_views_are_and_what_the_video_shows():
    views = grid(3, 3)
    views.set_views(0, torch.ones(2, 3, 2, 2))
    values = views.values([0, 2])
    assert values["cond_motion"][:, 0, 0, 0].tolist() == pytest.approx([0, 0.02])
    assert values["cond_frames"][:, 0, 0, 0].tolist() == pytest.approx([0, 0, 0.02, 0.02])
    assert values["azimuth_rad"] == pytest.approx([math.radians(120), math.radians(240)] * 2)
    assert values["polar_rad"] == pytest.approx([math.pi / 2] * 4) and (values["cond_view"] == 1).all()
    assert not views.values([1, 2], knows_views=False)["cond_view"].any()
    assert views.time(0).shape == (3, 3, 2, 2) and views.time(0)[1:].min() == 1
    assert views.view(0)[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.505, 0.51])
