"""Failures that no tensor of PyTorch explains: their sentences and their fixes, by kind."""

import functools
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from tightfit.diagnosis.cause_records import LIKELY, MEASURED
from tightfit.diagnosis.figure_causes import DECISIVE, causes_of_figures
from tightfit.diagnosis.framework_words import programs
from tightfit.diagnosis.kind_details import detail_names
from tightfit.diagnosis.measures import tried_in, without_effect
from tightfit.diagnosis.named_card import bytes_in_words
from tightfit.diagnosis.one_item import takes_one_item
from tightfit.diagnosis.remedies import UNCHECKED, Remedy
from tightfit.diagnosis.report_words import shows
from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.last_words import shortened
from tightfit.oomlog.log_reader import LogReading
from tightfit.oomlog.log_record import Other
from tightfit.oomlog.run_facts import RunFacts
from tightfit.tables import read_table
from tightfit.wording import kinds as wording

if TYPE_CHECKING:
    from tightfit.wording.diagnosis import Words

_DTYPES = {"float": "float32", "double": "float64", "half": "float16"}
"""TensorFlow's own names, and those that people know."""


class _Fixes(msgspec.Struct, frozen=True):
    """Tables of `kind_fixes.toml`."""

    fixes: dict[str, list[str]]
    paste: dict[str, list[str]]
    programs: dict[str, dict[str, list[str]]]


@functools.cache
def _table() -> _Fixes:
    return read_table("tightfit.diagnosis", "kind_fixes.toml", _Fixes)


def is_known(kind: str) -> bool:
    """Return True for a kind with fixes in `kind_fixes.toml`; the others have one piece of advice each."""
    return kind in _table().fixes or any(key.startswith(f"{kind}__") for key in _table().fixes)


_LARGEST_CARD = 400 * 2**30
"""Bytes that no card or chip has."""
_SMALL_ARRAY = 2**29
"""Bytes of an array on the host below which it fails only if the memory was full before it."""
_TINY = 2**20
"""Bytes below which a request fails only if the card was full before it."""


_MOVES = re.compile(r"\.to\(|\.cuda\(|\bcuda\.set_device\(|_lazy_init\(")
"""Lines of code that open a card, or move a model there."""


_OPERATOR = re.compile(r"(&&|\|\||[<>=!]=|(?<![-<>])[<>](?![=<>]))")
"""An operator of C's, around which a message has spaces."""


def values_of(facts: Facts) -> dict[str, object]:
    """Return the values that sentences on a failure may name: its figures, what follows from them, its details."""
    found: dict[str, object] = {
        name.removesuffix("_bytes"): figure.bytes for name, figure in facts.figures.items() if figure.bytes < 2**63
    }
    found |= {name: text for name, text in facts.details.items() if name not in found}
    if condition := facts.details.get("assertion"):
        found["assertion"] = _OPERATOR.sub(r" \1 ", condition)
    if facts.short_by_bytes is not None:
        found["short"] = facts.short_by_bytes
    if shape := facts.details.get("shape"):
        found["shape"] = f"({', '.join(shape.split(','))})"
    if dtype := facts.details.get("dtype"):
        found["dtype"] = _DTYPES.get(dtype, dtype)
    elif shape:
        found["unsized"] = math.prod(int(size) for size in shape.split(",") if size.strip().isdigit()) * 4
    if facts.phase == "eval" and any("transformers/trainer" in frame.file.replace("\\", "/") for frame in facts.frames):
        found["predictions"] = True
    is_moved = any(_MOVES.search(frame.source or "") for frame in facts.frames)
    if facts.phase == "setup" and facts.kind == "cuda_driver" and is_moved:
        found["at_start"] = True
    if facts.requested_bytes is not None and facts.requested_bytes < _TINY:
        found["tiny"] = True
    if facts.kind == "host_numpy" and 0 < (facts.requested_bytes or 0) < _SMALL_ARRAY:
        found["small_array"] = True
    if (facts.requested_bytes or 0) > _LARGEST_CARD:
        found["beyond_card"] = True
    if _is_square(facts.details.get("shape", "")):
        found["square"] = True
    if facts.kind == "tensorflow_out_of_memory":
        found |= dict.fromkeys(_by_axes(facts.details.get("shape", "")), True)
        if 0 < (facts.requested_bytes or 0) < _LITTLE:
            found["little"] = True
    if facts.kind in _OF_TENSORFLOW and (examples := _examples(facts.details.get("shape", ""))) is not None:
        found["examples"] = examples
    if facts.total_bytes and facts.free_bytes is not None:
        found["share_fits"] = f"{int(100 * facts.free_bytes / facts.total_bytes) / 100:.2f}"
        found.setdefault("others", facts.total_bytes - facts.free_bytes)
    return found


