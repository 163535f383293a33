"""Fixes of failures that no tensor of PyTorch explains, by kind: those that the run can use."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from tightfit.diagnosis.cause_records import LIKELY
from tightfit.diagnosis.framework_words import programs
from tightfit.diagnosis.kind_sentences import key_for, values_of
from tightfit.diagnosis.measures import tried_in, without_effect
from tightfit.diagnosis.named_card import bytes_in_words
from tightfit.diagnosis.one_item import takes_one_item
from tightfit.diagnosis.remedies import UNCHECKED, Remedy
from tightfit.diagnosis.report_words import shows
from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.kinds import memory_of
from tightfit.oomlog.run_facts import RunFacts
from tightfit.tables import read_table


class _Fixes(msgspec.Struct, frozen=True):
    """Tables of `kind_fixes.toml`."""

    fixes: dict[str, list[str]]
    paste: dict[str, list[str]]
    programs: dict[str, dict[str, list[str]]]


@functools.cache
def _table() -> _Fixes:
    return read_table("tightfit.diagnosis", "kind_fixes.toml", _Fixes)


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


_OF_DATA = ("host_killed", "host_memory_error")
"""Kinds of failures on the host that data may cause."""
_HOSTED = re.compile(r"\b[Kk]aggle\b|\b[Cc]olab\b|__notebook__|(?<![\w.])/content/\w")
"""Names of hosted notebooks, beside which there is no shell of the machine."""
_ON_DISK = re.compile(r'"device" ?: ?"nvme"')
"""DeepSpeed's word for an offload to a disk."""
_REPORT = 600
"""Characters of a log from which on a program that reads data says so."""
_RESIDENT = re.compile(
    r"\b(?:whole|full|entire|complete|all(?: of)?(?: the| my)?) (?:data ?sets?|data|corpus)\b[^.\n]{0,40}?"
    r"\b(?:(?:in|into|in the|into the) (?:\w+ )?(?:memory|RAM)\b|(?:memory[- ])?resident\b)"
    r"|(?:全部|整个)数据(?:集)?[^。\n]{0,10}内存|(?:全データ|データ(?:セット)?(?:全体|をすべて|を全て))[^。\n]{0,10}メモリ",
    re.IGNORECASE,
)
"""Words of a person whose data are held as a whole."""
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
_COMMAND = re.compile(r"^(\w{4,40}) \.\.\. |  # before (\w{4,40})$")
"""The program that a line is an option of, or is set before."""
_OF_AMD = re.compile(r"\bHIP_ERROR|\bhipError|\bHIP (?:out of memory|error)|\brocm[_/]\w|\bROCm\d?\b|\bgfx\d{3,4}\b")
"""Words of a log for a card of AMD's."""


class _Fix(NamedTuple):
    """A failure of a kind and its run, for which the rules judge the fixes."""

    facts: Facts
    run: RunFacts
    known: Mapping[str, object]
    """Values that sentences on the failure may name."""

    @property
    def has_workers(self) -> bool:
        """True for a program that may load data in worker processes."""
        if {"workers", "fork_workers"} & self.known.keys():
            return True
        text = self.run.text
        return bool(_LOADS.search(text) and _TRAINS.search(text) and not _LOADS_OTHERWISE.search(text))

    @property
    def is_on_host(self) -> bool:
        """True if the host's memory ran out."""
        return memory_of(self.facts.kind) == "host"

    @property
    def has_batch_of_one(self) -> bool:
        """True if the report prints a batch of one."""
        return self.run.numbers.get("batch_size") == 1

    def shows(self, pattern: re.Pattern[str]) -> bool:
        """Return True if the report has words that a pattern names."""
        return pattern.search(self.run.text) is not None


class _Rule(NamedTuple):
    """A reason to leave fixes of a kind out."""

    codes: tuple[str, ...]
    reason: str
    holds: Callable[[_Fix], bool]


def _is_of_other_language(fix: _Fix) -> bool:
    """Return True if nothing shows deep learning, or Python, in a program whose data may have filled the host."""
    is_python = fix.run.frameworks or fix.shows(_IN_PYTHON) or fix.shows(_LEARNS)
    return fix.facts.kind in _OF_DATA and not is_python


def _reads_no_data(run: RunFacts) -> bool:
    """Return True for a report of some length without a word for data."""
    return len(run.text) > _REPORT and not shows(run.text, "subject.reads_data")


def _has_no_data(fix: _Fix) -> bool:
    """Return True for a killed program that writes a trained model in another form, or is not in Python."""
    converts = fix.shows(_CONVERTS) and not fix.has_workers
    return fix.facts.kind == "host_killed" and (converts or not fix.shows(_IN_PYTHON))


def _serves_unpinned(run: RunFacts) -> bool:
    """Return True for a program that only uses trained models, and has no switch for pinned memory."""
    return run.framework in programs("servers") and run.framework not in _table().programs["no_pinning"]


