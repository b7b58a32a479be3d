import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from ldm.modules.encoders.image import ClipImageEmbedder
from ldm.modules.encoders.openclip import FrozenCLIPTextEmbedder, clip_model
from ldm.modules.encoders.retrieval import RetrievalTextEmbedder
from taming.util import instantiate_from_config


@pytest.fixture
def database(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    np.savez(tmp_path / "part.npz", embedding=vectors)
    return str(tmp_path)


def peer_of(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    peer = open_clip.CLIP(**config).eval()
    peer.load_state_dict(torch.load(folder / "open_clip_pytorch_model.bin"))
    return peer


@torch.no_grad()
def test_a_folder_that_open_clip_saved_stands_for_a_published_clip(clip_folder):
    peer, texts = peer_of(clip_folder), ["a fox", "a longer prompt about a cat"]
    expected = F.normalize(peer.encode_text(open_clip.tokenize(texts)), dim=-1)
    assert torch.allclose(FrozenCLIPTextEmbedder(str(clip_folder))(texts), expected, atol=1e-6)
    picture = torch.rand(1, 3, 224, 224) * 2 - 1
    model = ClipImageEmbedder(str(clip_folder))
    assert torch.allclose(model(picture), peer.visual(model.preprocess(picture)), atol=1e-6)


def test_names_and_folders_that_are_no_clip_are_refused(tmp_path):
    assert clip_model("ViT-B/32") == ("ViT-B-32", "openai")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config.json and open_clip_model.safetensors or"):
        clip_model(str(tmp_path))
    with pytest.raises(ValueError, match="Did you mean 'ViT-L-14'"):
        clip_model("ViT-L/41")


def test_the_context_is_the_prompt_and_its_neighbours_all_of_length_one(clip_folder, database):
    model = RetrievalTextEmbedder(str(clip_folder), n_repeat=2, database=database, knn=3)
    context = model.encode(["a fox", "a cat"])
    assert context.shape == (2, 5, 8) and not context.requires_grad
    assert torch.allclose(context.norm(dim=-1), torch.ones(2, 5))
    prompts = model.text(["a fox", "a cat"])
    assert torch.equal(context[:, 0], prompts) and torch.equal(context[:, 1], prompts)
    rows = F.normalize(torch.from_numpy(np.load(f"{database}/part.npz")["embedding"]), dim=-1)
    nearest = (prompts @ rows.T).topk(3).indices
    assert torch.allclose(context[:, 2:], rows[nearest], atol=1e-6)
    assert torch.allclose(model.encode("a fox"), context[:1], atol=1e-6)


def test_the_empty_prompt_is_zeros(clip_folder, database):
    model = RetrievalTextEmbedder(str(clip_folder), database=database, knn=2)
    context = model.encode(["", "a fox", " "])
    assert context.abs().sum(dim=(1, 2)).gt(0).tolist() == [False, True, False]


def test_without_a_database_the_prompt_is_all(clip_folder):
    model = RetrievalTextEmbedder(str(clip_folder))
    assert model.encode(["a fox"]).shape == (1, 1, 8) and model.retriever is None


def test_a_database_that_does_not_fit_is_refused(clip_folder, database, tmp_path):
    with pytest.raises(ValueError, match="knn=13: the database .* holds 12 vectors"):
        RetrievalTextEmbedder(str(clip_folder), database=database, knn=13).encode("a fox")
    np.savez(tmp_path / "part.npz", embedding=np.ones((12, 6), dtype=np.float32))
    with pytest.raises(ValueError, match="holds vectors of 6 numbers, this CLIP gives 8"):
        RetrievalTextEmbedder(str(clip_folder), database=database).encode("a fox")
    with pytest.raises(FileNotFoundError, match="data/rdm/retrieval_databases/nowhere"):
        RetrievalTextEmbedder(str(clip_folder), database="nowhere").encode("a fox")


def test_a_configuration_may_name_it_as_the_models_own_encoder(tiny, clip_folder, database):
    stage = {
        "target": "ldm.modules.encoders.retrieval.RetrievalTextEmbedder",
        "params": {"version": str(clip_folder), "database": database, "knn": 2},
    }
    model = instantiate_from_config(tiny.latent_diffusion(cond_stage_config=stage, cond_stage_key="caption"))
    context = model.get_learned_conditioning(["a fox"])
    assert context.shape == (1, 3, 8)
    assert model.apply_model(torch.randn(1, 3, 8, 8), torch.tensor([5]), context).shape == (1, 3, 8, 8)
