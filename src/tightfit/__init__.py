"""tightfit: train GPTs that fit the GPU you have.

`plan`, `dryrun` and `explain` answer without a GPU and return records: their line in an interpreter, their report when
printed, a table in a notebook. Every mistake in a call raises a `TightfitError` with the sentence that the command line
prints.
"""

import sys
from typing import TYPE_CHECKING

from tightfit import display
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
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike
    from typing import IO, Literal

    from tightfit.config.schema import Setting
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


def __dir__() -> list[str]:
    return __all__


def train(config: "Config | str | PathLike[str] | None" = None, **keys: "Setting") -> "RunResult":
    """Train as a config file, a `Config` or these keys describe: `train(dataset="stdlib", max_iters=100)`.

    Keys win over `config`. Returns the steps done and the best validation loss; raises TightfitError for a wrong
    value, and for what cannot be done.

    >>> train(max_iter=100)
    Traceback (most recent call last):
    tightfit.errors.ConfigError: max_iter is not a key; did you mean max_iters?
    """
    from tightfit.config import Resolved
    from tightfit.config.calls import read_call

    resolved = read_call(Config, config, keys, warn=_warn)
    from tightfit.trainer.loop import train as run  # imports torch

    return run(Resolved(resolved.config, dict.fromkeys(resolved.sources, "call"), ()))


def plan(
    config: "Config | str | PathLike[str] | None" = None,
    *,
    gpu: str | None = None,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    capability: tuple[int, int] | None = None,
    **keys: "Setting",
) -> "PlanResult":
    """Return the fastest plan that fits, for a card by name, or else the one that is here or the processor.

    `config`: a config file or a `Config`; keys win over it. `memory_bytes`: the card's total as its driver reports it,
    or what may be used of the host; `used_bytes`: by other programs; `capability`: of a card that the table lacks.
    `result.choice.best` is None where nothing fits. The first call traces for seconds, the same call is then recalled.
    Raises TightfitError for an unknown card, and for a file, key or value that cannot be used.

    >>> found = plan(gpu="RTX 3060 12GB", n_layer=2, n_head=2, n_embd=64, compile=False)  # doctest: +SKIP
    >>> found  # doctest: +SKIP
    <PlanResult: 14 sequences at once, 35 passes a step, all logits kept, not compiled; at most ... in the phase ...>
    >>> found.choice.best.plan.keys()  # doctest: +SKIP
    {'micro_batch': 14, ...}
    >>> plan(batchsize=3)
    Traceback (most recent call last):
    tightfit.errors.ConfigError: batchsize is not a key; did you mean batch_size?
    """
    from tightfit.config.calls import read_call
    from tightfit.planner.planning import make_plan, where_to_plan

    resolved = read_call(Config, config, keys, warn=_warn, keywords=("gpu", "memory_bytes", "used_bytes", "capability"))
    where = where_to_plan(resolved.config, gpu, memory_bytes=memory_bytes, used_bytes=used_bytes, capability=capability)
    return make_plan(resolved, where, log=_progress)


