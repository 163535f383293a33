"""Details of failures of the host's memory: jobs, offloaded state, arrays, and processes that are started."""

import re

from tightfit.diagnosis.host_array import with_array, with_product
from tightfit.oomlog.facts import Facts, with_detail
from tightfit.oomlog.run_facts import RunFacts
from tightfit.units import GIB

_KILLED_RANKS = re.compile(r"Killing subprocess \d")
"""A line of DeepSpeed's launcher for each of its processes."""
_LOADS_ON = re.compile(r"Loading (?:safetensors )?(?:checkpoint|pipeline) (?:shards|components): +(?!100%)\d{1,2}%")
_TASKS = re.compile(r"--ntasks-per-node[= ](\d{1,4})\b")
_MEM_MB = re.compile(r"\bmem_mb ?= ?(\d{1,9})\b")
_MEM = re.compile(r"--mem[= ](\d{1,6}) ?([KMGTkmgt])")
"""Memory that a job asks for: a resource of Snakemake, an option of SLURM."""


def _with_memory_of_job(facts: Facts, run: RunFacts) -> Facts:
    """Return a killed job with twice the memory that its script asks for."""
    megabytes, memory = _MEM_MB.search(run.text), _most(run.text)
    if megabytes:
        facts = with_detail(facts, "mem_mb", str(2 * int(megabytes[1])))
    if memory is None:
        return facts
    tasks = _TASKS.search(run.text)
    facts = with_detail(facts, "tasks", str(int(tasks[1]) // 2)) if tasks and int(tasks[1]) > 1 else facts
    return with_detail(facts, "mem", f"{2 * int(memory[1])}{memory[2].upper()}")


def _most(text: str) -> re.Match[str] | None:
    """Return the option that asks for the most memory: a report tells which amounts were tried."""
    found = _MEM.finditer(text)
    return max(found, key=lambda match: int(match[1]) * 1024 ** "KMGT".index(match[2].upper()), default=None)


_LAYERS = re.compile(r"torch[\\/]nn[\\/](?:modules[\\/](?!module\.py)|functional\.py)")
"""Files of the layers, whose requests are for what they compute."""
_ONE_ARRAY = 16 * GIB
"""Bytes of a request that is a large part of a data set, or all of it."""
_PADDING_BYTES = 4096
"""Bytes by which DeepSpeed may pad a rank's part."""


def _of_offload(facts: Facts, run: RunFacts) -> Facts:
    """Return what DeepSpeed offloads with the printed count of parameters whose copy it is, or a rank's part of it."""
    counts = [int(each.replace(",", "")) for each in _COUNTED.findall(run.text)]
    requested, ranks = facts.requested_bytes or 0, run.numbers.get("world_size", 1)
    whole = next((each for each in counts if _OF_FLOAT32 * each == requested), None)
    if whole is not None:
        is_moment = any("exp_avg" in (each.source or "") for each in facts.frames)
        return with_detail(facts, "offloaded_moment" if is_moment else "offloaded_count", f"{whole:,}")
    parts = (each for each in counts if 0 <= requested - _OF_FLOAT32 * each / ranks <= _PADDING_BYTES)
    part = next(parts, None) if ranks > 1 else None
    if part is None:
        return facts
    return with_detail(with_detail(facts, "offloaded_of", f"{part:,}"), "offloaded_ranks", str(ranks))


_COUNTED = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3}){2,4}|\d{7,13})(?![\d.,]*\d)")
"""A number of parameters."""
_OF_FLOAT32 = 4


def of_host_allocator(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure on the host with the kind of its request: a layer's result, or a large array at once."""
    if "zero_offload" in facts.details:
        return _of_offload(facts, run)
    if _builds(facts):
        return with_detail(facts, "loading")
    facts = with_product(facts, run.text)
    if facts.frames and _LAYERS.search(facts.frames[-1].file):
        return with_detail(facts, "computing")
    return with_detail(facts, "at_once") if (facts.requested_bytes or 0) >= _ONE_ARRAY else facts


_LOADERS = (
    "from_pretrained",
    "load_state_dict",
    "_load_pretrained_model",
    "load_checkpoint",
    "_load_state_dict_into_model",
)


def _builds(facts: Facts) -> bool:
    """Return True for a model that is being made or loaded: a layer's constructor, or a loader on the way."""
    innermost = facts.frames[-1] if facts.frames else None
    if innermost is None:
        return False
    makes_layer = innermost.function in ("__init__", "reset_parameters") and _LAYERS.search(innermost.file)
    return bool(makes_layer) or any(each.function in _LOADERS for each in facts.frames)


_CHANNELS = (1, 3, 4)


def _with_pictures(facts: Facts) -> Facts:
    """Return a lack of the host's memory with the number of pictures in its array, by its four axes."""
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    if len(sizes) != 4 or not {sizes[1], sizes[3]}.intersection(_CHANNELS) or sizes[0] < 2:
        return facts
    return with_detail(facts, "pictures", str(sizes[0]))


_FORKS = r"\bos\.(?:popen|fork|system|spawn\w+|posix_spawn)\(|\bfork_exec\(|\bPopen\(|\bsubprocess\.\w+\("
"""Lines of code that start another process."""


def _of_fork(facts: Facts) -> Facts:
    """Return a failure of the host's memory at the start of another process: a worker, or a command."""
    innermost = facts.frames[-1] if facts.frames else None
    if "Cannot allocate memory" not in facts.message or innermost is None:
        return facts
    if not re.search(_FORKS, innermost.source or "") and innermost.function not in ("_execute_child", "_fork_exec"):
        return facts
    is_worker = any("multiprocessing" in each.file for each in facts.frames)
    return with_detail(facts, "fork_workers" if is_worker else "fork")


def of_host_memory(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of Python's or NumPy's allocation with its array, or with the process that was started."""
    return _with_pictures(with_array(_of_fork(facts), run.text))


def of_killed(facts: Facts, run: RunFacts) -> Facts:
    """Return a killed process that was loading a model, or a job with the memory that it asks for."""
    if facts.kind == "host_killed" and _LOADS_ON.search(run.text):
        return with_detail(facts, "loading_ranks" if len(_KILLED_RANKS.findall(run.text)) > 1 else "loading")
    return _with_memory_of_job(facts, run)
