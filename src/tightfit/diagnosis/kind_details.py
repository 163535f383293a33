"""Details of a failure that the rest of its log shows: the library, the container, the program's own numbers."""

import functools
import re

import msgspec

from tightfit.diagnosis.host_array import with_array, with_product
from tightfit.diagnosis.printed_tables import holders, largest_allocation
from tightfit.diagnosis.purpose import INFERENCE, TRAINING, purpose_of, purpose_of_frames
from tightfit.diagnosis.report_words import shows
from tightfit.diagnosis.told_phase import phase_told
from tightfit.diagnosis.told_shape import shape_of_pairs
from tightfit.diagnosis.usual_models import model_of, printed_name
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.last_words import sentence_at
from tightfit.oomlog.run_facts import RunFacts
from tightfit.tables import read_table
from tightfit.units import GIB, KIB, MIB

_HIGH_SHARE = re.compile(r"gpu[-_]memory[-_]utilization\W{1,3}(?:0?\.9[1-9]\d?|1\.0|1\b)")
"""A share of the card above vLLM's own 0.9."""
_PROGRAM = re.compile(r"\btotal allocation: *([\d.]{1,9}) ?([KMG])iB")
"""Memory of a compiled program in XLA's report on its buffers."""
_ONLY_COPIES = re.compile(r"preallocated temp allocation: +0B")
"""XLA's line for a program without a result in between: it copies, converts or joins arrays."""
_UNITS = {"K": KIB, "M": MIB, "G": GIB}
_SMALL_PROGRAM = GIB
"""Bytes that any card has free for a program, unless something else fills it."""


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
            facts = _with(facts, each.name)
        if each.name == "growing" and (grows := re.search(each.shown, run.text, re.ASCII)):
            facts = _with(facts, "growing_said", sentence_at(run.text, grows.start()))
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
        facts = _with(facts, "printed_context", f"{int(context[-1]):,}")
    if facts.kind in _ON_SHARED_MEMORY and _shares_host(facts, run.text):
        facts = _with(facts, "shares_host")
    if facts.kind == "vllm_warm_up":
        return _with(facts, "fewer", str(max(int(facts.details.get("count", _USUAL_REQUESTS)) // 4, 1)))
    if facts.kind == "vllm_no_cache_blocks":
        return _of_vllm(facts, run)
    if facts.kind in _TOLD_BY_PEOPLE:
        facts = _with_phase(_in_prose(facts, run), run)
    if facts.kind in _GROWS and "accumulates" in run.signs and not facts.frames and facts.phase is None:
        facts = _with(facts, "growing")
    if facts.kind == "tgi_prefill" and 0 < int(facts.details.get("count", "0")) <= _FEW_TOKENS:
        return _with(facts, "few")
    if facts.kind in ("program_words", "memory_words") and (share := _share_asked(run)):
        facts = _with(facts, "share_asked", share)
    if facts.kind == "ray_killed":
        printed = (facts.details.get(name, "") for name in ("used", "of", "threshold"))
        return msgspec.structs.replace(facts, details={**facts.details, **holders(run.text, *printed)})
    if facts.kind == "jax_out_of_memory":
        facts = msgspec.structs.replace(facts, details={**facts.details, **largest_allocation(run.text)})
        return _of_jax(facts, run)
    if (
        facts.kind == "onnx_out_of_memory"
        and (facts.requested_bytes or 0) >= GIB
        and not facts.details.keys() & _OF_ARENA
    ):
        return _with(facts, "one_tensor")
    if facts.kind == "tensorflow_host_memory" and _first_axis(facts) >= _OF_DATA_SET:
        return _with(facts, "whole_data")
    if facts.kind == "tensorflow_out_of_memory":
        return _of_pool(facts, run)
    if facts.kind == "cuda_driver":
        if "llama_kv" in facts.details and facts.requested_bytes:
            facts = _with(facts, "llama_kv_bytes")
        return _of_driver(facts, run)
    if facts.kind == "host_allocator":
        return _of_host_allocator(facts, run)
    if facts.kind in ("host_memory_error", "host_numpy"):
        return _with_pictures(with_array(_of_fork(facts), run.text))
    if facts.kind == "program_words" and (shape := shape_of_pairs(run.text)):
        return _with(facts, "pairs_shape", shape)
    if facts.kind == "program_words" and facts.phase in ("load", "resume", "setup"):
        is_told = facts.phase == "resume" and "told_phase" in facts.details
        return _with(facts, "resuming" if is_told else "loading")
    if facts.kind == "host_killed" and _LOADS_ON.search(run.text):
        return _with(facts, "loading_ranks" if len(_KILLED_RANKS.findall(run.text)) > 1 else "loading")
    return _of_job(facts, run) if facts.kind in ("host_killed", "job_memory_limit") else facts


_KILLED_RANKS = re.compile(r"Killing subprocess \d")
"""A line of DeepSpeed's launcher for each of its processes."""
_OF_ARENA = {"cap", "full", "loading", "either"}
"""Details of ONNX Runtime's arena that show more than the size of the request."""
_USUAL_REQUESTS = 256
"""vLLM's own max_num_seqs on most cards."""
_FEW_TOKENS = 512
"""Tokens of prompts in one pass up to which not they, but the weights fill the card."""
_GROWS = ("program_words", "memory_words", "cuda_driver")
"""Kinds of failures with a sentence on memory that grows."""
_CONTEXT = re.compile(r"\bn_ctx(?:_per_seq)? *= *(\d{3,8})\b")
"""The context that llama.cpp prints."""
_LOADS_ON = re.compile(r"Loading (?:safetensors )?(?:checkpoint|pipeline) (?:shards|components): +(?!100%)\d{1,2}%")


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
    if facts.phase is None and not facts.frames and _LOADS_ON.search(run.text):
        return msgspec.structs.replace(facts, phase="load")
    told = phase_told(run.text)
    if facts.frames or facts.phase is not None:  # a pass of an evaluation may look like any other
        shown = purpose_of_frames(facts.frames)
        told = told if told in _BESIDE_TRAINING and (shown is None or shown.purpose != TRAINING) else None
    return facts if told is None else _with(msgspec.structs.replace(facts, phase=told), "told_phase")


_BESIDE_TRAINING = ("eval", "save", "resume")
"""Phases whose traceback need not show them: they call what a training calls, or a library's own functions."""
_OPEN_PHASES = (None, "forward")
"""Phases that leave open what a pass was for."""


def _of_vllm(facts: Facts, run: RunFacts) -> Facts:
    """Return a cache without memory with the figures that vLLM prints, or the size of 16-bit weights."""
    if _HIGH_SHARE.search(run.text):
        facts = _with(facts, "share_is_high")
    if (parts := _VLLM_PARTS.search(run.text)) is not None:
        facts = _with(facts, "printed_weights", f"{parts['weights']} GiB")
        facts = _with(facts, "printed_activations", f"{parts['activations']} GiB")
        return _with(facts, "in_share", f"{parts['share']} GiB")
    if (weights := _VLLM_WEIGHTS.search(run.text)) is not None:
        return _with(facts, "printed_weights", f"{weights[1]} GiB")
    model = model_of(run)
    is_half = not run.signs & {"quantized_4", "quantized_8", "spread"}
    if model is not None and model.parameters and is_half:
        facts = _with(
            _with(facts, "weights_of", printed_name(model, run)),
            "weights_size",
            f"{2 * model.parameters / GIB:.1f} GiB",
        )
    return facts


_VLLM_WEIGHTS = re.compile(r"(?:model weights took|Model loading took) (\d{1,4}\.\d{1,4}) ?(?:GiB|GB)\b")
"""Weights of one card; vLLM's older versions print GB for 2**30 bytes."""
_VLLM_PARTS = re.compile(
    r"gpu_memory_utilization \(\d\.\d{1,3}\) = (?P<share>\d{1,4}\.\d{1,3}) ?GiB(?s:.){1,120}?"
    r"model weights take (?P<weights>\d{1,4}\.\d{1,3}) ?GiB(?s:.){1,80}?"
    r"activation peak memory takes (?P<activations>\d{1,4}\.\d{1,3}) ?GiB[^\n]{1,60}? is -\d"
)
"""The share, and its parts, of a card that they exceed."""


_ASKS_FOR_SHARE = re.compile(
    r"(?:\b(?:is there|are there|any|how|(?:can|could|may|should) (?:i|we|one|you)|possible|(?:a|some) way|want"
    r"|would like|need)\b[^.?\n]{0,80}?\b(?:allocate|use|limit|cap|restrict|reserve|take|occupy)\b[^.?%\n]{0,40}?"
    r"(?P<en>\d{2}(?:\.\d)?) ?(?:%|percent)[^.?\n]{0,30}(?:\bmemory\b|\bv?ram\b|\bgpu\b)"
    r"|\b(?:limit|cap|restrict)\w*\b[^.?\n]{0,30}\b(?:memory|vram)\b[^.?%\n]{0,20}?\b(?:to|at)\b ?(?P<to>\d{2})"
    r" ?(?:%|percent)"
    r"|(?:限制|只(?:用|占|分配))[^。\n]{0,12}?(?P<zh>\d{2}) ?%"
    r"|(?P<ja>\d{2}) ?(?:%|％|パーセント)[^。\n]{0,10}(?:制限|だけ|まで))",
    re.IGNORECASE,
)
"""A person's question for a setting by which a program takes only a part of the card."""
_OWN_SHARE = frozenset({"vllm", "sglang", "tgi", "lmdeploy", "tensorflow", "jax", "paddle"})
"""Programs with a setting of their own for that."""


def _share_asked(run: RunFacts) -> str | None:
    """Return the part of the card that the report wants a program to take, as a fraction."""
    asked = None if _OWN_SHARE.intersection(run.frameworks) else _ASKS_FOR_SHARE.search(run.text)
    return f"{float(asked[asked.lastgroup or 0]) / 100:g}" if asked else None


_TOLD_BY_PEOPLE = ("cuda_out_of_memory", "hip_out_of_memory", "cuda_driver", "program_words", "memory_words")
_TOLD_SIZE = re.compile(
    r"\b(?:tried|tries|trying|try|attempt\w*|wants?|wanted|asks?|asked) to (?:re)?alloc\w* "
    r"(?:about |around |over |more than )?(\d{1,9}(?:\.\d{1,3})?) ?(KiB|MiB|GiB|TiB|PiB|EiB|KB|MB|GB|TB|PB|EB)\b",
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
    if facts.phase == "eval" or shows(run.text, "subject.lacks_no_grad"):
        return _with(facts, "eval")
    if any(_ONTO_CARD.search(each.source or "") for each in facts.frames):
        return _with(facts, "map_location")
    if facts.phase in ("load", "setup"):
        return _with(facts, "loading")
    return _with(facts, "one") if run.numbers.get("batch_size") == 1 else facts


_ONTO_CARD = re.compile(r"\bload\w*\(.*\bmap_location ?= ?(?!.{0,20}[\"']cpu)")
"""A line that loads a file straight onto the card."""
_RANDOM = re.compile(r"\[Op:(?:RandomStandardNormal|RandomUniform|(?:Parameterized)?TruncatedNormal)\]")
"""TensorFlow's operators that make a weight's first values, and noise."""
_LARGE_AXIS = 512
"""Rows and columns from which on random numbers are a weight's, and no batch of noise."""


def _is_first_value(facts: Facts, run: RunFacts) -> bool:
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    return len(sizes) == 2 and min(sizes) >= _LARGE_AXIS and bool(_RANDOM.search(run.text))


_OF_DATA_SET = 4096
"""Examples from which on a tensor is a data set's, and no batch's."""


def _first_axis(facts: Facts) -> int:
    first = facts.details.get("shape", "").partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


_COUNT = 8192
"""Size of an axis that is neither a batch nor the width of a layer."""


def _has_two_counts(facts: Facts) -> bool:
    """Return True for a tensor of two axes, both of which count something, and no batch."""
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    return len(sizes) == 2 and min(sizes) > _COUNT


def _of_pool(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of TensorFlow with the limit of its pool, where the tensor alone is larger."""
    if _is_first_value(facts, run):
        facts = _with(facts, "created")
    if _has_two_counts(facts) and (shown := purpose_of(facts, run)) is not None and shown.purpose == INFERENCE:
        facts = _with(facts, "flat_input")
    limit = _LIMIT.search(run.text)
    if limit is not None and int(limit[1]) < _SMALL_POOL:
        return _with(facts, "small_pool", f"{int(limit[1]) / MIB:.1f} MiB")
    if limit is None or facts.requested_bytes is None or facts.requested_bytes <= int(limit[1]):
        return facts
    name = "beyond_flat" if facts.details.get("shape", ",").isdigit() else "beyond"
    return _with(_with(facts, name), "beyond", f"{int(limit[1]) / GIB:.2f} GiB")


_SMALL_POOL = GIB // 2
"""Bytes below which TensorFlow's pool is no part of a card that it has for itself."""
_LIMIT = re.compile(r"\bLimit: {1,40}(\d{6,15})\b")
"""Bytes that TensorFlow's pool may hold at most, in its statistics."""


def _of_job(facts: Facts, run: RunFacts) -> Facts:
    """Return a killed job with twice the memory that its script asks for."""
    megabytes, memory = _MEM_MB.search(run.text), _most(run.text)
    if megabytes:
        facts = _with(facts, "mem_mb", str(2 * int(megabytes[1])))
    if memory is None:
        return facts
    tasks = _TASKS.search(run.text)
    facts = _with(facts, "tasks", str(int(tasks[1]) // 2)) if tasks and int(tasks[1]) > 1 else facts
    return _with(facts, "mem", f"{2 * int(memory[1])}{memory[2].upper()}")


def _most(text: str) -> re.Match[str] | None:
    """Return the option that asks for the most memory: a report tells which amounts were tried."""
    found = _MEM.finditer(text)
    return max(found, key=lambda match: int(match[1]) * 1024 ** "KMGT".index(match[2].upper()), default=None)


_TASKS = re.compile(r"--ntasks-per-node[= ](\d{1,4})\b")
_MEM_MB = re.compile(r"\bmem_mb ?= ?(\d{1,9})\b")
_MEM = re.compile(r"--mem[= ](\d{1,6}) ?([KMGTkmgt])")
"""Memory that a job asks for: a resource of Snakemake, an option of SLURM."""


def _of_jax(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure of JAX with a program that is small, or with the use of a trained model."""
    facts = _of_tpu(facts, run)
    found = _PROGRAM.search(run.text)
    if found and _ONLY_COPIES.search(run.text):
        return _with(facts, "copied", f"{found[1]} {found[2]}iB")
    if found and float(found[1]) * _UNITS[found[2]] < _SMALL_PROGRAM:
        return _with(facts, "program", f"{found[1]} {found[2]}iB")
    own = [each for each in facts.frames if not each.is_library]
    if any(each.function.rsplit(".", 1)[-1] in _CREATES for each in own) or (own and _creates(own[-1].source)):
        return _with(facts, "weights")
    shown = purpose_of(facts, run)
    if shown is not None and shown.purpose == INFERENCE:
        return _with(facts, "small_request" if 0 < (facts.requested_bytes or 0) < GIB else "inference")
    if found and "tpu" not in facts.details:
        return _with(facts, "large_program", f"{found[1]} {found[2]}iB")
    return _with(facts, "large_request") if (facts.requested_bytes or 0) >= _MOST_OF_A_CARD else facts


_PADDING = re.compile(r"Unpadded \(([\d.]{1,9})([KMG])\) Padded \(([\d.]{1,9})([KMG])\)")
"""XLA's figures for the values of a TPU's arrays, and for the tiles that hold them."""
_MOSTLY_PADDING = 2
"""Times of its values that a program takes, from which on the shapes are the cause."""


def _of_tpu(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure on a TPU whose arrays are mostly padding, or whose free memory is in pieces."""
    if (found := _PADDING.search(run.text)) is not None:
        values, tiles = (float(found[each]) * _UNITS[found[each + 1]] for each in (1, 3))
        if tiles >= _MOSTLY_PADDING * values:
            facts = _with(_with(facts, "unpadded", f"{found[1]} {found[2]}iB"), "padded", f"{found[3]} {found[4]}iB")
    asked, free = facts.requested_bytes, facts.free_bytes
    is_in_pieces = "reservable" in run.text and asked is not None and free is not None and free >= asked
    return _with(facts, "pieces") if is_in_pieces else facts


_MOST_OF_A_CARD = 30 * GIB
"""Bytes of one request that few cards have, beside anything else."""
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
        return _with(facts, "offloaded_count", f"{whole:,}")
    parts = (each for each in counts if 0 <= requested - _OF_FLOAT32 * each / ranks <= _PADDING_BYTES)
    part = next(parts, None) if ranks > 1 else None
    if part is None:
        return facts
    return _with(_with(facts, "offloaded_of", f"{part:,}"), "offloaded_ranks", str(ranks))


_COUNTED = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3}){2,4}|\d{7,13})(?![\d.,]*\d)")
"""A number of parameters."""
_OF_FLOAT32 = 4


def _of_host_allocator(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure on the host with the kind of its request: a layer's result, or a large array at once."""
    if "zero_offload" in facts.details:
        return _of_offload(facts, run)
    facts = with_product(facts, run.text)
    if facts.frames and _LAYERS.search(facts.frames[-1].file):
        return _with(facts, "computing")
    return _with(facts, "at_once") if (facts.requested_bytes or 0) >= _ONE_ARRAY else facts


_CHANNELS = (1, 3, 4)


def _with_pictures(facts: Facts) -> Facts:
    """Return a lack of the host's memory with the number of pictures in its array, by its four axes."""
    sizes = [int(each) for each in facts.details.get("shape", "").split(",") if each.strip().isdigit()]
    if len(sizes) != 4 or not {sizes[1], sizes[3]}.intersection(_CHANNELS) or sizes[0] < 2:
        return facts
    return _with(facts, "pictures", str(sizes[0]))


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
    return _with(facts, "fork_workers" if is_worker else "fork")


def _creates(source: str | None) -> bool:
    """Return True for a line that calls a function in which parameters are created."""
    return source is not None and any(
        re.search(rf"(?<![\w.]){name}\(", source) for name in _CREATES - {"init", "__init__"}
    )


_CREATES = frozenset({"__init__", "init", "init_params", "create_train_state", "init_train_state", "init_state"})
"""Functions in which a program of JAX creates its parameters."""


def _with(facts: Facts, name: str, value: str = "yes") -> Facts:
    return msgspec.structs.replace(facts, details={**facts.details, name: value})