def dryrun(
    what: "str | PathLike[str] | Callable[..., object]",
    *arguments: object,
    gpu: str,
    memory_bytes: int | None = None,
    used_bytes: int = 0,
    context_bytes: int | None = None,
    capability: tuple[int, int] | None = None,
    steps: int | None = None,
    until_stable: bool = True,
    until: 'Literal["end", "eval", "steps"] | None' = None,
    assume: "Mapping[str, float] | None" = None,
    timeout_s: float | None = None,
    rank: int = 0,
    network: bool = False,
    snapshot: "str | PathLike[str] | None" = None,
    timeline: bool = False,
    torch: str | None = None,
) -> Findings:
    """Play a training script, a command or a function on a virtual GPU: its memory, or the line where it fails.

    It runs in a process of its own, so that this one's torch stays as it is; `arguments` are those of the script's
    command line, or of the function: `dryrun("torchrun", "--nproc_per_node=8", "train.py", gpu="A100")` plays the
    process `rank` of eight; so does `gpu="8x A100"` with "train.py" alone. On Linux it writes to a private view of the
    files, and has no network unless `network`.
    `memory_bytes`: the card's total as its driver reports it; `used_bytes`: held by other programs;
    `context_bytes`: outside PyTorch's allocator; `capability`: of a card that the table lacks; `steps`,
    `until_stable` (when steps repeat), `until`, `timeout_s`: where to stop; `assume`: values or lengths that only the
    card's data decide, by an expression of the script or FILE:LINE, as {"mask.nonzero()": 512}; `snapshot`: file for
    PyTorch's memory snapshot; `timeline`: add memory over time; `torch`: the version on the card, such as "2.8".
    Raises TightfitError for an unknown card, a missing script or a wrong value.

    >>> def step(batch):
    ...     import torch
    ...     torch.nn.Linear(1024, 1024, device="cuda")(torch.zeros(batch, 1024, device="cuda")).sum().backward()
    >>> found = dryrun(step, 64, gpu="T4")  # doctest: +SKIP
    >>> found  # doctest: +SKIP
    <Findings: FITS on Tesla T4, 14.56 GiB: at most ... in use, ... left; peak in the phase backward>
    >>> found.outcome, found.categories["parameters"], found.categories["gradients"]  # doctest: +SKIP
    ('fits', 4198400, 4194304)
    >>> dryrun("missing.py", gpu="T4")
    Traceback (most recent call last):
    tightfit.errors.ConfigError: missing.py is not a file; give the path of the training script
    """
    import os

    from tightfit.simulation.dry_run import dryrun_function, dryrun_script
    from tightfit.vgpu.records import Settings, read_assumption

    settings = Settings(
        gpu=gpu,
        memory_bytes=memory_bytes,
        used_bytes=used_bytes,
        context_bytes=context_bytes,
        capability=capability,
        steps=steps,
        until_stable=until_stable,
        until=until,
        assumed=tuple(read_assumption(f"{expression}={value}") for expression, value in (assume or {}).items()),
        timeout_s=timeout_s,
        rank=rank,
        network=network,
        snapshot=os.fspath(snapshot) if isinstance(snapshot, os.PathLike) else snapshot,
        timeline=timeline,
        torch=torch,
    )
    if callable(what):
        return dryrun_function(what, arguments, settings)
    return dryrun_script(what, [str(each) for each in arguments], settings)


def explain(
    source: "str | bytes | PathLike[str] | IO[bytes] | IO[str] | None",
    *,
    config: "Config | str | PathLike[str] | None" = None,
    gpu: str | None = None,
    script: "str | PathLike[str] | None" = None,
    arguments: "Sequence[object]" = (),
    lang: str | None = None,
    **keys: "Setting",
) -> "Explanation":
    """Explain a failure from its log: the tensor, the cause, and fixes that were checked.

    `source`: the log's text, its path, an open file, or the path of a memory snapshot (.pickle). With `config` (a
    config file or a `Config`) or keys the run is played, and so is every fix; with `script` and its `arguments` that
    script is. The card is the log's, or `gpu`. `lang`: en or ja. Raises TightfitError for a file, card, key or value
    that cannot be used.

    >>> message = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity "
    >>> found = explain(message + "of 11.69 GiB of which 2.68 GiB is free.")
    >>> found  # doctest: +ELLIPSIS
    <Explanation: 6.14 GiB were asked for and 2.68 GiB of 11.69 GiB were free: 3.46 GiB short. ...>
    >>> explain("missing.log")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    tightfit.errors.ConfigError: missing.log cannot be read: No such file or directory; ...
    """
    import os

    from tightfit.config.calls import read_call
    from tightfit.diagnosis.explaining import explain as run

    names = [os.fspath(config)] if isinstance(config, str | os.PathLike) else []
    names += [f"--{key}={value}" for key, value in keys.items()]
    chosen = config is not None or keys
    return run(
        source,
        config=read_call(Config, config, keys, warn=_warn).config if chosen else None,
        lang=lang,
        gpu=gpu,
        script=None if script is None else str(script),
        arguments=[str(each) for each in arguments],
        config_names=names,
    )


def _warn(text: str) -> None:
    import warnings

    warnings.warn(text, stacklevel=5)  # the caller of the public function


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _views() -> display.Views:
    from tightfit.report import notebook

    return notebook


display.Displayed.views = _views
