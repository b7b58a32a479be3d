import copy

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from ldm.modules.encoders.clip import ARCHITECTURES, CLIPTextConfig, CLIPTextModel, FrozenCLIPEmbedder
from taming.checkpoint import CheckpointError, load_into
from taming.util import instantiate_from_config

SIZES = {"vocab_size": 56, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 12}  # fmt: skip
L14 = "openai/clip-vit-large-patch14"


def ours(hub, **options):
    """Our text model with the weights of one of transformers."""
    model = CLIPTextModel(CLIPTextConfig(**{**SIZES, **options}))
    model.load_state_dict(hub.state_dict())
    return model.eval()


def test_the_text_model_equals_that_of_transformers(hub_clip):
    hub, _ = hub_clip
    ids = torch.tensor([[54, 3, 9, 55, 55, 55], [54, 1, 2, 4, 5, 55]])
    with torch.no_grad():
        theirs, mine = hub(ids, output_hidden_states=True), ours(hub)(ids)
    assert torch.allclose(mine.last_hidden_state, theirs.last_hidden_state, atol=1e-5)
    assert torch.allclose(mine.pooler_output, theirs.pooler_output, atol=1e-5)
    for a, b in zip(mine.hidden_states, theirs.hidden_states[:4], strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
def test_the_activations_equal_those_of_transformers(act):
    hub = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES, hidden_act=act)).eval()
    ids = torch.randint(0, 56, (2, 12))
    with torch.no_grad():
        a, b = hub(ids).last_hidden_state, ours(hub, hidden_act=act)(ids).last_hidden_state
    assert torch.allclose(a, b, atol=1e-5)


def test_the_pooled_vector_stands_at_the_first_end_token():
    model = CLIPTextModel(CLIPTextConfig(**SIZES, eos_token_id=7))
    model.reset_parameters()
    ids = torch.tensor(
        [[54, 3, 7, 55, 7], [54, 7, 3, 3, 3]]
    )  # 55, a word added later, is larger than the end token
    out = model(ids)
    assert torch.equal(out.pooler_output, out.last_hidden_state[[0, 1], [2, 1]])


