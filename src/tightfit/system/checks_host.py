"""Doctor's checks around the cards: host memory, limits, shared memory, compilers, allocator settings."""

import difflib
import re
from collections.abc import Iterator

from tightfit.allocator.settings import IGNORED_KEYS, VARIABLES, AllocatorSettings
from tightfit.config import TrainConfig
from tightfit.errors import ConfigError
from tightfit.system.checks import Check, Fact
from tightfit.system.machine import Machine
from tightfit.units import GIB

LOW_HOST_BYTES = 2 * GIB
"""Below this a run is in danger: torch 2.13 for processors takes 0.22 GiB once loaded, CUDA builds several times that,
and a new model and its checkpoints pass through host memory too."""
SMALL_SHM_BYTES = GIB
"""Docker gives 64 MiB by default; the shared buffers of NCCL and data loaders are larger."""
ALLOCATOR_KEYS = IGNORED_KEYS | {
    "backend", "expandable_segments", "garbage_collection_threshold", "large_segment_size_mb",
    "max_non_split_rounding_mb", "max_split_size_mb", "per_process_memory_fraction", "roundup_power2_divisions",
    "throw_on_cudamalloc_oom",
}  # fmt: skip
"""Every key of PyTorch's allocator settings; a test holds it against our reader of them."""
_NATIVE_ONLY = ALLOCATOR_KEYS - {"backend", "per_process_memory_fraction"}


def host_checks(machine: Machine, config: TrainConfig | None) -> Iterator[Check]:
    """Every check of the machine around its cards."""
    yield _host_memory(machine)
    yield from _limits(machine)
    yield _shared_memory(machine)
    yield from _compile(machine, config)
    yield from _allocator(machine)


def _host_memory(machine: Machine) -> Check:
    host = machine.host
    facts = {"total_bytes": host.total_bytes, "available_bytes": host.available_bytes}
    low = host.available_bytes < LOW_HOST_BYTES
    return Check(name="host", outcome="low" if low else "free", status="warning" if low else "ok", facts=facts)


def _limits(machine: Machine) -> Iterator[Check]:
    if machine.platform != "linux":
        yield Check(name="limits", outcome="silent", status="unknown")
        return
    tightest = machine.host.tightest
    if tightest is None:
        yield Check(name="limits", outcome="none", status="ok")
        return
    facts: dict[str, Fact] = {
        "source": tightest.source,
        "limit_bytes": tightest.limit_bytes,
        "left_bytes": tightest.left_bytes,
    }
    low = tightest.left_bytes < LOW_HOST_BYTES
    yield Check(name="limits", outcome="low" if low else "limit", status="warning" if low else "ok", facts=facts)
    space = [limit for limit in machine.host.limits if limit.source == "RLIMIT_AS"]
    if space and machine.cards.cards:  # CUDA reserves addresses for all memory of host and cards
        yield Check(
            name="limits", outcome="address_space", status="problem", facts={"limit_bytes": space[0].limit_bytes}
        )


def _shared_memory(machine: Machine) -> Check:
    shm, several = machine.shm, len(machine.cards.cards) > 1
    if shm is None:
        return Check(name="shm", outcome="none", status="problem" if several else "ok")
    facts = {"free_bytes": shm.free_bytes, "total_bytes": shm.total_bytes}
    if shm.free_bytes >= SMALL_SHM_BYTES:
        return Check(name="shm", outcome="enough", status="ok", facts=facts)
    return Check(name="shm", outcome="small", status="warning" if several else "ok", facts=facts)


def _compile(machine: Machine, config: TrainConfig | None) -> Iterator[Check]:
    """Tools of torch.compile: on cards triton, a C compiler and Python.h; on processors a C++ compiler."""
    found = machine.compilers
    if config is not None and config.compile is False:
        yield Check(name="compile", outcome="off", status="ok")
        return
    on_card = bool(machine.cards.cards or (machine.torch and machine.torch.devices))
    if config is not None and config.device in ("cpu", "mps"):
        on_card = False
    asked = config is not None and config.compile is True
    if not on_card:
        if found.cxx:
            yield Check(name="compile", outcome="cpu", status="ok", facts={"compiler": found.cxx})
        else:
            yield Check(name="compile", outcome="no_cxx", status="problem" if asked else "ok")
        return
    lacking = {
        "no_triton": found.triton is None,
        "no_compiler": found.c is None,
        "no_headers": not found.python_headers,
    }
    for outcome in (each for each, lacks in lacking.items() if lacks):
        # without triton compile=auto stays off by itself; without the rest it starts, and fails in the first step
        yield Check(
            name="compile", outcome=outcome, status="warning" if outcome == "no_triton" and not asked else "problem"
        )
        return
    yield Check(name="compile", outcome="ready", status="ok", facts={"triton": found.triton, "compiler": found.c})


def _allocator(machine: Machine) -> Iterator[Check]:
    """The allocator's variables as PyTorch reads them: only the first of VARIABLES that is set counts."""
    environ = machine.environ
    given = {variable: environ[variable] for variable in VARIABLES if variable in environ}
    yield from _misspelt_variables(machine)
    if not given:
        yield Check(name="allocator", outcome="unset", status="ok")
        return
    (variable, text), *rest = given.items()
    for other, value in rest:
        facts = {"variable": variable, "value": text, "other": other, "other_value": value}
        if value != text:
            yield Check(name="allocator", outcome="contradiction", status="warning", facts=facts)
    yield from _settings(machine, variable, text)


def _misspelt_variables(machine: Machine) -> Iterator[Check]:
    for name in sorted(machine.environ):
        near = difflib.get_close_matches(name.upper(), VARIABLES, n=1, cutoff=0.85)
        if near and name not in VARIABLES:
            facts = {"variable": name, "near": near[0]}
            yield Check(name="allocator", outcome="misspelt_variable", status="warning", facts=facts)


def _settings(machine: Machine, variable: str, text: str) -> Iterator[Check]:
    keys = re.findall(r"([^,:\[\]\s]+)\s*:", re.sub(r"\[[^\]]*\]", "", text))
    facts = {"variable": variable, "value": text}
    wrong = [key for key in keys if key not in ALLOCATOR_KEYS]
    on_card = machine.cards.cards or (machine.torch and machine.torch.devices)
    for key in wrong:
        near = difflib.get_close_matches(key, ALLOCATOR_KEYS, n=1)
        outcome = "misspelt_key" if near else "unknown_key"
        said = {**facts, "key": key, "near": (near or [""])[0]}
        yield Check(name="allocator", outcome=outcome, status="problem" if on_card else "warning", facts=said)
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        yield Check(name="allocator", outcome="twice", status="warning", facts={**facts, "keys": twice})
    if wrong:
        return
    if re.search(r"backend\s*:\s*cudaMallocAsync", text):
        without_effect = [key for key in keys if key in _NATIVE_ONLY]
        outcome = "async_with_native" if without_effect else "async"
        yield Check(name="allocator", outcome=outcome, status="warning", facts={**facts, "keys": without_effect})
        return
    try:
        settings = AllocatorSettings.parse(text, variable=variable)
    except ConfigError as error:
        yield Check(name="allocator", outcome="refused", status="problem", facts={**facts, "error": str(error)})
        return
    if settings.expandable_segments and machine.platform == "win32":
        yield Check(name="allocator", outcome="not_expandable", status="warning", facts=facts)
    elif settings.garbage_collection_threshold and "per_process_memory_fraction" not in keys:
        yield Check(name="allocator", outcome="threshold_alone", status="warning", facts=facts)
    elif not twice:
        yield Check(name="allocator", outcome="set", status="ok", facts=facts)
