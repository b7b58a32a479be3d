"""Guidance: joined conditions, guided estimates, scales over frames, intervals and weaker networks."""

from types import SimpleNamespace

import pytest
import torch

from sgm.modules.diffusionmodules.guiders import (
    AutoGuidance,
    GuidanceInterval,
    IdentityGuider,
    LinearPredictionGuider,
    SpatiotemporalPredictionGuider,
    TrapezoidPredictionGuider,
    TrianglePredictionGuider,
    VanillaCFG,
    guided,
)

BASE = "sgm.modules.diffusionmodules."
X, S = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 1.0])


def condition(value):
    return {
        "vector": torch.full((2, 5), value), "crossattn": torch.full((2, 7, 5), value), "concat": torch.full((2, 1, 4, 4), value)
    }  # fmt: skip


def denoiser(x, sigma, cond):
    """Estimates that tell which condition was seen."""
    return x + cond["vector"].mean(dim=1).reshape(-1, 1, 1, 1)


def test_both_conditions_share_a_batch_unconditional_first():
    x, s, c = VanillaCFG(3.0).prepare_inputs(
        X, S, condition(2.0) | {"frames": 4}, condition(1.0) | {"frames": 4}
    )
    assert len(x) == len(s) == 4 and c.pop("frames") == 4
    for value in c.values():
        assert (value[:2] == 1).all() and (value[2:] == 2).all()


def test_guidance_extrapolates_from_the_unconditional_estimate():
    out = guided(VanillaCFG(3.0), denoiser, X, S, condition(2.0), condition(1.0))
    assert torch.allclose(out, X + 1 + 3 * (2 - 1), atol=1e-6)
    assert torch.allclose(
        guided(VanillaCFG(1.0), denoiser, X, S, condition(2.0), condition(1.0)), X + 2, atol=1e-6
    )


