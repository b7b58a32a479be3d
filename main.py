"""Train a model from YAML: `python main.py --base configs/quickstart/text2img.yaml -t`; `--help` lists every flag."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent)
)  # this checkout first, whatever else owns `taming` or `ldm`

from taming.training import (
    CUDACallback,
    DataModuleFromConfig,
    ImageLogger,
    LearningRateMonitor,
    LossCurve,
    RandomState,
    SetupCallback,
    WrappedDataset,
    get_obj_from_str,
    instantiate_from_config,
    worker_init_fn,
)
from taming.training.cli import main

# configurations name `main.X`: the classes live in taming.training, so that there is only one of each
__all__ = [
    "CUDACallback",
    "DataModuleFromConfig",
    "ImageLogger",
    "LearningRateMonitor",
    "LossCurve",
    "RandomState",
    "SetupCallback",
    "WrappedDataset",
    "get_obj_from_str",
    "instantiate_from_config",
    "main",
    "worker_init_fn",
]

if __name__ == "__main__":
    sys.exit(main())
