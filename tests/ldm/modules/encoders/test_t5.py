import pytest
import torch
import transformers

from ldm.modules.encoders.t5 import ARCHITECTURES, FrozenCLIPT5Encoder, FrozenT5Embedder

SIZES = {
    "vocab_size": 384,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}


@pytest.fixture(scope="module")
def hub_t5(tmp_path_factory):
    """A small encoder that reads bytes, and its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    model = transformers.T5EncoderModel(transformers.T5Config(**SIZES)).eval()
    model.save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)
    return model, folder


def test_the_encoder_equals_that_of_transformers_without_a_mask(hub_t5, caplog):
    hub, folder = hub_t5
    model = FrozenT5Embedder(str(folder), device="cpu", max_length=9)
    texts = ["a cat", "a far longer text"]
    ids = transformers.ByT5Tokenizer()(
        texts, padding="max_length", truncation=True, max_length=9, return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.allclose(
            model.encode(texts), hub(input_ids=ids["input_ids"]).last_hidden_state, atol=1e-5
        )
    assert "after 9 tokens; without effect: 'nger text'" in caplog.text
    assert not model.train().transformer.training  # no dropout in what is frozen
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in FrozenT5Embedder(str(folder), freeze=False).parameters())


def test_the_published_architectures_build_without_a_download(monkeypatch):
    for name in ARCHITECTURES:
        with torch.device("meta"):
            FrozenT5Embedder(name)
    with torch.device("meta"):
        large = FrozenT5Embedder()
    assert sum(p.numel() for p in large.parameters()) == 341_231_104  # T5 v1.1 large's encoder
    names = large.state_dict().keys()
    assert {"transformer.shared.weight", "transformer.encoder.embed_tokens.weight"} <= names
    with pytest.raises(
        OSError, match=r"sizes of 'no/such-t5' \(known without a download: google/t5-v1_1-small"
    ):
        FrozenT5Embedder("no/such-t5")


def test_weights_come_from_a_checkpoint_or_at_first_use(hub_t5, monkeypatch):
    hub, folder = hub_t5
    known = FrozenT5Embedder(str(folder), max_length=9)
    monkeypatch.setitem(ARCHITECTURES, "google/byt5-small", SIZES)
    loaded = FrozenT5Embedder("google/byt5-small", max_length=9)
    loaded.load_state_dict(known.state_dict())
    assert torch.equal(loaded("cat"), known("cat"))
    late = FrozenT5Embedder("google/byt5-small", max_length=9)
    assert late.transformer.encoder.embed_tokens.weight is late.transformer.shared.weight
    with pytest.raises(OSError, match="weights of 'google/byt5-small'.*hf download"):
        late("cat")
    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", lambda version: hub)
    assert torch.equal(late("cat"), known("cat"))
    with pytest.raises(OSError, match="tokenizer's files of 'google/t5-v1_1-small'"):
        _ = FrozenT5Embedder("google/t5-v1_1-small").tokenizer


def test_clip_and_t5_come_as_a_list_of_two(hub_clip, hub_t5):
    both = FrozenCLIPT5Encoder(str(hub_clip[1]), str(hub_t5[1]), clip_max_length=12, t5_max_length=9)
    clip, t5 = both.encode(["cat", "a dog"])
    assert clip.shape == (2, 12, 16) and t5.shape == (2, 9, 16)
    assert {k.split(".")[0] for k in both.state_dict()} == {"clip_encoder", "t5_encoder"}