_NEEDLESS = (
    _Rule(("fewer_workers",), "no workers", lambda fix: fix.facts.kind != "dataloader_killed" and not fix.has_workers),
    _Rule(("fewer_workers",), "one worker reads already", lambda fix: "one_worker" in fix.known),
    _Rule(("fewer_workers", "data_in_parts"), "no deep learning in Python", _is_of_other_language),
    _Rule(("data_in_parts",), "nothing shows data", lambda fix: _reads_no_data(fix.run)),
    _Rule(("data_in_parts",), "a model is converted, or it is not Python", _has_no_data),
    _Rule(
        ("quantised_load", "weights_once"),
        "no model is loaded",
        lambda fix: fix.is_on_host and not fix.shows(_LOADS_MODEL),
    ),
    _Rule(
        ("ray_threshold", "ray_threshold_fraction"),
        "an older Ray has another name for its limit",
        lambda fix: "raised" in fix.facts.details,
    ),
    _Rule(("kernel_log", "watch_host"), "a hosted notebook has no shell", lambda fix: fix.shows(_HOSTED)),
    _Rule(
        ("kernel_log",),
        "the report has it",
        lambda fix: not {"kernel_says", "cgroup_says", "memcg"}.isdisjoint(fix.known),
    ),
    _Rule(("wsl_memory",), "it is not in WSL", lambda fix: "wsl" not in fix.run.signs),
    _Rule(
        ("windows_paging",),
        "it is not Windows",
        lambda fix: fix.facts.kind in _OF_DATA and "windows" not in fix.run.signs,
    ),
    _Rule(
        ("jax_preallocate", "jax_fraction", "other_programs"),
        "it is larger than the whole card",
        lambda fix: fix.facts.kind == "jax_out_of_memory" and _is_beyond_named_card(fix.facts, fix.run),
    ),
    _Rule(
        ("raise_limit",),
        "nothing shows a limit",
        lambda fix: fix.facts.kind in ("host_memory_error", "dataloader_killed") and not fix.shows(_HAS_LIMIT),
    ),
    _Rule(
        ("smaller_elements",),
        "they are small already",
        lambda fix: ELEMENT_BYTES.get(fix.facts.details.get("dtype", ""), 4) <= _SMALL_ELEMENT,
    ),
    _Rule(("smaller_batch",), "the batch is one already", lambda fix: fix.has_batch_of_one),
    _Rule(("no_pinning",), "its users have no data loader", lambda fix: _serves_unpinned(fix.run)),
)


def _codes_of(facts: Facts, run: RunFacts, known: Mapping[str, object]) -> list[str]:
    """Return the fixes of a failure's kind without those that its run has no use for."""
    fix = _Fix(facts, run, known)
    key = key_for(_table().fixes, facts.kind, known)
    needless = {code for rule in _NEEDLESS if rule.holds(fix) for code in rule.codes}
    codes = [code for code in (_table().fixes[key] if key else [facts.kind]) if code not in needless]
    if facts.kind == "jax_out_of_memory" and _is_beyond_named_card(facts, run):
        codes = list(dict.fromkeys((*codes, "jax_unified")))
    if facts.kind in _OF_DATA and not _is_of_other_language(fix) and fix.shows(_RESIDENT):
        codes = ["data_in_parts", *(code for code in codes if code != "data_in_parts")]
    instead = _instead(fix)
    codes = [instead.get(code, code) for code in codes]
    return [code for code in codes if not _is_given(_lines(code, run), run.text)]


def _instead(fix: _Fix) -> dict[str, str]:
    """Return the fixes that suit this run in the place of others of its kind."""
    found = {"less_offloaded": "adapters_trained"} if fix.shows(_ON_DISK) else {}
    is_of_one_item = takes_one_item(fix.facts, fix.run)
    if is_of_one_item:
        found |= {"eval_batch_smaller": "smaller_inputs_only"}
    if is_of_one_item or fix.has_batch_of_one:
        found |= _OF_ONE
    return found


def _is_given(lines: Sequence[str], text: str) -> bool:
    """Return True for options of a command that the report's command has already."""
    return bool(lines) and all(
        line.startswith("--") and re.search(rf"{re.escape(line)}(?![\w.-])", text) for line in lines
    )


def _is_beyond_named_card(facts: Facts, run: RunFacts) -> bool:
    """Return True if a request, or all that XLA plans, is more than the one card that the report names has."""
    total = facts.total_bytes or bytes_in_words(run.text)
    planned = Figure.printed(facts.details.get("large_program", ""))
    need = max(facts.requested_bytes or 0, planned.bytes if planned else 0)
    return total is not None and need > total and "tpu" not in facts.details


def _lines(code: str, run: RunFacts) -> list[str]:
    """Return the lines to paste for a fix, in the words of the outermost program that has some."""
    own = _table().programs.get(code, {})
    lines = next((own[each] for each in run.frameworks if each in own), _table().paste.get(code, []))
    lines = [line for line in lines if (of := _COMMAND.search(line)) and (of[1] or of[2]) in run.text] or lines
    return ["rocm-smi"] if lines == ["nvidia-smi"] and _OF_AMD.search(run.text) else lines