def test_a_folder_of_the_hubs_kind_gives_tokenizer_sizes_and_weights(hub_clip):
    hub, folder = hub_clip
    model = FrozenCLIPEmbedder(str(folder), device="cpu", max_length=12)
    ids = model.tokenizer(["cat dog", ""], padding="max_length", max_length=12, return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        assert torch.allclose(model.encode(["cat dog", ""]), hub(ids).last_hidden_state, atol=1e-5)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.train().transformer.training


def test_layers_can_be_chosen(hub_clip):
    hub, folder = hub_clip
    states = ours(hub)(FrozenCLIPEmbedder(str(folder), max_length=12).reader()("cat")[0][:, 0])
    for options, expected in (
        ({"layer": "pooled"}, states.pooler_output[:, None]),
        ({"layer": "hidden", "layer_idx": -2}, states.hidden_states[-2]),
        ({"layer": "hidden", "layer_idx": 0}, states.hidden_states[0]),
    ):
        assert torch.equal(FrozenCLIPEmbedder(str(folder), max_length=12, **options)("cat"), expected)
    with pytest.raises(AssertionError, match="layer='lst' is unknown; choose one of last, pooled, hidden"):
        FrozenCLIPEmbedder(SIZES, layer="lst")
    for idx in (None, 4):
        with pytest.raises(AssertionError, match=f"layer_idx from -3 to 3, not {idx}"):
            FrozenCLIPEmbedder(SIZES, layer="hidden", layer_idx=idx)


def test_the_published_names_go_out_and_come_in_old_and_new():
    model = FrozenCLIPEmbedder(SIZES)
    state = model.state_dict()
    assert "transformer.text_model.encoder.layers.2.self_attn.q_proj.weight" in state
    assert state["transformer.text_model.embeddings.position_ids"].tolist() == [list(range(12))]
    wanted = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
    without_level = {k.replace("text_model.", ""): v for k, v in wanted.items()}
    no_ids = {k: v for k, v in wanted.items() if "position_ids" not in k}
    rounded = {**wanted, "transformer.text_model.embeddings.position_ids": torch.arange(12.0)[None] * 0.99}
    for names in (wanted, without_level, no_ids, rounded):
        fresh = FrozenCLIPEmbedder(SIZES)
        fresh.load_state_dict(names)  # strict
        assert all(torch.equal(v, wanted[k]) for k, v in fresh.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*fc1"):
        model.load_state_dict({k: v for k, v in wanted.items() if "fc1" not in k})


def test_transformers_reads_what_we_write(hub_clip):
    hub, folder = hub_clip
    written = FrozenCLIPEmbedder(str(folder)).transformer.state_dict()
    fresh = transformers.CLIPTextModel(hub.config)
    known = fresh.state_dict().keys()
    fresh.load_state_dict(
        {k.removeprefix("text_model."): v for k, v in written.items() if not k.endswith("position_ids")}
    )
    assert known == hub.state_dict().keys()
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in hub.state_dict().items())


def test_the_published_architectures_build_without_a_download_and_say_what_they_lack():
    for name, config in ARCHITECTURES.items():
        with torch.device("meta"):
            model = FrozenCLIPEmbedder(name)
        assert model.state_dict()["transformer.text_model.final_layer_norm.weight"].shape == (
            config.hidden_size,
        )
    with torch.device("meta"):
        large = FrozenCLIPEmbedder()
    assert sum(p.numel() for p in large.parameters()) == 123_060_480  # as the hub states for this text tower
    with pytest.raises(RuntimeError, match="meta device, which holds no numbers"):
        large("a cat")
    with pytest.raises(
        OSError, match=r"weights of 'openai/clip-vit-large-patch14'.*Load a checkpoint that holds them"
    ):
        FrozenCLIPEmbedder()("a cat")
    with pytest.raises(OSError, match=r"sizes of 'no/such-model' \(known without a download: openai"):
        FrozenCLIPEmbedder("no/such-model")


def small_published(monkeypatch, fetch=None):
    """A published name whose architecture is small, and what its download gives."""
    monkeypatch.setitem(ARCHITECTURES, L14, CLIPTextConfig(**{**SIZES, "vocab_size": 600}))
    calls = []

    def weights(version):
        calls.append(version)
        if fetch is None:
            raise OSError("no connection.")
        return fetch

    monkeypatch.setattr(transformers.CLIPTextModel, "from_pretrained", weights)
    return FrozenCLIPEmbedder(max_length=12), calls


def trained(seed=1):
    torch.manual_seed(seed)
    model = FrozenCLIPEmbedder({**SIZES, "vocab_size": 600}, max_length=12)
    return model, model.state_dict()


def test_a_checkpoints_text_encoder_is_really_loaded_and_nothing_is_fetched(monkeypatch):
    model, calls = small_published(monkeypatch)
    source, state = trained()
    load_into(model, state)
    assert torch.equal(model("a cat"), source("a cat")) and not calls


def test_missing_weights_are_fetched_at_first_use_once(monkeypatch):
    source, state = trained()
    hub = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**SIZES, "vocab_size": 600}))
    hub.load_state_dict({k.split("text_model.")[1]: v for k, v in state.items() if "position_ids" not in k})
    model, calls = small_published(monkeypatch, hub)
    copied = copy.deepcopy(model)
    assert not calls
    model.half()
    assert torch.allclose(model.float()("a cat"), source("a cat"))
    model("a dog")
    assert calls == [L14] and torch.equal(copied("a cat"), source("a cat"))


def test_what_a_checkpoint_holds_wins_over_what_is_fetched(monkeypatch, caplog):
    _, other = trained(2)
    hub = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**SIZES, "vocab_size": 600}))
    model, _ = small_published(monkeypatch, hub)
    part = {k: v for k, v in other.items() if "final_layer_norm" not in k}
    load_into(model, part)
    model("a cat")
    assert "2 of 53 weights were in no checkpoint (text_model.final_layer_norm.weight" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in part.items())
    assert torch.equal(state["transformer.text_model.final_layer_norm.weight"], hub.final_layer_norm.weight)


def test_published_weights_of_another_size_are_refused(monkeypatch):
    hub = transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))
    model, _ = small_published(monkeypatch, hub)
    with pytest.raises(
        CheckpointError,
        match=r"do not fit FrozenCLIPEmbedder: .*token_embedding.weight is \(56, 16\) there and \(600, 16\) here",
    ):
        model("a cat")


def test_sizes_give_a_fresh_trainable_encoder_that_tokenises_offline():
    torch.manual_seed(0)
    model = FrozenCLIPEmbedder({**SIZES, "vocab_size": 600}, max_length=12, freeze=False)
    z = model("a cat")
    assert z.shape == (1, 12, 16)
    z.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    target = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
    config = OmegaConf.create(
        {"target": target, "params": {"version": {**SIZES, "vocab_size": 600}, "max_length": 12}}
    )
    assert instantiate_from_config(config).encode(["a", "b"]).shape == (2, 12, 16)
    with pytest.raises(ValueError, match="no size 'hiden_size'. Did you mean 'hidden_size'"):
        FrozenCLIPEmbedder({"hiden_size": 8})
    with pytest.raises(ValueError, match="hidden_act='gleu' is unknown. Did you mean 'gelu'"):
        FrozenCLIPEmbedder({"hidden_act": "gleu"})
    with pytest.raises(ValueError, match="13 tokens for 12 positions"):
        model.transformer(torch.zeros(1, 13, dtype=torch.long))