_OF_TENSORFLOW = ("tensorflow_out_of_memory", "tensorflow_host_memory")
_LITTLE = 2**24
"""Bytes of a tensor below which the card was full before it."""
_FEWEST_EXAMPLES = 16


def _examples(shape: str) -> int | None:
    """Return the first size of a tensor of three axes or more, which is that of the batch; None for a kernel.

    >>> _examples("600,120,1503"), _examples("64,32,3,3"), _examples("3,3,512,512")
    (600, None, None)
    """
    sizes = [int(size) for size in shape.split(",") if size.strip().isdigit()]
    if len(sizes) < 3 or sizes[0] < _FEWEST_EXAMPLES or sizes[-2] == sizes[-1] <= _LARGEST_KERNEL:
        return None
    return sizes[0]


_LONG_SIDE, _ALIKE = 20_000, 1.5
"""Rows and columns from which on an array of two similar sizes is mostly one of all pairs, or of a wrong size."""


_LARGEST_KERNEL, _FEWEST_CHANNELS, _FEWEST_PLACES = 7, 64, 9
"""Side of a convolution's kernel, its channels, and the length of an axis that is neither."""


def _by_axes(shape: str) -> Iterator[str]:
    """Yield the signs in a TensorFlow tensor's axes: the weight of a convolution, a batch of one, large pictures.

    >>> list(_by_axes("3,3,512,2048")), list(_by_axes("1,2988,5312,64")), list(_by_axes("16,257,257,32"))
    (['kernel'], ['single'], [])
    >>> list(_by_axes("5,64,4890,4890"))
    ['wide']
    """
    sizes = [int(size) for size in shape.split(",") if size.strip().isdigit()]
    if len(sizes) == 4 and sizes[0] == sizes[1] <= _LARGEST_KERNEL and min(sizes[2:]) >= _FEWEST_CHANNELS:
        yield "kernel"
    elif len(sizes) >= 3 and sizes[0] == 1 and sizes[1] >= _FEWEST_PLACES:
        yield "single"
    elif len(sizes) == 4 and _is_of_large_picture(sizes[1:]):
        yield "wide"


_WIDE = 1000
"""Rows and columns from which on the pictures, and not the batch, make a tensor large."""


def _is_of_large_picture(sizes: Sequence[int]) -> bool:
    """Return True for the axes of pictures with many rows and columns: the channels are first or last."""
    return min(sizes[:2]) >= _WIDE or min(sizes[1:]) >= _WIDE


def _is_square(shape: str) -> bool:
    sizes = sorted(int(size) for size in shape.split(",") if size.isdigit())
    return len(sizes) == 2 and sizes[0] >= _LONG_SIDE and sizes[1] <= _ALIKE * sizes[0]


def _key(keys: Mapping[str, object], kind: str, known: Mapping[str, object]) -> str | None:
    """Return the first key `kind__name` with a known name, else `kind` if it is a key."""
    kinds = (kind, _ALIKE_KINDS.get(kind))
    named = (key for key in keys if key.partition("__")[0] in kinds and key.partition("__")[2] in known)
    sayable = (key for key in named if _fields(keys[key]) <= known.keys())
    return next(sayable, kind if kind in keys else None)


_ALIKE_KINDS = {"host_memory_error": "host_numpy"}
"""Kinds of which the second's sentences on a detail are true of the first, too."""


def _fields(sentence: object) -> set[str]:
    """Return the names that a sentence fills in; none for a list of fixes."""
    parsed = string.Formatter().parse(sentence) if isinstance(sentence, str) else ()
    return {name for _, name, _, _ in parsed if name}


_TWO_ENDS = re.compile(r"([?!…])\.(?=\s|$)")
"""A quoted question, and the end of the sentence that quotes it."""


_NO_SPACE = re.compile(r"(\d)([KMGT]i?B)\b")
"""A size as a message prints it, without a space before its unit."""


def said(table: str, facts: Facts, words: "Words") -> str:
    """Return the sentence of a failure in the table `problem` or `cause`."""
    sentences, known = wording.words(words.language), values_of(facts)
    if (key := _key(sentences.table(table), facts.kind, known)) is not None:
        return _NO_SPACE.sub(r"\1 \2", _TWO_ENDS.sub(r"\1", sentences(table, key, **known)))
    return words({"problem": "kinds", "cause": "kind_causes"}[table], facts.kind)


