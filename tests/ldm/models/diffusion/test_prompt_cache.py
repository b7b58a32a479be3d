"""Keys and values of the prompt are computed once a run, and nothing else changes."""

import threading
import weakref

import pytest
import torch

from ldm import inference
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.modules import prompt_cache as module
from ldm.modules.attention import CrossAttention
from ldm.modules.prompt_cache import once, prompt_cache
from taming.util import instantiate_from_config

SHAPE = (3, 8, 8)
QUIET = {"verbose": False}


class Counted:
    """A model, and how often its layers computed the keys of the prompt."""

    def __init__(self, model):
        self.model, self.calls = model, []
        self.layers = {
            n: m.attn2.to_k for n, m in model.named_modules() if hasattr(m, "attn2") and hasattr(m, "attn1")
        }
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda *args, name=name: self.calls.append(name))

    def rounds(self):
        """How often every layer was asked since the last look; all must agree."""
        counts = {name: self.calls.count(name) for name in self.layers}
        assert len(set(counts.values())) == 1, counts
        self.calls.clear()
        return next(iter(counts.values()))


@pytest.fixture
def counted(tiny):
    def build(**params):
        model = instantiate_from_config(tiny.latent_diffusion(**params)).eval()
        for p in model.model.parameters():
            torch.nn.init.normal_(
                p, std=0.05
            )  # fresh output layers are zero, and zeros compare with anything
        return Counted(model)

    return build


@pytest.fixture
def without_cache(monkeypatch):
    """Runs a function with every result computed anew."""

    def run(function):
        with monkeypatch.context() as patch:
            for user in (
                "ldm.modules.attention",
                "ldm.models.diffusion.wrapper",
                "ldm.models.diffusion.sampler",
            ):
                patch.setattr(f"{user}.once", lambda owner, compute, *inputs: compute(*inputs))
            return function()

    return run


def guided(c, u, **options):
    return {
        "conditioning": c, "unconditional_conditioning": u, "unconditional_guidance_scale": 3.0,
        "x_T": torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)), "generator": torch.Generator().manual_seed(2),
        **QUIET, **options,
    }  # fmt: skip


WRAPS = {
    "tensor": lambda c: c,
    "list": lambda c: [c],
    "dict": lambda c: {"c_crossattn": [c]},
    "two contexts": lambda c: {"c_crossattn": [c, 2 * c]},
}


@pytest.mark.parametrize("name", sorted(inference.SAMPLERS))
@pytest.mark.parametrize("guidance", [True, False])
def test_every_sampler_computes_keys_once_and_the_same_latents(counted, without_cache, name, guidance):
    model = counted(**({"parameterization": "flow"} if name == "flow" else {}))
    c, u = torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def run():
        return inference.SAMPLERS[name](model.model).sample(
            4, 2, SHAPE, **guided(c, u if guidance else None)
        )[0]

    latents = run()
    assert model.rounds() == 1
    anew = without_cache(run)
    assert model.rounds() >= 4 and torch.equal(latents, anew)


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_conditions_of_every_structure_are_kept(counted, without_cache, wrap):
    model = counted()
    c, u = wrap(torch.randn(2, 5, 8)), wrap(torch.randn(2, 5, 8))

    def run():
        return DDIMSampler(model.model).sample(4, 2, SHAPE, **guided(c, u, eta=1.0))[0]

    latents = run()
    assert model.rounds() == 1
    assert torch.equal(latents, without_cache(run)) and model.rounds() == 4


def test_a_joined_picture_that_stays_is_joined_to_guidance_too(counted, without_cache):
    model = counted(conditioning_key="hybrid", unet={"in_channels": 6})
    picture, c, u = torch.randn(2, *SHAPE), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    conditions = [{"c_concat": [picture], "c_crossattn": [x]} for x in (c, u)]

    def run():
        return DDIMSampler(model.model).sample(4, 2, SHAPE, **guided(*conditions))[0]

    latents = run()
    assert model.rounds() == 1 and torch.equal(latents, without_cache(run))


@pytest.mark.parametrize("method", ["singlestep", "singlestep_fixed", "adaptive"])
def test_steps_with_several_network_calls_share_the_keys(counted, without_cache, method):
    model, c, u = counted(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)

    def run():
        return DPMSolverSampler(model.model, method=method).sample(4, 2, SHAPE, **guided(c, u))[0]

    latents = run()
    assert model.rounds() == 1 and torch.equal(latents, without_cache(run))


def test_image_to_image_and_inversion_are_runs(counted, without_cache):
    model, c, u = counted(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": u}
    sampler, x = DDIMSampler(model.model), torch.randn(2, *SHAPE)
    sampler.make_schedule(4, verbose=False)
    for run in (
        lambda: sampler.decode(x, c, 3, **guidance, **QUIET),
        lambda: sampler.encode(x, c, 3, **guidance, **QUIET)[0],
    ):
        latents = run()
        assert model.rounds() == 1
        assert torch.equal(latents, without_cache(run)) and model.rounds() == 3


def test_ancestral_sampling_is_a_run(counted):
    model = counted(timesteps=6)
    c, x_T = torch.randn(2, 5, 8), torch.randn(2, *SHAPE)
    torch.manual_seed(4)
    latents = model.model.sample(c, 2, x_T=x_T, verbose=False)
    assert model.rounds() == 1
    torch.manual_seed(4)
    again, _ = model.model.progressive_denoising(c, SHAPE, batch_size=2, x_T=x_T, verbose=False)
    assert torch.equal(latents, again)
    assert model.rounds() == 1


def test_the_bare_solver_is_a_run(counted):
    model, c, u = counted(), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=model.model.alphas_cumprod)
    network = model_wrapper(
        lambda x, t, c: model.model.apply_model(x, t, c), schedule, guidance_type="classifier-free", condition=c,
        unconditional_condition=u, guidance_scale=2.0,
    )  # fmt: skip
    DPM_Solver(network, schedule).sample(torch.randn(2, *SHAPE), steps=4, order=2)
    assert model.rounds() == 1