def test_older_configurations_name_the_guidance_rule():
    rule = {"target": BASE + "sampling_utils.NoDynamicThresholding"}
    both = torch.randn(4, 3, 4, 4)
    assert torch.equal(VanillaCFG(5.0, dyn_thresh_config=rule)(both, S), VanillaCFG(5.0)(both, S))


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_contrast_between_both_estimates(share):
    """Lin et al. 2023, equations 15 and 16."""
    both = torch.randn(4, 3, 8, 8)
    plain, rescaled = VanillaCFG(7.5)(both, S), VanillaCFG(7.5, guidance_rescale=share)(both, S)
    wanted, found = both[2:].flatten(1).std(dim=1), plain.flatten(1).std(dim=1)
    assert torch.allclose(rescaled.flatten(1).std(dim=1), share * wanted + (1 - share) * found, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tensor", "list", "dict"])
def test_conditions_of_chapter_two_are_joined_too(kind):
    c, uc = torch.ones(2, 7, 5), torch.zeros(2, 7, 5)
    wrap = {
        "tensor": lambda v: v,
        "list": lambda v: [v],
        "dict": lambda v: {"c_crossattn": [v], "c_adm": v[:, 0]},
    }[kind]
    _, _, both = VanillaCFG(2.0).prepare_inputs(X, S, wrap(c), wrap(uc))
    context = {"tensor": lambda b: b, "list": lambda b: b[0], "dict": lambda b: b["c_crossattn"][0]}[kind](
        both
    )
    assert torch.equal(context, torch.cat([uc, c]))
    assert IdentityGuider().prepare_inputs(X, S, None, None)[2] is None


def test_conditions_that_do_not_fit_are_named():
    with pytest.raises(AssertionError, match="'frames' differs"):
        VanillaCFG(2.0).prepare_inputs(X, S, condition(1.0) | {"frames": 4}, condition(1.0) | {"frames": 5})
    with pytest.raises(AssertionError, match="'mask' differs"):
        VanillaCFG(2.0).prepare_inputs(X, S, {"mask": torch.ones(2)}, {"mask": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"lacks \['crossattn'\]"):
        VanillaCFG(2.0).prepare_inputs(
            X, S, condition(1.0), {"vector": torch.ones(2, 5), "concat": torch.ones(2, 1, 4, 4)}
        )
    with pytest.raises(ValueError, match="cannot share a batch"):
        VanillaCFG(2.0).prepare_inputs(
            X, S, {"crossattn": torch.ones(2, 7, 5)}, {"crossattn": torch.ones(2, 8, 5)}
        )
    with pytest.raises(ValueError, match="between 0 and 1"):
        VanillaCFG(2.0, guidance_rescale=7.0)


@pytest.mark.parametrize(
    ("guider", "scale"),
    [
        (LinearPredictionGuider(4.0, 7), [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        (TrianglePredictionGuider(3.0, 5), [1.0, 2.0, 3.0, 2.0, 1.0]),
        (TrianglePredictionGuider(3.0, 5, period=1), [1.0, 2.0, 3.0, 2.0, 1.0]),
        (TrianglePredictionGuider(3.0, 5, period=[1.0, 0.5]), [1.0, 3.0, 3.0, 3.0, 1.0]),
        (
            TrianglePredictionGuider(3.0, 5, period=[1.0, 0.5], period_fusing="mean"),
            [1.0, 2.5, 2.0, 2.5, 1.0],
        ),
        (
            TrianglePredictionGuider(3.0, 5, period=[1.0, 0.5], period_fusing="multiply"),
            [1.0, 2.0, 1.0, 2.0, 1.0],
        ),
        (
            TrapezoidPredictionGuider(4.0, 8, edge_perc=0.25),
            [1.0, 4.0, 1.0, 1.0, 1.0, 1.0, 4.0, 1.0],
        ),  # 1 between the edges
        (SpatiotemporalPredictionGuider(4.0, 8, num_views=4), [1.0, 2.0, 2.0, 1.0, 2.5, 3.5, 3.5, 2.5]),
    ],
)
def test_scales_over_frames(guider, scale):
    assert guider.scale.shape == (1, len(scale)) and guider.scale[0].tolist() == pytest.approx(
        scale, abs=1e-5
    )
    uncond, cond = torch.zeros(2 * len(scale), 1, 2, 2), torch.ones(2 * len(scale), 1, 2, 2)
    out = guider(torch.cat([uncond, cond]), torch.ones(2))[:, 0, 0, 0]
    assert out.tolist() == pytest.approx(2 * scale, abs=1e-5)  # two videos, frame after frame


@pytest.mark.parametrize(
    ("keys", "joined"),
    [(None, []), ("cond_view", ["cond_view"]), (["cond_view", "cond_motion"], ["cond_view", "cond_motion"])],
)
def test_further_entries_of_videos_are_joined_where_asked_for(keys, joined):
    guider = LinearPredictionGuider(2.0, 2, additional_cond_keys=keys)
    c = condition(1.0) | {"cond_view": torch.ones(1, 4), "cond_motion": torch.ones(1, 4)}
    _, _, out = guider.prepare_inputs(X, S, c, {k: torch.zeros_like(v) for k, v in c.items()})
    assert guider.additional_cond_keys == joined
    assert [k for k in ("cond_view", "cond_motion") if len(out[k]) == 2] == joined


def test_wrong_frames_and_fusings_are_named():
    with pytest.raises(ValueError, match=r"batch of 5 .*num_frames=3"):
        LinearPredictionGuider(2.0, 3)(torch.zeros(10, 1, 2, 2), torch.ones(5))
    with pytest.raises(ValueError, match="period_fusing='sum'"):
        TrianglePredictionGuider(2.0, 3, period_fusing="sum")


@pytest.mark.parametrize(("sigma", "inside"), [(0.5, False), (0.6, True), (2.0, True), (2.1, False)])
def test_guidance_holds_within_its_interval_and_costs_nothing_outside(sigma, inside):
    calls = []

    def counting(x, s, c):
        calls.append(len(x))
        return denoiser(x, s, c)

    guider = GuidanceInterval({"target": BASE + "guiders.VanillaCFG", "params": {"scale": 3.0}}, 0.5, 2.0)
    out = guided(guider, counting, X, torch.full((2,), sigma), condition(2.0), condition(1.0))
    assert torch.allclose(out, X + (4 if inside else 2), atol=1e-6) and calls == [4 if inside else 2]
    # the published protocol of two halves gives the same
    inputs = guider.prepare_inputs(X, torch.full((2,), sigma), condition(2.0), condition(1.0))
    assert torch.equal(guider(denoiser(*inputs), torch.full((2,), sigma)), out)


def test_an_interval_needs_one_noise_level_and_an_order():
    guider = GuidanceInterval(VanillaCFG(3.0), 0.5, 2.0)
    with pytest.raises(ValueError, match="one noise level"):
        guided(guider, denoiser, X, torch.tensor([1.0, 3.0]), condition(2.0), condition(1.0))
    with pytest.raises(ValueError, match="sigma_min=2"):
        GuidanceInterval(VanillaCFG(3.0), 2.0, 1.0)


def test_autoguidance_leads_away_from_the_weaker_network():
    def weak(x, sigma, cond):
        return 0.5 * denoiser(x, sigma, cond)

    strong, poor = denoiser(X, S, condition(2.0)), weak(X, S, condition(2.0))
    out = guided(AutoGuidance(2.5, weak), denoiser, X, S, condition(2.0), condition(1.0))
    assert torch.allclose(out, poor + 2.5 * (strong - poor))
    engine = SimpleNamespace(model=0.5, denoiser=lambda net, x, sigma, cond: net * denoiser(x, sigma, cond))
    assert torch.equal(guided(AutoGuidance(2.5, engine), denoiser, X, S, condition(2.0), None), out)
    inside = GuidanceInterval(AutoGuidance(2.5, weak), 0.5, 2.0)
    assert torch.equal(guided(inside, denoiser, X, S, condition(2.0), None), out)
    assert torch.equal(guided(inside, denoiser, X, 9 * S, condition(2.0), None), strong)
    weak_module = torch.nn.Dropout()
    AutoGuidance(2.0, weak_module)
    assert not weak_module.train().training  # no dropout in a weaker network's estimates
    with pytest.raises(TypeError, match="weak is a float"):
        AutoGuidance(2.0, 0.5)


def test_guiders_of_the_published_protocol_need_no_more():
    class Foreign:
        def prepare_inputs(self, x, s, c, uc):
            return x, s, uc

        def __call__(self, x, sigma):
            return -x

    assert torch.equal(guided(Foreign(), denoiser, X, S, condition(2.0), condition(1.0)), -(X + 1))
