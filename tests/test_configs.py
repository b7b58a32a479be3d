"""Every configuration of the project builds what it describes, on the meta device: full size, no memory.

tests/published_configs.json lists the 118 published files: a digest of their values, the class that they build, and its parameters
by part. Their sizes are those of the originals' checkpoints, whose names and shapes the recorded `config_*` answers hold.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.inference import forget_starting_points
from taming.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("configs/**/*.yaml", "models/*/*/config.yaml", "scripts/sampling/configs/*.yaml")
CONFIGS = sorted(path for place in PLACES for path in ROOT.glob(place))
PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())
# data sets that configurations name and whose code nobody ever published
UNPUBLISHED = ("ldm.data.openimages.", "ldm.data.landscapes.", "ldm.data.previews.")


def local(name):
    """Where the project keeps `repository/path/in/it`."""
    return ROOT / name.split("/", 1)[1]


def digest(path):
    plain = OmegaConf.to_container(OmegaConf.load(path))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def parts(model):
    """Parameters by sub-model; those of the model itself under its class's name."""
    counts = {}
    for name, value in model.named_parameters():
        top = name.split(".")[0] if "." in name else type(model).__name__
        counts[top] = counts.get(top, 0) + value.numel()
    return counts


def fill_in(config):
    """What scripts/sampling/ adds to its configurations before it builds them."""
    sampler = OmegaConf.select(config, "model.params.sampler_config.params")
    if sampler is not None:
        OmegaConf.update(sampler, "num_steps", sampler.get("num_steps", 10))
        if OmegaConf.select(sampler, "guider_config.target", default="").endswith("PredictionGuider"):
            OmegaConf.update(sampler, "guider_config.params.num_frames", 14)


def test_there_are_118_published_files():
    assert len(PUBLISHED) == 118
    assert sum(entry["parts"] is None for entry in PUBLISHED.values()) == 3  # Karlo's say numbers alone


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_kept_under_its_path_with_its_values(name):
    assert digest(local(name)) == PUBLISHED[name]["digest"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_says_what_it_is_for(path):
    """A header of our own: a sentence, how to launch it (where it names a class), what it needs."""
    lines = path.read_text().split("\n")
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert len(header[0]) > 20
    names_a_class = "target" in OmegaConf.load(path).get("model", {})
    assert not names_a_class or any("python " in line or "streamlit run" in line for line in header)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_configuration_builds_its_model_at_full_size(path, random_vgg):
    config = OmegaConf.load(path)
    known = [entry for name, entry in PUBLISHED.items() if local(name) == path]
    if known and known[0]["parts"] is None:
        assert "target" not in config.model  # there is nothing to build
        return
    forget_starting_points(config)  # first stages' checkpoints are not in the repository
    fill_in(config)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    counts = parts(model)
    assert sum(counts.values()) > 1e5
    for entry in known:
        assert type(model).__name__ == entry["class"]
        assert counts == entry["parts"]
    if "data" in config:
        model.learning_rate = config.model.base_learning_rate
        assert model.configure_optimizers()
    for split in ("train", "validation", "test"):
        target = OmegaConf.select(config, f"data.params.{split}.target")
        if target is not None and not target.startswith(UNPUBLISHED):
            assert isinstance(get_obj_from_str(target), type)