_TOLD_CAUSES = frozenset({"growing", "loading", "resuming", "pairs_shape", "share_asked"})
"""Details of a person's report by which its sentence names a likely cause."""


_SUPPOSES = re.compile(r"\b[Uu]sually\b")
"""A word by which a sentence tells what is usual, and measures nothing."""


def label_of(facts: Facts) -> str:
    """Return the evidence of a kind's cause: measured where the message itself names it."""
    if "cause_unstated" in facts.notes:
        return LIKELY
    if "reported" in facts.details and facts.kind == "program_words":  # its sentence says what is not known
        return LIKELY if _TOLD_CAUSES & facts.details.keys() else MEASURED
    causes, values = wording.words("en").table("cause"), values_of(facts)
    if _SUPPOSES.search(str(causes.get(_key(causes, facts.kind, values) or "", ""))):
        return LIKELY
    if (_key(causes, facts.kind, values) or "").partition("__")[2] in detail_names():  # words elsewhere in the log
        return LIKELY
    known = (key.partition("__") for key in causes if key.startswith(f"{facts.kind}__"))
    by_figures = any(_has_digit(values.get(name)) and name not in detail_names() for _, _, name in known)
    return MEASURED if by_figures or memory_of(facts.kind) in ("host", "none") else LIKELY


def _has_digit(value: object) -> bool:
    """Return True for a figure of the message; the name of a library or a program measures nothing."""
    return value is not None and any(each.isdigit() for each in str(value))


def fix_said(code: str, facts: Facts, words: "Words") -> str:
    """Return the words of a fix with a code that begins with `kind_`."""
    name = code.removeprefix("kind_")
    sentences = wording.words(words.language)
    if sentences.has("fix", name):
        return sentences("fix", name, **values_of(facts))
    return words("kind_advice", name)


def expected_said(facts: Facts, words: "Words") -> str:
    """Return the sentence on the expected result of a kind's fixes."""
    sentences = wording.words(words.language)
    is_own = sentences.has("expected", facts.kind) and "tried_zero" not in facts.details
    return sentences("expected", facts.kind if is_own else memory_of(facts.kind))


def fixes_of(facts: Facts, run: RunFacts) -> tuple[Remedy, ...]:
    """Return the fixes of a failure that no tensor on a device caused, in the words of the program if it has some."""
    known, tried = values_of(facts), tried_in(run.text)
    codes = [code for code in _codes_of(facts, run, known) if _MEASURES.get(code) not in without_effect(run.text)]
    codes.sort(key=lambda code: _MEASURES.get(code) in tried)
    return tuple(
        Remedy(
            code=f"kind_{code}",
            verdict=UNCHECKED,
            reason="general",
            label=LIKELY,
            exact=None,
            paste=tuple(line.format(**known) for line in _lines(code, run)),
        )
        for code in codes
    )