def test_weights_changed_between_runs_count(counted, without_cache):
    model, c = counted(), torch.randn(2, 5, 8)

    def run():
        return DDIMSampler(model.model).sample(3, 2, SHAPE, **guided(c, None))[0]

    before = run()
    with torch.no_grad():
        for layer in model.layers.values():
            layer.weight.data += 0.1  # as merging a LoRA does; `.data` leaves no trace in the version
    after = run()
    assert not torch.equal(before, after) and torch.equal(after, without_cache(run))


def test_a_condition_changed_in_place_during_the_run_counts(counted, without_cache):
    model = counted()

    def run():
        c = torch.ones(2, 5, 8)
        u = torch.zeros(2, 5, 8)
        return DDIMSampler(model.model).sample(
            4, 2, SHAPE, **guided(c, u, callback=lambda i: c.mul_(-1) if i == 1 else None)
        )[0]

    latents = run()
    assert model.rounds() == 2 and torch.equal(latents, without_cache(run))


def test_nothing_is_held_after_a_run_even_one_that_failed(counted):
    model = counted()
    sampler = DDIMSampler(model.model)

    def run(**options):
        c = torch.randn(2, 5, 8)
        held = []
        handle = next(iter(model.layers.values())).register_forward_hook(
            lambda layer, args, out: held.extend([weakref.ref(args[0]), weakref.ref(out)])
        )
        try:
            sampler.sample(3, 2, SHAPE, **guided(c, torch.zeros(2, 5, 8), **options))
        finally:
            handle.remove()
            assert module._run.get() is None
            run.held = held

    run()
    assert run.held and all(ref() is None for ref in run.held)

    def fail(i):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(callback=fail)
    assert module._run.get() is None


def test_contexts_that_are_new_at_every_step_do_not_pile_up():
    layer, x = CrossAttention(8, 6, heads=2, dim_head=4).eval(), torch.randn(1, 4, 8)
    with torch.no_grad(), prompt_cache():
        for _ in range(5):
            layer(x, torch.randn(1, 3, 6))
        assert len(module._run.get()) == 0
        fixed = torch.randn(1, 3, 6)
        for _ in range(5):  # the first stays, the second is new each time
            joined = once("halves", lambda a, b: torch.cat([a, b]), fixed, torch.randn(1, 3, 6))
            assert joined.shape == (2, 3, 6)
        assert len(module._run.get()) == 1 and len(module._run.get()[fixed]) == 1


def test_training_is_never_served_from_the_cache():
    layer, x, context = CrossAttention(8, 6, heads=2, dim_head=4), torch.randn(1, 4, 8), torch.randn(1, 3, 6)
    counts = []
    layer.to_k.register_forward_hook(lambda *args: counts.append(1))
    with prompt_cache():
        for mode in (layer.eval, layer.train):
            mode()
            layer.zero_grad()
            layer(x, context).sum().backward()
            layer(x, context).sum().backward()
            assert layer.to_k.weight.grad.abs().sum() > 0
        with torch.no_grad():
            layer(x, context)
            layer(x, context)  # still in training mode
        assert len(counts) == 6
        layer.eval()
        with torch.no_grad():
            first, second = layer(x, context), layer(x, context)
        assert len(counts) == 7 and torch.equal(first, second)
        assert torch.equal(layer(x, context), first) and len(counts) == 8  # with gradients, anew


def test_autocast_and_full_precision_do_not_mix():
    layer, x, context = (
        CrossAttention(8, 6, heads=2, dim_head=4).eval(),
        torch.randn(1, 4, 8),
        torch.randn(1, 3, 6),
    )

    def outputs():
        results = [layer(x, context)]
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                results.append(layer(x, context))
        return [*results, layer(x, context)]

    with torch.no_grad():
        expected = outputs()
        with prompt_cache():
            found = outputs()
    assert [o.dtype for o in found] == [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_equal_tensors_are_not_the_same_and_other_threads_have_no_part():
    counts, a = [], torch.ones(2)

    def ask(*inputs):
        return once("owner", lambda *t: counts.append(1) or sum(t), *inputs)

    with torch.no_grad(), prompt_cache():
        ask(a), ask(a), ask(a.clone()), ask(a, a), ask(a, a)
        assert len(counts) == 3
        with prompt_cache():  # a sampler that runs in another's callback
            ask(a, a)
        ask(a, a)
        assert len(counts) == 4
        thread = threading.Thread(target=lambda: torch.no_grad()(ask)(a, a))
        thread.start()
        thread.join()
        assert len(counts) == 5
    ask(a, a)
    assert len(counts) == 6


def test_inference_mode_samples_the_same(counted):
    """Its tensors cannot tell whether they changed, so what follows from them is computed anew."""
    model, options = counted(), guided(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    plain = DDIMSampler(model.model).sample(4, 2, SHAPE, **options)[0]
    model.rounds()
    with torch.inference_mode():
        own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        assert own["conditioning"].is_inference()
        assert torch.equal(DDIMSampler(model.model).sample(4, 2, SHAPE, **own)[0], plain)
    assert model.rounds() == 4


def test_a_compiled_layer_keeps_its_outputs():
    layer, x, context = (
        CrossAttention(8, 6, heads=2, dim_head=4).eval(),
        torch.randn(1, 4, 8),
        torch.randn(1, 3, 6),
    )
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad(), prompt_cache():
        assert torch.equal(compiled(x, context), layer(x, context))
