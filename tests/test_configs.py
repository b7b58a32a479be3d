"""Every configuration in configs/ builds what it describes, on the meta device: full size, no memory."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.inference import forget_starting_points
from taming.util import get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_configuration_builds_its_model_at_full_size(path, random_vgg):
    config = OmegaConf.load(path)
    forget_starting_points(config)  # first stages' checkpoints are not in the repository
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    assert sum(p.numel() for p in model.parameters()) > 1e5
    model.learning_rate = config.model.base_learning_rate
    assert model.configure_optimizers()
    for split in ("train", "validation", "test"):
        section = config.data.params.get(split)
        if section is not None:
            assert isinstance(get_obj_from_str(section.target), type)
