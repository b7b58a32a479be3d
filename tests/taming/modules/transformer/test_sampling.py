"""Drawing tokens: filters, guidance, seeds, limits."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from taming.modules.transformer import sampling
from taming.modules.transformer.mingpt import GPT, generate, sample, sample_with_past
from taming.modules.transformer.sampling import Draw


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = GPT(vocab_size=20, block_size=12, n_layer=2, n_head=2, n_embd=16).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def naive(model, x, steps, draw):
    """One full pass a token."""
    with torch.no_grad():
        for _ in range(steps):
            x = torch.cat([x, draw(model(x[:, -12:])[0][:, -1])], dim=1)
    return x


@pytest.mark.parametrize("k", [1, 5, 20, 99])
def test_top_k_is_that_of_transformers(k):
    logits = torch.randn(3, 20)
    assert torch.equal(sampling.top_k_logits(logits, k), TopKLogitsWarper(min(k, 20))(None, logits))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(p):
    logits = 3 * torch.randn(3, 20)
    assert torch.equal(sampling.top_p_logits(logits, p), TopPLogitsWarper(p)(None, logits))


def test_the_first_token_that_passes_p_stays():
    probabilities = torch.tensor([[0.5, 0.25, 0.15, 0.1]])
    kept = sampling.top_p_logits(probabilities.log(), 0.6).isfinite()
    assert kept.tolist() == [[True, True, False, False]]
    assert sampling.top_p_logits(probabilities.log(), 0.0).isfinite().sum() == 1


def test_draws_follow_the_probabilities():
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    tokens = Draw(temperature=0.5)(probabilities.log().expand(20000, 3))
    shares = torch.bincount(tokens[:, 0], minlength=3) / 20000
    expected = probabilities**2 / (probabilities**2).sum()  # a temperature of one half squares them
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)  # four deviations


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"temperature": 1.4, "top_k": 7}])
def test_the_cache_draws_the_same_tokens_as_full_passes_under_a_seed(model, options):
    x = torch.randint(0, 20, (3, 2))
    torch.manual_seed(5)
    expected = naive(model, x, 10, Draw(**options))
    torch.manual_seed(5)
    assert torch.equal(sample(model, x, 10, sample=True, **options), expected)
    torch.manual_seed(5)
    assert torch.equal(sample_with_past(x, model, 10, **options), expected[:, 2:])


def test_context_beyond_the_block_is_cropped_by_sample_and_refused_by_the_others(model):
    x = torch.randint(0, 20, (2, 3))
    assert torch.equal(sample(model, x, 14), naive(model, x, 14, Draw(sample=False)))
    for error in (IndexError, AssertionError):
        with pytest.raises(error, match="16 tokens .* block holds 12"):
            sample_with_past(x, model, 14)


def test_a_generator_makes_draws_independent_of_the_global_seed(model):
    x = torch.zeros(2, 1, dtype=torch.long)
    first = generate(model, x, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, generate(model, x, 8, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(state, torch.get_rng_state())


def test_guidance_is_the_formula_on_two_separate_passes(model):
    prompt, null = torch.tensor([[3], [7]]), torch.tensor([[19], [19]])
    guided = generate(model, prompt, 9, sample=False, guidance=2.5, null_prompt=null)
    tokens = torch.empty(2, 0, dtype=torch.long)
    for _ in range(9):
        c, u = (model(torch.cat([p, tokens], dim=1))[0][:, -1] for p in (prompt, null))
        tokens = torch.cat([tokens, (u + 2.5 * (c - u)).argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(guided, tokens)
    assert torch.equal(
        generate(model, prompt, 9, sample=False, null_prompt=null), generate(model, prompt, 9, sample=False)
    )


def test_embeddings_stand_before_the_prompt(model):
    embeddings = torch.randn(2, 3, 16)
    tokens = torch.empty(2, 0, dtype=torch.long)
    got = generate(model, tokens, 6, sample=False, embeddings=embeddings)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens, embeddings)[0][:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(got, tokens)


def test_a_subclass_with_its_own_forward_is_not_bypassed(model):
    class Constant(GPT):
        def forward(self, idx, embeddings=None, targets=None):
            logits = torch.zeros(*idx.shape, 20)
            logits[..., 11] = 1
            return logits, None

    net = Constant(vocab_size=20, block_size=12, n_layer=1, n_head=2, n_embd=16).eval()
    assert (generate(net, torch.zeros(1, 1, dtype=torch.long), 4, sample=False) == 11).all()


def test_callbacks_and_prompt_are_left_as_published(model):
    calls, x = [], torch.randint(0, 20, (1, 2))
    kept = x.clone()
    assert sample_with_past(x, model, 3, callback=calls.append).shape == (1, 3)
    assert calls == [0, 1, 2] and torch.equal(x, kept)
    assert sample(model, x, 0).shape == (1, 2)


def test_top_p_alone_is_ignored_as_published_and_said(model, caplog):
    x = torch.zeros(4, 1, dtype=torch.long)
    torch.manual_seed(1)
    plain = sample_with_past(x, model, 6)
    torch.manual_seed(1)
    assert torch.equal(plain, sample_with_past(x, model, 6, top_p=0.1))
    assert "unless top_k is given" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": -0.5}, "top_p=-0.5"),
        ({"guidance": 2.0}, "null_prompt must be"),
        ({"steps": -1}, "steps=-1"),
        ({"prompt": torch.empty(2, 0, dtype=torch.long)}, "nothing to continue"),
    ],
)
def test_bad_options_are_named(model, options, message):
    arguments = {"prompt": torch.zeros(2, 1, dtype=torch.long), "steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


@pytest.mark.slow
def test_the_compiled_step_draws_the_same_tokens(model):
    prompt = torch.randint(0, 20, (2, 3))
    plain = generate(model, prompt, 9, sample=False)
    for _ in range(2):  # the second run reuses the compiled step and its cache
        assert torch.equal(generate(model, prompt, 9, sample=False, compiled=True), plain)
