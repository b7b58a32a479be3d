"""What the scripts share beside their own tests in tests/scripts: texts, runs and checkpoints of models."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ldm import inference
from taming.checkpoint import CheckpointError, save_safetensors, save_shards
from taming.util import instantiate_from_config


class Reader:
    """Encodes a text as its length, and notes what it is asked; as a list of two tensors if `several`."""

    def __init__(self, several=False):
        self.several, self.asked = several, []

    def get_learned_conditioning(self, texts):
        self.asked.append(texts)
        made = torch.tensor([[float(len(text))] for text in texts])
        return [made, -made] if self.several else made


def test_equal_texts_are_encoded_once_and_stand_in_their_places():
    model = Reader()
    c, uc = inference.encoded_texts(model, ["cat", "horse", "cat"], "no", guided=True)
    assert c.tolist() == [[3], [5], [3]] and uc.tolist() == [[2]] * 3
    assert model.asked == [["no"], ["cat", "horse"]]  # the published order
    assert inference.encoded_texts(model, ["cat"], "no", guided=False)[1] is None


def test_encoders_that_give_several_conditions_are_spread_alike():
    c, uc = inference.encoded_texts(Reader(several=True), ["cat", "a", "a"], "", guided=True)
    assert [part.tolist() for part in c] == [[[3], [1], [1]], [[-3], [-1], [-1]]]
    assert [part.shape for part in uc] == [(3, 1)] * 2


def test_one_latent_of_a_first_stage_with_n_halvings_is_as_wide_as_two_to_the_n_pixels():
    assert inference.first_stage_factor(SimpleNamespace(num_downs=3)) == 8
    assert inference.first_stage_factor(SimpleNamespace()) == 1


def test_a_file_is_named_by_the_first_ten_digits_of_its_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert inference.file_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()[:10] == "ba7816bf8f"


@pytest.fixture
def run(tmp_path, tiny):
    """A run's folder, its model, and how to write its checkpoint."""
    folder, config = tmp_path / "run", {"model": tiny.latent_diffusion()}
    (folder / "configs").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    OmegaConf.save(config, folder / "configs" / "2026-project.yaml")
    return folder, instantiate_from_config(config["model"])


def test_a_run_knows_its_step_and_has_its_weights(run):
    folder, model = run
    path = folder / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "global_step": 7}, path)
    loaded = inference.load_run(str(folder), strict=True)
    assert (loaded.global_step, loaded.folder) == (7, folder) and not loaded.model.training
    own = model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in loaded.model.state_dict().items())
    torch.save(model.state_dict(), path)
    assert inference.load_run(str(folder)).global_step == 0


def test_a_strict_run_refuses_what_is_left_over(run):
    folder, model = run
    path = folder / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": {**model.state_dict(), "more": torch.ones(1)}, "global_step": 7}, path)
    assert inference.load_run(str(folder)).global_step == 7
    with pytest.raises(CheckpointError, match=r"1 left over \(more 1\)"):
        inference.load_run(str(folder), strict=True)


def test_a_model_of_v_is_taken_over_from_that_of_eps_without_reading_the_file_again(
    tmp_path, tiny, monkeypatch
):
    unet = {"use_spatial_transformer": True, "context_dim": 8, "num_heads": 2, "legacy": False}
    parts = {
        "unet": unet,
        "first_stage_config": tiny.kl,
        "cond_stage_config": tiny.text,
        "cond_stage_key": "txt",
    }
    model = instantiate_from_config(tiny.latent_diffusion(**parts))
    save_safetensors(model.state_dict(), tmp_path / "bare.safetensors")
    for kind in ("eps", "v"):
        OmegaConf.save(
            {"model": tiny.latent_diffusion(**parts, parameterization=kind)}, tmp_path / f"{kind}.yaml"
        )
    twins = SimpleNamespace(name="test", config=str(tmp_path / "eps.yaml"), twin=str(tmp_path / "v.yaml"))
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(inference, "recognise", lambda weights: twins)
    read, load = [], inference.load_model_from_config
    monkeypatch.setattr(
        inference, "load_model_from_config", lambda *given: read.append(load(*given)) or read[-1]
    )
    loaded, _, config = inference.load_model(str(tmp_path / "bare.safetensors"), None, torch.device("cpu"))
    assert loaded.parameterization == config.model.params.parameterization == "v" and not loaded.training
    assert len(read) == 1 and read[0].parameterization == "eps"
    before = read[0].state_dict(keep_vars=True)
    for name, value in loaded.state_dict(keep_vars=True).items():
        assert (
            value.data_ptr() == before[name].data_ptr() and value.requires_grad == before[name].requires_grad
        )
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([5])
    c = loaded.get_learned_conditioning(["a"])
    assert torch.equal(loaded.apply_model(x, t, c), read[0].apply_model(x, t, c))
    # what follows from the parameterisation and has no weights is its own
    assert loaded.lvlb_weights.unique().tolist() == [1.0]


def test_another_class_is_built_in_the_place_of_the_configured_one(run, tmp_path, monkeypatch):
    folder, model = run
    torch.save({"state_dict": model.state_dict()}, folder / "checkpoints" / "last.ckpt")
    (tmp_path / "of_my_own.py").write_text(
        "from ldm.models.diffusion.ddpm import LatentDiffusion\nclass Mine(LatentDiffusion):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    classes = {"ldm.models.diffusion.ddpm.LatentDiffusion": "of_my_own.Mine"}
    loaded, _, config = inference.load_model(str(folder), None, torch.device("cpu"), (), classes)
    assert type(loaded).__name__ == "Mine" and config.model.target == "of_my_own.Mine"
    assert torch.equal(next(loaded.parameters()), next(model.parameters()))


@pytest.mark.parametrize("keys", [{"concat_keys": ["mask"]}, {"finetune_keys": ["first.weight"]}])
def test_a_model_that_was_widened_in_training_is_loaded_wide(keys):
    config = OmegaConf.create({"params": {"ckpt_path": "narrow.ckpt", **keys}})
    inference.forget_starting_points(config)
    assert config.params.ckpt_path is None and config.params.finetune_keys is None


def test_other_models_get_no_parameter_that_they_do_not_know():
    config = OmegaConf.create({"params": {"ckpt_path": "x.ckpt", "first_stage_config": {"params": {"ckpt_path": "y"}}}})  # fmt: skip
    inference.forget_starting_points(config)
    assert config == {"params": {"ckpt_path": None, "first_stage_config": {"params": {"ckpt_path": None}}}}


def test_a_checkpoint_in_several_files_is_named_by_all_of_them(tmp_path):
    names = []
    for value in (1.0, 2.0):
        state = {name: torch.full((100,), value) for name in "ab"}
        save_shards(state, tmp_path / "m.safetensors", 500)
        names.append(inference.file_hash(tmp_path / "m.safetensors.index.json"))
    assert names[0] != names[1] and all(len(name) == 10 for name in names)
