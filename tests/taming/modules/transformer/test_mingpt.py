"""The GPT beside transformers' GPT-2, and its cache beside itself without one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from taming.modules.transformer.cache import NextToken
from taming.modules.transformer.mingpt import GPT, CodeGPT, DummyGPT

EXACT = {"atol": 1e-5, "rtol": 1e-5}


def gpt(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(
        **{"vocab_size": 30, "block_size": 16, "n_layer": 3, "n_head": 2, "n_embd": 16, **options}
    ).eval()
    for parameter in model.parameters():  # far from the initial zeros, so that every part counts
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[4] / "scripts" / "benchmark" / "token_sampling.py"
    spec = importlib.util.spec_from_file_location("token_sampling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_logits_and_loss_are_those_of_gpt2_in_transformers(benchmark):
    model = gpt()
    peer = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_layer=3, n_head=2, n_embd=16, activation_function="gelu", tie_word_embeddings=False)
    ).eval()  # fmt: skip
    peer.load_state_dict(benchmark.as_gpt2(model))
    idx = torch.randint(0, 30, (2, 11))
    logits, loss = model(idx[:, :-1], targets=idx[:, 1:])
    torch.testing.assert_close(logits, peer(idx[:, :-1]).logits, **EXACT)
    torch.testing.assert_close(loss, peer(idx, labels=idx).loss, **EXACT)


@pytest.mark.parametrize("n_unmasked", [0, 1, 4])
@pytest.mark.parametrize("embedded", [0, 5])
def test_cached_logits_equal_uncached_ones(n_unmasked, embedded):
    model = gpt(n_unmasked=n_unmasked)
    idx = torch.randint(0, 30, (2, 16 - embedded))
    embeddings = torch.randn(2, embedded, 16) if embedded else None
    stream = NextToken(model, 2, 16)
    with torch.no_grad():
        for n in range(1, idx.shape[1] + 1):
            expected = model(idx[:, :n], embeddings)[0][:, -1]
            torch.testing.assert_close(stream(idx[:, :n], embeddings), expected, **EXACT)
    assert stream.cache.filled == 16


@torch.no_grad()
def test_several_tokens_can_follow_a_cache_and_its_memory_stays_in_place():
    model, idx = gpt(), torch.randint(0, 30, (2, 12))
    cache = model.new_cache(2, 12)
    place = cache.entries.data_ptr()
    for part in idx.split([5, 3, 1, 3], dim=1):
        logits = model.extend(part, cache)
    torch.testing.assert_close(logits, model(idx)[0][:, -1], **EXACT)
    assert cache.entries.data_ptr() == place and cache.filled == 12
    with pytest.raises(ValueError, match="holds 12 of at most 12"):
        model.extend(idx[:, :1], cache)


@torch.no_grad()
def test_the_step_of_fixed_shapes_equals_the_plain_one_and_compiles_whole():
    model, idx = gpt(), torch.randint(0, 30, (2, 9))
    cache = model.new_cache(2, 16)
    model.extend(idx[:, :6], cache)
    step = torch.compile(model.step, backend="eager", fullgraph=True, dynamic=False)
    for n in range(6, 9):
        logits = step(idx[:, n : n + 1], torch.tensor([n]), cache.entries)
        torch.testing.assert_close(logits, model(idx[:, : n + 1])[0][:, -1], **EXACT)


@torch.no_grad()
def test_the_published_cache_has_its_shapes_and_the_same_logits():
    model, idx = gpt(), torch.randint(0, 30, (2, 7))
    logits, loss, past = model.forward_with_past(idx[:, :6])
    assert loss is None and past.shape == (3, 2, 2, 2, 6, 8)
    last, _, _ = model.forward_with_past(idx[:, 6:], past=[past], past_length=6)
    torch.testing.assert_close(torch.cat([logits, last], dim=1), model(idx)[0], **EXACT)
    with pytest.raises(AssertionError, match="one token at a time"):
        model.forward_with_past(idx[:, 5:], past=[past], past_length=6)
    with pytest.raises(AssertionError, match="eval mode"):
        model.train().forward_with_past(idx)


def test_no_token_sees_a_later_one_beyond_the_unmasked():
    model = gpt(n_unmasked=3)
    idx = torch.randint(0, 30, (1, 8))
    other = idx.clone()
    other[0, 5] = (other[0, 5] + 1) % 30
    torch.testing.assert_close(model(idx)[0][:, :5], model(other)[0][:, :5], atol=0, rtol=0)
    other = idx.clone()
    other[0, 2] = (other[0, 2] + 1) % 30
    assert not torch.allclose(model(idx)[0][:, 0], model(other)[0][:, 0])


def test_the_mask_of_a_checkpoint_decides():
    trained, fresh = gpt(n_unmasked=4), gpt(seed=1)
    fresh.load_state_dict(trained.state_dict())
    idx = torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(fresh(idx)[0], trained(idx)[0])
    assert fresh.n_unmasked == 4


def test_attention_weights_drop_out_in_training_only():
    model = gpt(attn_pdrop=0.5)
    idx = torch.randint(0, 30, (1, 8))
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_a_model_under_autocast_caches_in_its_number_type():
    model, idx = gpt(), torch.randint(0, 30, (2, 6))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        stream = NextToken(model, 2, 6)
        for n in (5, 6):
            logits = stream(idx[:, :n])
            torch.testing.assert_close(logits, model(idx[:, :n])[0][:, -1], atol=0.1, rtol=0.1)
        assert stream.cache.entries.dtype == torch.bfloat16


def test_code_gpt_reads_vectors():
    model = CodeGPT(vocab_size=9, block_size=6, in_channels=5, n_layer=1, n_head=2, n_embd=8)
    logits, loss = model(torch.randn(2, 4, 5), targets=torch.randint(0, 9, (2, 4)))
    assert logits.shape == (2, 4, 9) and loss.isfinite()
    assert torch.equal(DummyGPT(2)(torch.tensor([[1]]))[0], torch.tensor([[3]]))


def test_too_many_tokens_and_unknown_ones_are_named():
    model = gpt()
    with pytest.raises(AssertionError, match="17 tokens .* block holds 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(IndexError, match="to 30 came in, .* vocab_size is 30"):
        model(torch.tensor([[3, 30]]))
    with pytest.raises(ValueError, match="n_embd=16 must be a multiple of n_head=3"):
        gpt(n_head=3)


def test_the_benchmark_runs_and_all_agree(benchmark, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.MODELS, "tiny", (1, 2, 16, 32))
    monkeypatch.setattr("sys.argv", ["token_sampling.py", "--tokens", "8", "--batch", "2", "--rounds", "1", "--threads", "1"])  # fmt: skip
    benchmark.main()
    assert "100.0% with uncached, 100.0% with transformers" in capsys.readouterr().out
