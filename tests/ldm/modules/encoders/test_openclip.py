import open_clip
import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.encoders.openclip import FrozenCLIPTextEmbedder, FrozenOpenCLIPEmbedder, openai_architecture
from taming.checkpoint import load_into
from taming.util import instantiate_from_config


def test_the_last_layer_equals_open_clip_before_its_projection(open_clip_model):
    peer, config, path = open_clip_model
    model = FrozenOpenCLIPEmbedder(config, str(path), device="cpu")
    texts = ["a photo of a cat", ""]
    ids = open_clip.tokenize(texts)
    z = model(texts)
    ends = z[torch.arange(2), ids.argmax(-1)] @ peer.text_projection
    assert z.shape == (2, 77, 16) and torch.allclose(ends, peer.encode_text(ids), atol=1e-5)
    assert torch.equal(model.encode(texts), z)
    assert not any(p.requires_grad for p in model.parameters()) and not hasattr(model.model, "visual")


def test_the_penultimate_layer_equals_open_clips_intermediate_state(open_clip_model):
    peer, config, path = open_clip_model
    model = FrozenOpenCLIPEmbedder(config, str(path), layer="penultimate")
    ids = open_clip.tokenize(["a photo of a cat"])
    states = peer.forward_intermediates(text=ids, intermediates_only=True)["text_intermediates"]
    assert torch.allclose(model("a photo of a cat"), peer.ln_final(states[-2]), atol=1e-5)


def test_models_that_put_the_sequence_first_give_the_same(open_clip_model):
    _, config, path = open_clip_model
    model, old = (FrozenOpenCLIPEmbedder(config, str(path)) for _ in range(2))
    old.model.transformer.batch_first = False
    for block in old.model.transformer.resblocks:
        block.attn.batch_first = False
    assert torch.allclose(model(["a cat", "dogs"]), old(["a cat", "dogs"]), atol=1e-5)


def test_the_published_architecture_builds_on_the_meta_device_with_published_names():
    with torch.device("meta"):
        state = FrozenOpenCLIPEmbedder(layer="penultimate").state_dict()
    assert len(state) == 24 * 12 + 6 and state["model.token_embedding.weight"].shape == (49408, 1024)
    assert {k for k in state if "resblocks" not in k} == {
        "model.positional_embedding", "model.text_projection", "model.logit_scale", "model.token_embedding.weight",
        "model.ln_final.weight", "model.ln_final.bias",
    }  # fmt: skip


def published(monkeypatch, config, download):
    """A published name whose architecture is small."""
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: dict(config) if name == "ViT-H-14" else None
    )
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    return FrozenOpenCLIPEmbedder(layer="penultimate")


def test_weights_come_from_a_checkpoint_or_at_first_use_from_the_hub(open_clip_model, monkeypatch):
    _, config, path = open_clip_model
    known = FrozenOpenCLIPEmbedder(config, str(path), layer="penultimate")

    def fail(tag):
        raise FileNotFoundError("no connection")

    model = published(monkeypatch, config, fail)
    with pytest.raises(
        OSError, match=r"weights 'laion2b_s32b_b79k' of ViT-H-14, .*\(no connection\). Load a checkpoint"
    ):
        model("a cat")
    # neither the last layer nor the projection is read, so a checkpoint without them is whole
    unread = ("model.transformer.resblocks.2.", "model.text_projection", "model.logit_scale")
    load_into(model, {k: v for k, v in known.state_dict().items() if not k.startswith(unread)})
    assert torch.equal(model("a cat"), known("a cat"))
    assert torch.equal(published(monkeypatch, config, lambda tag: str(path))("a cat"), known("a cat"))


def test_a_configuration_may_give_the_sizes_and_fresh_weights(open_clip_model):
    params = {"arch": open_clip_model[1], "freeze": False, "layer": "penultimate"}
    target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    model = instantiate_from_config(OmegaConf.create({"target": target, "params": params}))
    z = model.encode("a cat")
    assert z.shape == (1, 77, 16) and bool(z.isfinite().all())
    z.square().sum().backward()
    assert model.model.token_embedding.weight.grad is not None


def test_weights_of_open_clips_trainings_load(open_clip_model, tmp_path):
    peer, config, path = open_clip_model
    torch.save({"state_dict": {f"module.{k}": v for k, v in peer.state_dict().items()}}, tmp_path / "run.pt")
    a, b = (FrozenOpenCLIPEmbedder(config, str(p)) for p in (path, tmp_path / "run.pt"))
    assert torch.equal(a("a cat"), b("a cat"))


def test_unknown_names_are_answered_with_known_ones():
    with pytest.raises(ValueError, match="knows no architecture 'ViT-H14'. Did you mean 'ViT-H-14'"):
        FrozenOpenCLIPEmbedder("ViT-H14")
    with pytest.raises(
        ValueError, match="'laion2b_s32b_b79', nor is that a file. Did you mean 'laion2b_s32b_b79k'"
    ):
        FrozenOpenCLIPEmbedder(version="laion2b_s32b_b79")
    with pytest.raises(ValueError, match="another text tower than CLIP's"):
        FrozenOpenCLIPEmbedder("ViT-B-16-SigLIP", "webli")
    with pytest.raises(AssertionError, match="choose one of last, penultimate"):
        FrozenOpenCLIPEmbedder(layer="pooled")
    with pytest.raises(ValueError, match="OpenAI has published no CLIP model 'ViT-L/15'"):
        FrozenCLIPTextEmbedder("ViT-L/15")


def test_openais_clip_gives_one_vector_a_prompt(open_clip_model, monkeypatch):
    peer, config, path = open_clip_model
    assert openai_architecture("ViT-L/14@336px") == "ViT-L-14-336"
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: dict(config))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(path))
    model = FrozenCLIPTextEmbedder(n_repeat=3)
    assert model("a cat").norm().item() == pytest.approx(1.0) and model.encode(["a", "b"]).shape == (2, 3, 8)
    # OpenAI's models were trained with the quick GELU, whatever the architecture's file says
    assert type(model.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    quick = open_clip.CLIP(**config, quick_gelu=True).eval()
    quick.load_state_dict(peer.state_dict())
    expected = quick.encode_text(open_clip.tokenize(["a cat"]))
    assert torch.allclose(FrozenCLIPTextEmbedder(normalize=False)("a cat"), expected, atol=1e-5)
