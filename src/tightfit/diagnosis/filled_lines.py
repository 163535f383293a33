"""Values that fill a remedy's lines: the printed batch divided into passes, half the length, the model's class."""

import re

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.framework_words import Pasted, has_fixed_lines, has_own, programs
from tightfit.diagnosis.own_options import attributes_of, options_of, search_of
from tightfit.oomlog.run_facts import RunFacts


def accumulation(evidence: Evidence) -> int | None:
    """Return the printed accumulation, or the usual 1 of a program that is known to have it; None if unknown."""
    usual = 1 if evidence.framework in programs("one_pass") else None
    return evidence.run.numbers.get("accumulation", usual)


_FEW = 4
"""Sequences from which one at a time is the next step: the least of all passes, for little more time."""

Divided = tuple[int | None, int | None, int | None]
"""A printed batch, the sequences of one pass and the passes of a step."""


def divided(evidence: Evidence) -> Divided:
    """Return the printed batch, a half or a quarter of it, and the accumulation that keeps the sequences of a step."""
    batch = evidence.run.numbers.get("batch_size")
    if not batch or batch < 2 or "data_parallel" in evidence.run.signs:
        return None, None, None
    most = batch // evidence.passes if batch > _FEW else 1
    if evidence.framework in programs("without_accumulation"):  # no need to keep the number of samples
        return batch, max(most, 1), batch // max(most, 1)
    size = max(each for each in range(1, max(most, 1) + 1) if batch % each == 0)
    return batch, size, batch // size * (accumulation(evidence) or 1)


def values_to_fill(evidence: Evidence, parts: Divided) -> dict[str, int | str]:
    """Return the values to fill into the lines of frameworks.toml."""
    batch, size, passes = parts
    numbers = evidence.run.numbers
    length, printed = numbers.get("length") or numbers.get("completion"), numbers.get("accumulation")
    if batch is None and printed:  # the batch is unknown, the number of its parts is not
        passes = printed * evidence.passes
    return {
        "size": size or f"BATCH/{evidence.passes}",
        "passes": passes
        if passes and accumulation(evidence)
        else f"{batch // size if batch and size else evidence.passes}*ACCUMULATION",
        "share": _lower_share(evidence.run.text),
        "half": length // 2 if length else "HALF",
        "model_class": _model_class(evidence.run),
        "smaller": smaller_size(evidence.run.text) or "MODEL",
    }


_SHARE = re.compile(
    r"(?:gpu[-_]memory[-_]utilization|mem[-_]fraction[-_]static|cache[-_]max[-_]entry[-_]count)\W{1,4}(0?\.\d{1,3})\b"
)
_USUAL_SHARE, _STEP, _LEAST_SHARE = 0.8, 0.1, 0.2


def _lower_share(text: str) -> str:
    """Return a share of the card below each one that the log prints.

    >>> _lower_share("--mem-fraction-static 0.7"), _lower_share("vllm serve")
    ('0.6', '0.8')
    """
    printed = [float(each) for each in _SHARE.findall(text)]
    return f"{max(_LEAST_SHARE, min([_USUAL_SHARE, *(each - _STEP for each in printed)])):.2g}"


_SIZED = re.compile(r"\b(yolo(?:v?\d{1,2}))([nsmlx])(u?(?:6|-seg|-pose|-obb|-cls)?)\.(?:pt|yaml)\b")
_SIZES = "nsmlx"
"""Letters of YOLO's models, the smallest first; YOLOv5 and later have them all."""


def smaller_size(text: str) -> str | None:
    """Return the next smaller model of the one that a report of YOLO names last; None for the smallest, or none.

    >>> smaller_size('YOLO("yolov8m.pt")'), smaller_size("yolo11n.pt")
    ('yolov8s.pt', None)
    """
    named = _SIZED.findall(text)
    if not named or named[-1][1] == _SIZES[0]:
        return None
    family, letter, kind = named[-1]
    return f"{family}{_SIZES[_SIZES.index(letter) - 1]}{kind}.pt"


_CLASSES = {
    "AutoModelForSpeechSeq2Seq": re.compile(r"whisper|speech_to_text|seamless|moonshine"),
    "AutoModelForSeq2SeqLM": re.compile(r"m?t5|longt5|umt5|m?bart|bigbird_pegasus|pegasus|marian|m2m_100|nllb\w*|led"),
    "AutoModelForCausalLM": re.compile(
        r"llama4?|qwen\d(?:_moe)?|mistral|mixtral|gemma\d?|gpt\w*|phi\d?|falcon|opt|bloom|mpt|olmo\w*|starcoder2|cohere\d?"
    ),
}
"""Classes of Transformers, by the folder of the model's file."""
_OF_CAUSAL = re.compile(
    r"CausalLM|\b(?:llama|qwen|mistral|mixtral|gemma|gpt|phi|falcon|chatglm|baichuan|vicuna)", re.IGNORECASE
)