def _codes_of(facts: Facts, run: RunFacts, known: Mapping[str, object]) -> list[str]:
    """Return the fixes of a failure's kind without those that its run has no use for."""
    key = _key(_table().fixes, facts.kind, known)
    codes = _table().fixes[key] if key else [facts.kind]
    shown = {"workers", "fork_workers"} & known.keys()
    has_workers = shown or (
        _LOADS.search(run.text) and _TRAINS.search(run.text) and not _LOADS_OTHERWISE.search(run.text)
    )
    if facts.kind != "dataloader_killed" and not has_workers:
        codes = [code for code in codes if code != "fewer_workers"]
    if len(run.text) > _REPORT and not shows(run.text, "subject.reads_data"):
        codes = [code for code in codes if code != "data_in_parts"]
    if memory_of(facts.kind) == "host" and not _LOADS_MODEL.search(run.text):
        codes = [code for code in codes if code not in ("quantised_load", "weights_once")]
    if "raised" in facts.details:  # by an older Ray, whose limit has another name
        codes = [code for code in codes if code not in ("ray_threshold", "ray_threshold_fraction")]
    if _ON_DISK.search(run.text):
        codes = ["adapters_trained" if code == "less_offloaded" else code for code in codes]
    if _HOSTED.search(run.text):
        codes = [code for code in codes if code not in ("kernel_log", "watch_host")]
    if "wsl" not in run.signs:
        codes = [code for code in codes if code != "wsl_memory"]
    if "one_worker" in known:
        codes = [code for code in codes if code != "fewer_workers"]
    if facts.kind == "jax_out_of_memory" and _is_beyond_named_card(facts, run):
        codes = [
            *(code for code in codes if code not in _OF_SHARE),
            *(["jax_unified"] if "jax_unified" not in codes else []),
        ]
    if facts.kind in ("host_memory_error", "dataloader_killed") and not _HAS_LIMIT.search(run.text):
        codes = [code for code in codes if code != "raise_limit"]
    converts = _CONVERTS.search(run.text) and not has_workers
    if facts.kind == "host_killed" and (converts or not _IN_PYTHON.search(run.text)):
        codes = [code for code in codes if code != "data_in_parts"]
    if facts.kind in ("host_killed", "host_memory_error"):
        codes = _for_data(codes, run)
    if ELEMENT_BYTES.get(facts.details.get("dtype", ""), 4) <= _SMALL_ELEMENT:
        codes = [code for code in codes if code != "smaller_elements"]
    if run.framework in programs("servers") and run.framework not in _table().programs["no_pinning"]:
        codes = [code for code in codes if code != "no_pinning"]  # its users have no data loader
    if takes_one_item(facts, run):
        codes = [{"eval_batch_smaller": "smaller_inputs_only", **_OF_ONE}.get(code, code) for code in codes]
    if run.numbers.get("batch_size") == 1:
        codes = [_OF_ONE.get(code, code) for code in codes if code != "smaller_batch"]
    return [code for code in codes if not _is_given(_lines(code, run), run.text)]


_HOSTED = re.compile(r"\b[Kk]aggle\b|\b[Cc]olab\b|__notebook__|(?<![\w.])/content/\w")
"""Names of hosted notebooks, beside which there is no shell of the machine."""
_ON_DISK = re.compile(r'"device" ?: ?"nvme"')
"""DeepSpeed's word for an offload to a disk."""
_REPORT = 600
"""Characters of a log from which on a program that reads data says so."""
_OF_PYTHON = ("data_in_parts", "fewer_workers")
"""Fixes that stand on libraries of Python."""
_RESIDENT = re.compile(
    r"\b(?:whole|full|entire|complete|all(?: of)?(?: the| my)?) (?:data ?sets?|data|corpus)\b[^.\n]{0,40}?"
    r"\b(?:(?:in|into|in the|into the) (?:\w+ )?(?:memory|RAM)\b|(?:memory[- ])?resident\b)"
    r"|(?:全部|整个)数据(?:集)?[^。\n]{0,10}内存|(?:全データ|データ(?:セット)?(?:全体|をすべて|を全て))[^。\n]{0,10}メモリ",
    re.IGNORECASE,
)
"""Words of a person whose data are held as a whole."""


def _for_data(codes: list[str], run: RunFacts) -> list[str]:
    """Return the fixes that suit the program's data: none of Python's libraries where nothing shows deep learning."""
    if not (run.frameworks or _IN_PYTHON.search(run.text) or _LEARNS.search(run.text)):
        codes = [code for code in codes if code not in _OF_PYTHON]
    elif _RESIDENT.search(run.text):
        codes = ["data_in_parts", *(code for code in codes if code != "data_in_parts")]
    return [code for code in codes if code != "windows_paging" or "windows" in run.signs]


def _is_given(lines: Sequence[str], text: str) -> bool:
    """Return True for options of a command that the report's command has already."""
    return bool(lines) and all(
        line.startswith("--") and re.search(rf"{re.escape(line)}(?![\w.-])", text) for line in lines
    )


_LOADS_MODEL = re.compile(
    r"from_pretrained|load_model|load_checkpoint|[Ss]afetensors|checkpoint shards|\bLLMs?\b|[Ll][Ll]a[Mm][Aa]|GGUF|ggml"
    r"|[Oo]llama|\b\d{1,3}(?:\.\d)?[Bb]\b|\b(?:load\w*|run\w*) (?:the |a |my )?(?:\w+ )?(?:model|weights)\b"
    r"|[Qq]wen|[Mm]istral|[Gg]emma|\bphi-"
    r"|diffus|[Ff]lux|模型|モデル|모델"
)
"""Words of a program that loads a trained model."""
_SMALL_ELEMENT = 2
"""Bytes of a number that hardly has a smaller type."""
_MEASURES = {"smaller_batch": "split_general", "less_in_pass": "split_general", "mixed_precision": "half_precision"}
"""Measures that a report may say were tried in vain: those fixes come last."""
_OF_SHARE = frozenset({"jax_preallocate", "jax_fraction", "other_programs"})
"""Fixes by more of the card: they do not help a program that is larger than the whole card."""


