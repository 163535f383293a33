"""A run's configuration: the keys, and how files and arguments are read."""

from tightfit.config.micro_batch import BatchSplit, batch_split, refuse_processes
from tightfit.config.reader import Resolved, describe, read_config
from tightfit.config.schema import (
    CUDA_GRAPH_MODES,
    LOSSY_KEYS,
    PRETRAINED,
    SampleConfig,
    TrainConfig,
    defaults,
    from_dict,
    to_dict,
)

__all__ = [
    "CUDA_GRAPH_MODES",
    "LOSSY_KEYS",
    "PRETRAINED",
    "BatchSplit",
    "Resolved",
    "SampleConfig",
    "TrainConfig",
    "batch_split",
    "defaults",
    "describe",
    "from_dict",
    "read_config",
    "refuse_processes",
    "to_dict",
]
