"""Training: what configurations reach as `main.X`, and the command line behind `main.py`."""

from pytorch_lightning.callbacks import LearningRateMonitor

from taming.data.datamodule import DataModuleFromConfig, WrappedDataset, worker_init_fn
from taming.training.callbacks import CUDACallback, ImageLogger, LossCurve, RandomState, SetupCallback
from taming.util import get_obj_from_str, instantiate_from_config

__all__ = [
    "CUDACallback", "DataModuleFromConfig", "ImageLogger", "LearningRateMonitor", "LossCurve", "RandomState", "SetupCallback",
    "WrappedDataset", "get_obj_from_str", "instantiate_from_config", "worker_init_fn",
]  # fmt: skip
