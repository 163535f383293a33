"""tightfit: train GPTs that fit the GPU you have."""

import importlib
from typing import TYPE_CHECKING, Any

from tightfit.config import SampleConfig
from tightfit.config import TrainConfig as Config
from tightfit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    DoesNotFit,
    TightfitError,
)
from tightfit.vgpu.context import VirtualGPU
from tightfit.vgpu.worker import dryrun

# The function below shares its name with a room: once the room is loaded, importing from it no longer rebinds the name.
importlib.import_module("tightfit.train")

if TYPE_CHECKING:
    from tightfit.train.loop import RunResult

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DoesNotFit",
    "SampleConfig",
    "TightfitError",
    "VirtualGPU",
    "dryrun",
    "train",
]


def train(config: Config | None = None, **keys: Any) -> "RunResult":
    """Train as `config` says, or as these keys do: `train(dataset="stdlib", max_iters=100)`.

    Returns the steps done and the best validation loss; raises TightfitError for what cannot be done.
    """
    from tightfit.config import Resolved
    from tightfit.train.loop import train as run  # imports torch

    chosen = config if config is not None else Config(**keys)
    return run(Resolved(chosen, dict.fromkeys(vars(chosen), "call"), ()))