def _is_beyond_named_card(facts: Facts, run: RunFacts) -> bool:
    """Return True if a request, or all that XLA plans, is more than the one card that the report names has."""
    total = facts.total_bytes or bytes_in_words(run.text)
    planned = Figure.printed(facts.details.get("large_program", ""))
    need = max(facts.requested_bytes or 0, planned.bytes if planned else 0)
    return total is not None and need > total and "tpu" not in facts.details


_OF_ONE = {"less_in_pass": "smaller_inputs_only", "smaller_batch_program": "smaller_inputs_only"}
"""Fixes of a batch that cannot be smaller."""
_LOADS = re.compile(
    r"\b(?:py)?torch|[Dd]ata_?[Ll]oader|workers|\b[Tt]rain|\b[Ee]poch"
    r"|[Tt]ensor[Ff]low|[Kk]eras|\bjax\b|[Nn]extflow|\bstep \d{1,6}\b(?!\.\d)"
)
"""Words of a program that may load data in worker processes."""


_LOADS_OTHERWISE = re.compile(r"\A(?!(?s:.)*(?:\b(?:py)?torch|[Dd]ata_?[Ll]oader|num_workers))(?s:.)*[Tt]ensor[Ff]low")
"""A report of TensorFlow alone, which has no DataLoader."""
_TRAINS = re.compile(
    r"[Dd]ata_?[Ll]oader|[Ww]orkers|\b[Tt]rain(?!ed\b)|\b[Ee]poch|\b[Dd]ata[_ ]?[Ss]et|[Tt]ensor[Ff]low|[Kk]eras"
    r"|\bjax\b|[Nn]extflow|\bstep \d{1,6}\b(?!\.\d)|训练|学習|학습"
)
"""Words of a program that has a data set: one that converts or exports a trained model has none."""
_HAS_LIMIT = re.compile(
    r"docker|container|kubernetes|k8s|\bpods?\b|slurm|sbatch|cgroup|ulimit|コンテナ|容器", re.IGNORECASE
)
"""Words of a place with a limit of its own for the host's memory."""
_CONVERTS = re.compile(
    r"\b(?:export|convert|quanti[sz]e|merge)\w*\.py\b|\bonnx\.export\("
    r"|\b(?:export|convert)\w* (?:[\w.]+ ){0,6}(?:to|into|as) (?:onnx|tensorrt|gguf|coreml|tflite)\b",
    re.IGNORECASE,
)
"""Words of a program that writes a trained model in another form, and reads no data."""
_IN_PYTHON = re.compile(
    r"python|\.py\b|torch|numpy|pandas|jax|keras|tensorflow|\bstep \d{1,6}\b(?!\.\d)|data_?loader|workers\b|traceback"
    r"|MemoryError|\bconda|\bpip3? install|\.ipynb|jupyter|colab\b|kaggle|hugging ?face|\bpklz?\b|transformers",
    re.IGNORECASE,
)
"""Signs of a program in Python, or of a training."""
_LEARNS = re.compile(
    r"\b(?:epoch|batch|token|image|network|model|iteration|algorithm|script|checkpoint|fine-?tun|nextflow)",
    re.IGNORECASE,
)
"""Words of deep learning, whose programs are mostly in Python."""


def _lines(code: str, run: RunFacts) -> list[str]:
    """Return the lines to paste for a fix, in the words of the outermost program that has some."""
    own = _table().programs.get(code, {})
    lines = next((own[each] for each in run.frameworks if each in own), _table().paste.get(code, []))
    lines = [line for line in lines if (of := _COMMAND.search(line)) and (of[1] or of[2]) in run.text] or lines
    return ["rocm-smi"] if lines == ["nvidia-smi"] and _OF_AMD.search(run.text) else lines


_COMMAND = re.compile(r"^(\w{4,40}) \.\.\. |  # before (\w{4,40})$")
"""The program that a line is an option of, or is set before."""
_OF_AMD = re.compile(r"\bHIP_ERROR|\bhipError|\bHIP (?:out of memory|error)|\brocm[_/]\w|\bROCm\d?\b|\bgfx\d{3,4}\b")
"""Words of a log for a card of AMD's."""


_SKIPPED = re.compile(r"\bskip(?:s|ped|ping)\b|^\W*(?:failed \()?CUDA out of memory\) on \w", re.IGNORECASE)
"""A program's word for a batch that it left out."""


