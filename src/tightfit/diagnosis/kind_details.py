"""Details of a failure that the rest of its log shows: the library, the container, the program's own numbers."""

import functools
import re
from collections.abc import Callable, Mapping

import msgspec

from tightfit.diagnosis.compiled_details import of_arena, of_host_tensor, of_jax, of_pool
from tightfit.diagnosis.host_details import of_host_allocator, of_host_memory, of_killed
from tightfit.diagnosis.printed_tables import holders, named_holder, ray_nodes
from tightfit.diagnosis.purpose import TRAINING, purpose_of_frames
from tightfit.diagnosis.report_words import shows
from tightfit.diagnosis.server_details import of_cache, of_prefill, of_sglang, of_share, of_warm_up, share_asked
from tightfit.diagnosis.told_phase import phase_told
from tightfit.diagnosis.told_shape import shape_of_pairs
from tightfit.oomlog.facts import Facts, Figure, with_detail
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.last_words import sentence_at
from tightfit.oomlog.run_facts import RunFacts
from tightfit.tables import read_table
from tightfit.units import GIB, format_bytes


class _Detail(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of kind_details.toml."""

    kinds: list[str]
    name: str = ""
    becomes: str = ""
    shown: str = ""
    unless: str = ""
    with_detail: str = ""

    def is_shown(self, facts: Facts, text: str) -> bool:
        if facts.kind not in self.kinds or (self.with_detail and self.with_detail not in facts.details):
            return False
        if self.shown and not re.search(self.shown, text, re.ASCII):
            return False
        return not (self.unless and re.search(self.unless, text, re.ASCII))


@functools.cache
def _details() -> list[_Detail]:
    return read_table("tightfit.diagnosis", "kind_details.toml", dict[str, list[_Detail]])["detail"]


def detail_names() -> set[str]:
    """Return the names of details that a log's text may show."""
    return {each.name for each in _details() if each.name} | _OF_THE_RUN


_OF_THE_RUN = {
    "growing_said",
    "offloaded_count",
    "offloaded_moment",
    "offloaded_of",
    "offloaded_ranks",
    "product",
    "product_shape",
    "small_pool",
    "small_array",
    "little",
    "examples",
    "eval",
    "one",
    "tasks",
    "told_phase",
    "weights_of",
    "weights_size",
    "in_share",
    "copied",
    "copied_little",
    "to_host",
    "pin_thread",
    "xla_between",
    "longest_input",
    "prefill_half",
    "printed_weights",
    "printed_activations",
    "wide",
    "weights",
    "loading",
    "resuming",
    "kernel",
    "single",
    "map_location",
    "computing",
    "at_once",
    "large_request",
    "printed_context",
    "padded",
    "pieces",
    "fork",
    "pairs_shape",
    "flat_input",
    "share_asked",
    "fork_workers",
    "ray_alone",
    "ray_count",
    "ray_fits",
    "ray_nodes",
    "ray_crashed",
    "ray_actor",
    "peak_shape",
    "peak_scores",
    "cupy_limit",
    "half",
    "sglang_bound",
    "pairs_of",
    "far_less_free",
    "overflowed",
    "unsigned",
    "llama_sized",
    "far_more_free",
    "node",
    "xla_shape",
    "xla_operator",
    "whole_data",
    "llama_kv_bytes",
    "pictures",
}
"""Details that the phase, the batch or the traceback shows."""


def _with_shown(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure with the details, or the other kind, that words of its log show."""
    for each in _details():
        if not each.is_shown(facts, run.text):
            continue
        if each.becomes:
            told = {"reported": facts.message} if each.becomes == "program_words" else {}
            facts = msgspec.structs.replace(facts, kind=each.becomes, details={**told, **facts.details})
        if each.name:
            facts = with_detail(facts, each.name)
        if each.name == "growing" and (grows := re.search(each.shown, run.text, re.ASCII)):
            facts = with_detail(facts, "growing_said", sentence_at(run.text, grows.start()))
    return facts


_OF_JOB = r"\bcgroup|\bOCI runtime\b|\b(?:job|container|pod)\b[^\n]{0,60}\b(?:limit|exceed\w*|OOM)\b"
_ON_HOST = (
    r"Cannot allocate memory|virtual memory|\bHDF5\b|\bH5\w+\.c\b|\bpsycopg|\bsqlite3|\bredis\.|\bDB::Exception"
    r"|\bLLVM ERROR|\bmalloc failed|\bRangeError\b|(?<!OutOf)\bMemoryError\b|\bRAM\b|\bhost memory\b|\bsystem memory\b"
    r"|instance type|\bOpenBLAS\b|\bvector memory limit\b|ERROR: (?:LoadError: )?OutOfMemoryError\(\)|\bhelp memory\b"
)
"""Words of programs that lack the host's memory, in a message that no format knows."""


def _of_place(facts: Facts) -> Facts:
    """Return a failure in words that no format knows with the memory that they are about, where they tell."""
    said = facts.details.get("said", "") if facts.kind == "memory_words" else ""
    is_of_device = re.search(r"\b(?:GPU|CUDA|VRAM|[Dd]evice)\b", said)
    if not said or is_of_device:
        return facts
    kinds = (("job_memory_limit", _OF_JOB), ("host_memory_error", _ON_HOST))
    kind = next((kind for kind, words in kinds if re.search(words, said)), facts.kind)
    return msgspec.structs.replace(facts, kind=kind)


def with_run(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure with those facts of its run that the log prints and its sentences need."""
    facts = _with_shown(_of_place(facts), run)
    if (context := _CONTEXT.findall(run.text)) and {"llama_kv", "llama_host_kv"} & facts.details.keys():
        facts = with_detail(facts, "printed_context", f"{int(context[-1]):,}")
    if facts.kind in _ON_SHARED_MEMORY and _shares_host(facts, run.text):
        facts = with_detail(facts, "shares_host")
    if facts.kind in _TOLD_BY_PEOPLE:
        facts = _with_phase(_in_prose(facts, run), run)
    if facts.kind in _GROWS and "accumulates" in run.signs and not facts.frames and facts.phase is None:
        facts = with_detail(facts, "growing")
    if facts.kind in _IN_WORDS and (share := share_asked(run)):
        facts = with_detail(facts, "share_asked", share)
    add = _OF_KINDS.get(facts.kind)
    return add(facts, run) if add is not None else facts


def _of_words(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure in a program's or a person's words with a shape that it names, or its phase."""
    if shape := shape_of_pairs(run.text):
        return with_detail(facts, "pairs_shape", shape)
    if facts.phase in ("load", "resume", "setup"):
        is_told = facts.phase == "resume" and "told_phase" in facts.details
        return with_detail(facts, "resuming" if is_told else "loading")
    return facts


def _of_cupy(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of CuPy with the limit of its pool as people print it."""
    limit = facts.details.get("cupy_limit", "").replace(",", "")
    return with_detail(facts, "cupy_limit", format_bytes(int(limit))) if limit else facts


_HARDLY = 100
"""Times a request that were free, from which on its size cannot be why it failed."""


def _of_library(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of another library with the remark that far more was free than it asked for."""
    asked, free = facts.requested_bytes, facts.free_bytes
    return with_detail(facts, "far_more_free") if asked and free and free > _HARDLY * asked else facts


def _of_square(facts: Facts, run: RunFacts) -> Facts:
    """Return an impossible size with the count of which an array of all pairs was made."""
    sizes = re.findall(r"\d+", facts.details.get("shape", ""))
    if facts.requested_bytes is None and sizes:
        facts = with_detail(facts, "overflowed")
    if str(2**32 - 1) in sizes:
        facts = with_detail(facts, "unsigned", str(2**32 - 1))
    is_square = len(sizes) == 2 and sizes[0] == sizes[1]
    count = sizes[0] if is_square else _count_of_pairs(facts, run.text)
    return with_detail(facts, "pairs_of", f"{int(count):,}") if count else facts


def _count_of_pairs(facts: Facts, text: str) -> str | None:
    """Return the number in a log of which an array of all pairs has the size that was asked for."""
    asked = facts.figures.get("requested_bytes")
    numbers = dict.fromkeys(re.findall(r"(?<![\d.,])\d{5,10}(?![\d.,]*\d)", text))
    squares = ((each, int(each) ** 2 * size) for each in numbers for size in (4, 8, 2))
    return next((each for each, square in squares if asked and asked.low <= square <= asked.high), None)


def _of_ray(facts: Facts, run: RunFacts) -> Facts:
    """Return a task that Ray ended with what its table says of the processes that hold the most."""
    printed = (facts.details.get(name, "") for name in ("used", "of", "threshold"))
    nodes = {} if "used" in facts.details else ray_nodes(run.text)
    named = named_holder(run.text, facts.details.get("used", ""))
    return msgspec.structs.replace(facts, details={**facts.details, **holders(run.text, *printed), **named, **nodes})


_IN_WORDS = ("program_words", "memory_words")
_GROWS = (*_IN_WORDS, "cuda_driver")
"""Kinds of failures with a sentence on memory that grows."""
_CONTEXT = re.compile(r"\bn_ctx(?:_per_seq)? *= *(\d{3,8})\b")
"""The context that llama.cpp prints."""
_ON_SHARED_MEMORY = ("cuda_out_of_memory", "hip_out_of_memory")
_SHARED_MEMORY = re.compile(
    r"\b(?:(?P<hip>Strix ?(?:Halo|Point)|Ryzen AI Max|Radeon 80[56]0S|gfx115[0-3]|gfx1103)"
    r"|(?P<cuda>Jetson|AGX Orin|Orin (?:NX|Nano)|DGX Spark|GB10))\b"
)
"""Names of machines on which GPU and host share one memory, by the vendor."""
_NAMED_MEMORY = r"(?<![\w.])(\d{2,3}) ?(?:GB|GiB|G)\b(?! ?(?:of )?(?:VRAM|vram|HBM|GPU|card))"


def _shares_host(facts: Facts, text: str) -> bool:
    """Return True if a report names such a machine, or one with all of the memory that an AMD GPU has.

    A card of its own has a little less than the whole number of GiB that it is sold with.
    """
    total, vendor = facts.figures.get("total_bytes"), facts.kind.partition("_")[0]
    is_named = any(each.lastgroup == vendor for each in _SHARED_MEMORY.finditer(text))
    if total is None or is_named:
        return is_named and total is not None
    whole = round(total.bytes / GIB)
    is_whole = facts.kind == "hip_out_of_memory" and total.low <= whole * GIB <= total.high
    return is_whole and str(whole) in re.findall(_NAMED_MEMORY, text)


def _with_phase(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure with the phase that the report tells, where neither a traceback nor a line shows one."""
    if memory_of(facts.kind) == "host" or facts.phase not in _OPEN_PHASES:
        return facts
    if facts.phase is None and _TEST_PICTURES.search(run.text):
        return msgspec.structs.replace(facts, phase="eval")
    if facts.phase is None and not facts.frames and _LOADS_ON.search(run.text):
        return msgspec.structs.replace(facts, phase="load")
    told = phase_told(run.text)
    if facts.frames or facts.phase is not None:  # a pass of an evaluation may look like any other
        shown = purpose_of_frames(facts.frames)
        told = told if told in _BESIDE_TRAINING and (shown is None or shown.purpose != TRAINING) else None
    return facts if told is None else with_detail(msgspec.structs.replace(facts, phase=told), "told_phase")


_BESIDE_TRAINING = ("eval", "save", "resume")
"""Phases whose traceback need not show them: they call what a training calls, or a library's own functions."""
_OPEN_PHASES = (None, "forward")
"""Phases that leave open what a pass was for."""
_TEST_PICTURES = re.compile(
    r"Loading pipeline components\.{3}: +100%(?s:(?!.*\bSteps: ).*)\btrain_\w{1,60}\.py\", line"
)
"""A pipeline that a training script of diffusers loads to make pictures, with no step of the training after it."""
_LOADS_ON = re.compile(r"Loading (?:safetensors )?(?:checkpoint|pipeline) (?:shards|components): +(?!100%)\d{1,2}%")


_TOLD_BY_PEOPLE = (
    "cuda_out_of_memory",
    "hip_out_of_memory",
    "cuda_driver",
    "program_words",
    "memory_words",
    "host_allocator",
)
_TOLD_SIZE = re.compile(
    r"\b(?:tried|tries|trying|try|attempt\w*|wants?|wanted|asks?|asked) to (?:re)?alloc\w* "
    r"(?:about |around |over |more than |> ?|~ ?)?"
    r"(\d{1,9}(?:\.\d{1,3})?) ?(KiB|MiB|GiB|TiB|PiB|EiB|KB|MB|GB|TB|PB|EB)\b",
    re.IGNORECASE,
)
_MOST_REAL = 2**44
"""Bytes beyond any card and nearly any host: a mistake in a size."""


def _in_prose(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure without its figures, with the size of the request that the report tells in a sentence."""
    told = _TOLD_SIZE.search(run.text) if facts.requested_bytes is None else None
    figure = Figure.printed(f"{told[1]}{told[2]}") if told else None
    if figure is None:
        return facts
    kind = "impossible_size" if figure.low > _MOST_REAL else facts.kind
    return msgspec.structs.replace(facts, kind=kind, figures={**facts.figures, "requested_bytes": figure})


def _of_driver(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of the CUDA runtime in a validation, or with a batch that cannot be smaller."""
    if "llama_cpp" in facts.details and facts.requested_bytes:
        facts = with_detail(facts, "llama_sized")
    if "llama_kv" in facts.details and facts.requested_bytes:
        facts = with_detail(facts, "llama_kv_bytes")
    if any(each.file.replace("\\", "/").endswith("_utils/pin_memory.py") for each in facts.frames):
        return with_detail(facts, "pin_thread")
    if any(_TO_HOST.search(each.source or "") for each in facts.frames):
        return with_detail(facts, "to_host")
    if facts.phase == "eval" or shows(run.text, "subject.lacks_no_grad"):
        return with_detail(facts, "eval")
    if any(_ONTO_CARD.search(each.source or "") for each in facts.frames):
        return with_detail(facts, "map_location")
    if facts.phase in ("load", "setup"):
        return with_detail(facts, "loading")
    return with_detail(facts, "one") if run.numbers.get("batch_size") == 1 else facts


_TO_HOST = re.compile(r"\.(?:to|copy_)\(.*[\"\']cpu[\"\'].*non_blocking ?= ?True|\.pin_memory\(")
"""A line that copies to the host without waiting, for which PyTorch pins memory of the host."""
_ONTO_CARD = re.compile(r"\bload\w*\(.*\bmap_location ?= ?(?!.{0,20}[\"']cpu)")
"""A line that loads a file straight onto the card."""


_OF_KINDS: Mapping[str, Callable[[Facts, RunFacts], Facts]] = {
    "cuda_driver": _of_driver,
    "cupy_out_of_memory": _of_cupy,
    "device_library": _of_library,
    "host_allocator": of_host_allocator,
    "host_killed": of_killed,
    "host_memory_error": of_host_memory,
    "host_numpy": of_host_memory,
    "jax_out_of_memory": of_jax,
    "job_memory_limit": of_killed,
    "onnx_out_of_memory": of_arena,
    "program_words": _of_words,
    "impossible_size": _of_square,
    "ray_killed": _of_ray,
    "sglang_cache": of_sglang,
    "tensorflow_host_memory": of_host_tensor,
    "tensorflow_out_of_memory": of_pool,
    "tgi_prefill": of_prefill,
    "vllm_no_cache_blocks": of_cache,
    "vllm_share_of_card": of_share,
    "vllm_warm_up": of_warm_up,
}
"""What a kind of failures adds from the rest of its log."""
