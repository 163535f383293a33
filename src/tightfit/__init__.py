"""tightfit: train GPTs that fit the GPU you have."""

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

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation
    from tightfit.planner.planning import PlanResult
    from tightfit.trainer.loop import RunResult

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
    "explain",
    "plan",
    "train",
]


def train(config: Config | None = None, **keys: Any) -> "RunResult":
    """Train as `config` says, or as these keys do: `train(dataset="stdlib", max_iters=100)`.

    Returns the steps done and the best validation loss; raises TightfitError for what cannot be done.
    """
    from tightfit.config import Resolved
    from tightfit.trainer.loop import train as run  # imports torch

    chosen = config if config is not None else Config(**keys)
    return run(Resolved(chosen, dict.fromkeys(vars(chosen), "call"), ()))


def plan(
    config: Config | None = None,
    *,
    gpu: str | None = None,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    **keys: Any,
) -> "PlanResult":
    """The fastest plan for `config`, or for these keys, that fits a card by name, or this machine's processor.

    `memory_bytes`: the card's total as its driver reports it, or what may be used of the host; `used_bytes`: by other
    programs. `choice.best` is None where nothing fits. Raises TightfitError for a card that is not known.
    """
    from tightfit.config import Resolved
    from tightfit.config.schema import defaults
    from tightfit.planner.planning import make_plan, named_card, this_host

    chosen = config if config is not None else Config(**keys)
    usual = defaults(Config)
    sources = {key: "default" if value == usual[key] else "call" for key, value in vars(chosen).items()}
    where = (
        this_host(memory_bytes)
        if gpu is None
        else named_card(gpu, memory_bytes=memory_bytes, used_by_others_bytes=used_bytes)
    )
    return make_plan(Resolved(chosen, sources, ()), where)


def explain(source: Any, *, config: Config | None = None, lang: str = "en", gpu: str | None = None) -> "Explanation":
    """What failed in a log, which tensor it was, why, and fixes that were checked.

    `source` is the log's text, its path (a Path), or an open file; with `config` the run is played on the card that the
    log tells or `gpu` names. `print(tightfit.explain(text))` shows it. Raises TightfitError for what cannot be used.
    """
    from tightfit.diagnosis.explaining import explain as run

    return run(source, config=config, lang=lang, gpu=gpu)