_GRANTED = re.compile(r"\bexceeds \d{1,3}% of\b")
"""TensorFlow's words for a large allocation that it made."""
_ON_HOST = re.compile(r"\bto CPU due to CUDA OOM\b")
"""Detectron2's words for work that it does on the CPU instead."""
_IN_TILES = re.compile(r"\bretrying with tiled\b")
_WITHOUT_BATCH = re.compile(r"regular VAE|\blora \S{1,80}\.weight\b")
"""Words for a part of a program for pictures that no batch makes smaller."""


def nothing_lines(reading: LogReading, words: "Words") -> Iterator[str]:
    """Yield the sentences on a log without a failure."""
    sentences, kind = wording.words(words.language), reading.kind_of_nothing or "nothing"
    kind = "caught_at_end" if kind == "caught" and not reading.went_on else kind
    yield sentences("nothing", kind, evidence=shortened(" ".join(reading.evidence.split()).lstrip(": ")))
    if reading.caught is not None:
        decisive = (cause for cause in causes_of_figures(reading.caught) if cause.code in DECISIVE)
        yield from (words("causes", cause.code, **msgspec.structs.asdict(cause)) for cause in decisive)
    hint = "skipped" if kind.startswith("caught") and _SKIPPED.search(reading.evidence) else f"{kind}_hint"
    if reading.caught is not None and "llama_cpp" in reading.caught.details and kind == "caught":
        hint = "retried_hint"
    if hint == "harmless_hint" and _GRANTED.search(reading.evidence):
        hint = "harmless_granted"
    if hint.startswith("caught") and _ON_HOST.search(reading.evidence):
        yield sentences("nothing", "caught_on_host")
        return
    if hint == "caught_hint" and _IN_TILES.search(reading.evidence):
        hint = "caught_in_tiles"
    if hint == "caught_hint" and reading.retried_batch is not None:
        yield sentences("nothing", "caught_with_batch", batch=reading.retried_batch)
    elif sentences.has("nothing", hint):
        yield sentences("nothing", hint)
    has_batch = not _WITHOUT_BATCH.search(reading.evidence)
    is_open = hint.startswith("caught") and reading.retried_batch is None
    if is_open and has_batch and (reading.caught is None or _batch_avoids(reading.caught)):
        yield sentences("nothing", "caught_batch")


def _batch_avoids(facts: Facts) -> bool:
    """Return True for a lack of device memory that a smaller batch may avoid: one of PyTorch's, in a card's size."""
    total, requested = facts.figures.get("total_bytes"), facts.requested_bytes
    too_large = total is not None and requested is not None and requested > total.high
    return memory_of(facts.kind) == "device" and "llama_cpp" not in facts.details and not too_large


_TO_CPU = re.compile(r"\bfall(?:ing|s)? ?back (?:to|on) (?:the )?CPU\b|\busing (?:the )?CPU instead\b", re.IGNORECASE)
"""A program's words for going on without the GPU."""


def before_of(reading: LogReading) -> Other | None:
    """Return the lack of device memory that a program handled by going on, on the CPU, where it then failed."""
    facts = reading.failure
    is_on_cpu = facts is not None and (
        facts.kind == "host_allocator" or (memory_of(facts.kind) == "host" and _TO_CPU.search(reading.run.text))
    )
    if facts is None or not is_on_cpu:
        return None
    handled = (each for each in reading.others if each.standing == "caught" and each.line < facts.line)
    return next((each for each in handled if memory_of(each.kind) == "device"), None)


def follows_lines(reading: LogReading, words: "Words") -> Iterator[str]:
    """Yield sentences on what else the log shows: a lack of memory before the failure, and what follows from it."""
    sentences = wording.words(words.language)
    if (before := before_of(reading)) is not None and before.requested_bytes is not None:
        yield sentences("follows", "gpu_before_requested", requested=before.requested_bytes)
    elif before is not None:
        yield sentences("follows", "gpu_before")
    if reading.failure is not None and "failed_afterwards" in reading.failure.notes:
        yield sentences("follows", "failed_afterwards", afterwards=reading.failure.details["afterwards"])
    if reading.failure is not None and "failed_afterwards_cut" in reading.failure.notes:
        yield sentences("follows", "failed_afterwards_cut")
    kinds = dict.fromkeys(each.kind for each in reading.others if each.standing == "failure")
    yield from (sentences("follows", kind) for kind in kinds if sentences.has("follows", kind))