_OF_PICTURES = re.compile(r"qwen[\w.-]{0,8}vl(?![a-z])|llava|internvl|mllama|paligemma", re.IGNORECASE)
"""Models of pictures and text, which another class loads."""


def _model_class(run: RunFacts) -> str:
    """Return the class of Transformers that loads the user's model; a word in capitals where the log does not tell."""
    if run.family is not None:
        return next((name for name, family in _CLASSES.items() if family.fullmatch(run.family)), "MODEL_CLASS")
    is_causal = _OF_CAUSAL.search(run.text) and not _OF_PICTURES.search(run.text)
    return "AutoModelForCausalLM" if is_causal else "MODEL_CLASS"


_FSDP = re.compile(r"(--fsdp[ =][\"'])full_shard( auto_wrap[\"'])")
"""The Trainer's option for FSDP, without offloading."""


def own_option(code: str, evidence: Evidence, parts: Divided) -> Pasted | None:
    """Return the user's own options, as printed, where the program has no words of its own for this remedy."""
    program = evidence.framework
    if code == "offload" and (fsdp := _FSDP.search(evidence.run.text)):
        return Pasted(lines=(f"{fsdp[1]}full_shard offload{fsdp[2]}",))
    is_of_script = program in programs("libraries") and (code in _BY_SCRIPTS or _is_of_command(code, evidence))
    if program is not None and has_own(code, program) and not is_of_script:
        printed = () if code in _IN_PARTS else options_of(code, evidence.run.text)
        is_fitting = bool(printed) and (has_fixed_lines(code, program) or printed[0].startswith("--"))
        return Pasted(lines=printed) if is_fitting else None
    names, (_, size, passes) = evidence.run.names, parts
    if code == "less_at_once" and size is not None and "batch_size" in names:
        parts_of_items = [each for each in options_of(code, evidence.run.text) if not re.search(r"\D1$", each)]
        return Pasted(lines=(option_line(names["batch_size"], size, evidence.run.text), *parts_of_items))
    if code != "split_general":
        lines = options_of(code, evidence.run.text)
        if not lines and code == "less_at_once" and program is None:
            lines = search_of(evidence.run.text)
        return Pasted(lines=lines) if lines else None
    if program is None and "batch_size" not in names:
        return _without_number(evidence.run.text)
    if not (program is None or is_of_script) or size is None or "batch_size" not in names:
        return None
    lines = (option_line(names["batch_size"], size, evidence.run.text),)
    if "accumulation" in names and passes:
        lines = (*lines, option_line(names["accumulation"], passes, evidence.run.text))
    return Pasted(lines=lines)


_ALL_AT_ONCE = re.compile(r"(?<![\w.])batch_size ?= ?None\b")


def _without_number(text: str) -> Pasted | None:
    """Return the words for a batch that the report names without its size: all data at once, or an option's name."""
    if _ALL_AT_ONCE.search(text):
        return Pasted(lines=("batch_size=1024  # a number instead of None, which takes all data at once",))
    lines = attributes_of("split_general", text)
    return Pasted(lines=lines) if lines else None


def _is_of_command(code: str, evidence: Evidence) -> bool:
    """Return True if the user's command has an option for the batch, which comes before a library's."""
    return code == "split_general" and evidence.run.names.get("batch_size", "").startswith("-")


_IN_PARTS = frozenset({"split_general", "checkpointing_general", "half_precision", "offload"})
"""Remedies whose own words in a program say more than a printed option with another value."""
_BY_SCRIPTS = frozenset({"checkpointing_general", "half_precision", "shorter_length", "smaller_picture", "eval_batch"})
"""Remedies whose options a script takes itself, where it stands on a library."""


def option_line(name: str, value: int, text: str) -> str:
    """Return an option with a new value, as the report writes it: --batch 4, batch: 4 or batch = 4."""
    if name.startswith("-"):
        return f"{name} {value}"
    sign = re.search(rf"{re.escape(name)}( ?[:=] ?)\d", text)
    return f"{name}{sign[1] if sign else ' = '}{value}"
