import logging

import open_clip
import pytest
import torch

from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, SpatialRescaler
from ldm.modules.encoders.tokenizers import BERTTokenizer, BPETokenizer, clip_tokenizer


def test_the_full_vocabulary_gives_the_ids_of_open_clip():
    ours, peer = BPETokenizer(vq_interface=False), open_clip.get_tokenizer("ViT-B-32")
    for text in ("a photo of a cat", "naïve café ☕ 東京", "it's   3.14 !", ""):
        ids, expected = ours(text)[0].tolist(), peer([text])[0].tolist()
        length = expected.index(49407) + 1
        assert ids[:length] == expected[:length]
        assert set(ids[length:]) <= {49407}  # padded with the end id, where open_clip pads with zeros


def test_a_smaller_vocabulary_splits_words_and_loses_nothing():
    tokenizer = BPETokenizer(vocab_size=700, max_length=40)
    ids = tokenizer("smiling face with heart-eyes")[0]
    assert (
        int(ids.max()) < 700
        and int(ids[0]) == 698
        and tokenizer.words(ids.tolist()) == "smiling face with heart - eyes"
    )
    assert tokenizer.encode("x")[2][2].shape == (1, 40)
    for size in (100, 60000):
        with pytest.raises(ValueError, match="must lie between 514 and 49408"):
            BPETokenizer(vocab_size=size)


def test_text_may_stand_behind_image_codes_in_one_table():
    plain = BPETokenizer(vocab_size=700, max_length=8)
    behind = BPETokenizer(vocab_size=700, max_length=8, offset=1024)
    assert torch.equal(behind.encode(["red heart"])[2][2], plain.encode(["red heart"])[2][2] + 1024)
    assert torch.equal(
        behind(["red heart"]), plain(["red heart"])
    )  # `words` and models of text see plain ids


def test_a_cut_prompt_names_the_words_without_effect(caplog):
    tokenizer = BPETokenizer(max_length=5)
    with caplog.at_level(logging.WARNING):
        ids = tokenizer("red green blue yellow")
    assert ids.shape == (1, 5) and int(ids[0, -1]) == tokenizer.end
    assert "without effect: 'yellow'" in caplog.text


def test_the_bert_tokenizer_can_be_built_offline_and_says_what_it_lacks_when_used(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = BERTTokenizer(version="no/such-tokenizer")
    with pytest.raises(OSError, match="tokenizer='bpe', which needs no download"):
        tokenizer("a cat")


def test_special_tokens_in_a_prompt_are_read():
    tokenizer = BPETokenizer(vocab_size=700, max_length=6)
    assert tokenizer("<end_of_text>")[0].tolist() == [698, 699, 699, 699, 699, 699]


def test_transformers_kind_of_tokenizer_gives_the_same_ids_offline():
    for size in (600, 49408):
        ours, hub = BPETokenizer(vocab_size=size, max_length=30), clip_tokenizer(size)
        for text in ("a photo of a cat", "naïve café ☕ 東京", "it's   3.14 !", ""):
            ids = hub(text, padding="max_length", max_length=30)["input_ids"]
            assert ours(text)[0].tolist() == ids
            assert hub.decode(ids, skip_special_tokens=True) == ours.words(ids)


def test_berts_tokenizer_reads_a_folder_and_names_what_it_cuts(tmp_path, caplog):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    tokenizer = BERTTokenizer(version=str(tmp_path), max_length=4)
    assert tokenizer(["A cat", "a cat a dog"]).tolist() == [[2, 5, 6, 3], [2, 5, 6, 3]]
    assert "cut after 4 tokens; without effect: 'a dog'" in caplog.text


def test_the_text_encoder_trains_and_reads_strings():
    model = BERTEmbedder(n_embed=16, n_layer=1, vocab_size=600, max_seq_len=12, tokenizer="bpe")
    out = model.encode(["a cat", "a dog"])
    assert out.shape == (2, 12, 16)
    # unit variance: the cross-attention learns from it at once
    assert float(out.detach().std()) == pytest.approx(1.0, abs=0.05)
    out.sum().backward()
    assert model.transformer.token_emb.weight.grad is not None
    with pytest.raises(ValueError, match=r"choose one of \['bert', 'bpe'\]"):
        BERTEmbedder(n_embed=16, n_layer=1, tokenizer="t5")


def test_class_embeddings_and_their_guidance_dropout():
    model = ClassEmbedder(4, n_classes=6, key="label")
    batch = {"label": torch.tensor([1, 5])}
    assert torch.equal(model(batch)[:, 0], model.embedding.weight[[1, 5]])
    uncond = model.get_unconditional_conditioning(3, device="cpu")
    assert torch.equal(
        model(uncond)[:, 0], model.embedding.weight[[5, 5, 5]]
    )  # the last class stands for none
    dropping = ClassEmbedder(4, n_classes=6, key="label", ucg_rate=0.3)
    many = {"label": torch.zeros(4000, dtype=torch.long)}
    dropped = (dropping(many)[:, 0] == dropping.embedding.weight[5]).all(1).float().mean()
    assert float(dropped) == pytest.approx(0.3, abs=0.03)
    with pytest.raises(KeyError, match="no labels under 'label'. Did you mean 'labels'"):
        model({"labels": 1})
    with pytest.raises(ValueError, match="labels from 0 to 6 for 6 classes"):
        model({"label": torch.tensor([0, 6])})


def test_spatial_rescaling():
    x = torch.randn(1, 3, 8, 8)
    assert SpatialRescaler(n_stages=2, out_channels=5)(x).shape == (1, 5, 2, 2)
    assert torch.equal(SpatialRescaler(n_stages=0).encode(x), x)
    with pytest.raises(AssertionError, match="Did you mean 'bilinear'"):
        SpatialRescaler(method="bilinea")
