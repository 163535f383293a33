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
from tightfit.vgpu.records import Findings

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

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
    "Findings",
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


def dryrun(
    what: "str | PathLike[str] | Callable[[], object]",
    *arguments: str,
    gpu: str,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    context_bytes: int | None = None,
    capability: tuple[int, int] | None = None,
    steps: int | None = None,
    until_stable: bool = True,
    timeout_s: float | None = None,
    snapshot: str | None = None,
    timeline: bool = False,
) -> Findings:
    """Play a training script, or an importable function, on a virtual GPU: its memory, or the line where it fails.

    It runs in a process of its own, so that this one's torch stays as it is. `memory_bytes`: the card's total as its
    driver reports it; `used_bytes`: held by other programs; `context_bytes`: outside PyTorch's allocator; `steps`,
    `until_stable` (when steps repeat), `timeout_s`: where to stop; `snapshot`: file for PyTorch's memory snapshot;
    `timeline`: add memory over time. Raises TightfitError for an unknown card or script.
    """
    from tightfit.simulation.dry_run import dryrun_function, dryrun_script
    from tightfit.vgpu.records import Settings

    settings = Settings(
        gpu=gpu,
        memory_bytes=memory_bytes,
        used_bytes=used_bytes,
        context_bytes=context_bytes,
        capability=capability,
        steps=steps,
        until_stable=until_stable,
        timeout_s=timeout_s,
        snapshot=snapshot,
        timeline=timeline,
    )
    if callable(what):
        return dryrun_function(what, settings)
    return dryrun_script(str(what), arguments, settings)


def explain(source: Any, *, config: Config | None = None, lang: str = "en", gpu: str | None = None) -> "Explanation":
    """Explain a failure from its log: the tensor, the cause, and fixes that were checked.

    `source` is the log's text, its path (a Path), or an open file; with `config` the run is played on the card that the
    log tells or `gpu` names. `print(tightfit.explain(text))` shows it. Raises TightfitError for what cannot be used.
    """
    from tightfit.diagnosis.explaining import explain as run

    return run(source, config=config, lang=lang, gpu=gpu)
