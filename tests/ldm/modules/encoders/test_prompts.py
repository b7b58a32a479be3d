import logging

import pytest
import torch

from ldm.modules.encoders.clip import FrozenCLIPEmbedder
from ldm.modules.encoders.openclip import FrozenOpenCLIPEmbedder
from ldm.modules.encoders.prompts import PromptReader, parse_weights

SIZES = {
    "vocab_size": 600,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (cat:1.3)", [("a ", 1.0), ("cat", 1.3)]),
        ("(cat) [dog]", [("cat", 1.1), (" ", 1.0), ("dog", 1 / 1.1)]),
        ("((cat)) (a (b:2) c:0.5)", [("cat", 1.1**2), (" ", 1.0), ("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        (r"\(cat\) \[x\] \\ \n", [("(cat) [x] \\ \\n", 1.0)]),
        ("at 3:15 :) ok (", [("at 3:15 :) ok (", 1.0)]),  # a bracket without its partner is text
        ("[a:1.5) b]", [("a:1.5) b", 1 / 1.1)]),
        ("(cat:-.5)(dog: 2 )", [("cat", -0.5), ("dog", 2.0)]),
        ("(:1.3)", []),
        ("", []),
    ],
)
def test_brackets_become_weights(prompt, pieces):
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def letters(**options):
    """A reader whose tokens are the letters' code points."""
    return PromptReader(
        lambda text: [ord(c) for c in text],
        lambda ids: "".join(map(chr, ids)),
        start=1,
        end=2,
        pad=0,
        **options,
    )


def test_a_prompt_fills_windows_and_the_rest_is_named(caplog):
    ids, weights = letters(length=5, windows=2, weighted=True)(["ab(cd:2)", ""])
    assert ids.tolist() == [[[1, 97, 98, 99, 2], [1, 100, 2, 0, 0]], [[1, 2, 0, 0, 0]] * 2]
    assert weights.tolist() == [[[1, 1, 1, 2, 1], [1, 2, 1, 1, 1]], [[1.0] * 5] * 2]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        short = letters(length=5)
        assert short("abcdef")[0].tolist() == [[[1, 97, 98, 99, 2]]]
        short("abcdef")
    assert [r.message for r in caplog.records] == ["The prompt is cut after 3 tokens; without effect: 'def'"]
    with pytest.raises(TypeError, match="prompts must be strings, not int"):
        short(["a", 3])


def embedder(**options):
    torch.manual_seed(0)
    model = FrozenCLIPEmbedder(SIZES, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_a_weight_of_one_changes_nothing_and_zero_gives_the_empty_prompt():
    plain, weighted = embedder(), embedder(prompt_weights=True)
    z, empty = plain("red cat"), plain("")
    assert torch.equal(weighted("red cat"), z)
    assert torch.allclose(weighted("(red cat:1)"), z, atol=1e-6)
    assert torch.allclose(weighted("(red cat:0)")[:, 1], empty[:, 1], atol=1e-6)
    assert torch.allclose(weighted(["(red cat:1.5)"])[:, 1], empty[:, 1] + 1.5 * (z - empty)[:, 1], atol=1e-5)
    # without the option, brackets are words of the prompt
    assert torch.equal(plain("(red:1.5)"), plain("( red : 1 . 5 )"))


def test_windows_are_encoded_one_by_one():
    model, one = embedder(windows=2, max_length=8), embedder(max_length=8)
    words = model.tokenizer("a red cat and a dog", add_special_tokens=False)["input_ids"]
    assert 6 < len(words) <= 12
    z = model("a red cat and a dog")
    halves = [one(model.tokenizer.decode(part)) for part in (words[:6], words[6:])]
    assert z.shape == (1, 16, 16) and torch.allclose(z, torch.cat(halves, 1), atol=1e-5)
    assert torch.equal(model(["", "a"])[0], torch.cat([one(""), one("")], 1)[0])
    with pytest.raises(ValueError, match="windows=0 must be at least 1"):
        embedder(windows=0)
    with pytest.raises(ValueError, match="'pooled' gives one vector a prompt"):
        embedder(windows=2, layer="pooled")


def test_open_clip_reads_weights_and_windows(open_clip_model, caplog):
    _, config, path = open_clip_model
    options = {"arch": config, "version": str(path), "layer": "penultimate"}
    plain = FrozenOpenCLIPEmbedder(**options)
    long = FrozenOpenCLIPEmbedder(**options, prompt_weights=True, windows=2)
    text = "cat " * 75
    with caplog.at_level(logging.WARNING):
        z = long(text + "(dog:0)")
        assert not caplog.records
        cut = plain(text + "walrus owl")
    assert "after 75 tokens; without effect: 'walrus owl'" in caplog.text
    assert z.shape == (1, 154, 16) and torch.allclose(z[:, :77], cut, atol=1e-6)
    assert torch.allclose(z[:, 78], plain("")[:, 1], atol=1e-6)
