"""A fix in words: its lines as the user's program and version take them, with the run's numbers."""

import functools
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import COMPUTED
from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.filled_lines import accumulation, divided, own_option, values_to_fill
from tightfit.diagnosis.framework_words import Pasted, has_own, pasted, programs
from tightfit.diagnosis.named_card import NOT_CUDA, is_before_ampere
from tightfit.diagnosis.remedies import UNCHECKED, Remedy, Resized
from tightfit.diagnosis.report_words import inputs_of, shows
from tightfit.oomlog.facts import Facts
from tightfit.tables import read_table
from tightfit.units import GIB

_BEFORE_INFERENCE_MODE = ("T0", "T1", "T2")
"""Messages of PyTorch up to 1.10, the older of which have no_grad alone; or of a later one, cut at its end."""


@functools.cache
def fix_tables() -> dict[str, dict[str, str | list[str]]]:
    """Return the tables of advice.toml."""
    return read_table("tightfit.diagnosis", "advice.toml", dict[str, dict[str, str | list[str]]])


def applicability(code: str) -> str:
    """Return exact, changes_result, needs_hardware or to_be_checked."""
    return str(fix_tables()["applicability"].get(code, "to_be_checked"))


def words_of(code: str, evidence: Evidence) -> Pasted | None:
    """Return a remedy's lines as the user's own option, or in the program's words; None where neither is known."""
    parts = divided(evidence)
    run = evidence.run
    return own_option(code, evidence, parts) or pasted(code, run.frameworks, values_to_fill(evidence, parts), run.text)


def is_own_option(code: str, evidence: Evidence) -> bool:
    """Return True if the report prints an option that a remedy is about."""
    return own_option(code, evidence, divided(evidence)) is not None


_ACROSS_BATCH = ("batch_norm", "pairs_in_batch")
"""Subjects of reports of models whose samples of a batch depend on each other."""


def fix(code: str, facts: Facts, evidence: Evidence) -> Remedy:
    """Return a remedy in the words for this run."""
    if code == "smaller_picture" and _makes_videos(evidence):
        code = "fewer_frames"
    words = _reworded(code, words_of(code, evidence), facts, evidence)
    effect = applicability(code)
    if effect == "needs_hardware" and (evidence.run.numbers.get("world_size", 1) > 1 or facts.device_index):
        effect = "exact"  # the run has several cards
    if code == "split_general" and any(shows(evidence.run.text, f"subject.{each}") for each in _ACROSS_BATCH):
        effect = "changes_result"
    inputs = inputs_of(evidence) if code == "smaller_inputs" else code
    named = inputs if not words or inputs == "shorter_audio" else code
    named = "windows_to_host" if code == "outputs_to_host" and evidence.grows == "windows" else named
    remedy = Remedy(
        code=named,
        verdict=UNCHECKED,
        reason=_reason(code, named, facts, evidence),
        label=COMPUTED,
        exact={"exact": True, "changes_result": False}.get(effect),
        applicability=effect,
        paste=words.lines if words else (),
        page=words.page if words else "",
    )
    return _divided_batch(remedy, evidence) if code == "split_general" else remedy


def _reason(code: str, named: str, facts: Facts, evidence: Evidence) -> str:
    """Return the key of the sentence on a remedy; accumulation is of a training only."""
    if code == "less_at_once" and (evidence.infers or facts.phase in ("sample", "eval")):
        return "less_at_once_in_use"
    return named if named in ("fewer_atoms", "shorter_protein", "windows_to_host") else code


def _makes_videos(evidence: Evidence) -> bool:
    """Return True for a program that draws videos, too, in a report about one."""
    return has_own("fewer_frames", evidence.framework or "") and shows(evidence.run.text, "inputs.fewer_frames")


def _divided_batch(remedy: Remedy, evidence: Evidence) -> Remedy:
    """Return the fix of a divided batch with the printed numbers, or as a smaller batch where nothing accumulates."""
    if evidence.framework in programs("without_accumulation"):
        code = "smaller_batch"
        return replace(remedy, code=code, reason=code, exact=False, applicability=applicability(code))
    batch, size, passes = divided(evidence)
    if not (batch and size and passes):
        return remedy
    before = accumulation(evidence)
    change = Resized(size=size, passes=passes, batch=batch, accumulation=before or 1, parts=batch // size)
    return replace(remedy, code="split_logged" if before else "split_in_parts", reason="split_general", change=change)


def of_one_sequence(fix: Remedy, evidence: Evidence) -> Remedy:
    """Return the fix of a smaller batch with one sequence a pass."""
    assert isinstance(fix.change, Resized)
    batch, parts = fix.change.batch, (fix.change.batch, 1, fix.change.batch * fix.change.accumulation)
    words = own_option("split_general", evidence, parts) or pasted(
        "split_general", evidence.run.frameworks, values_to_fill(evidence, parts), evidence.run.text
    )
    change = replace(fix.change, size=1, passes=batch * fix.change.accumulation, parts=batch)
    return replace(fix, change=change, paste=words.lines if words else ())


def _reworded(code: str, words: Pasted | None, facts: Facts, evidence: Evidence) -> Pasted | None:
    """Return a remedy's lines as this run's device, version and way of configuring take them."""
    if code == "half_precision" and facts.kind in NOT_CUDA:
        words = _autocast(facts.kind.partition("_")[0])
    if code == "outputs_to_host" and any("torchmetrics" in each.file for each in facts.frames):
        words = _OF_METRICS
    if code == "no_gradients" and words is not None and shows(evidence.run.text, "subject.lacks_no_grad"):
        words = replace(words, lines=tuple(line.replace("inference_mode", "no_grad") for line in words.lines))
    if code == "save_sharded" and any("deepspeed/runtime/zero" in each.file for each in facts.frames):
        words = _OF_ZERO_3
    if code in _OF_FSDP_2 and _FSDP_2.search(evidence.run.text):
        words = _OF_FSDP_2[code]
    if code == "save_from_host" and any("_optim_utils" in each.file for each in facts.frames):
        words = _OF_OPTIMIZER_STATE
    if words is None:
        return None
    words = _for_version(words, facts)
    if code == "split_general" and _OF_BATCH_FILE.search(evidence.run.text) and words.lines:
        words = replace(words, lines=(*words.lines, *_of_batch_file(words, evidence)))
    for change in _CHANGES:
        if (not change.codes or code in change.codes) and change.applies(evidence):
            words = replace(words, lines=tuple(change.line(each, facts, evidence) for each in words.lines))
    return words


_OF_BATCH_FILE = re.compile(r'"train_micro_batch_size_per_gpu" ?: ?[1-9]')
"""DeepSpeed's configuration with a number for the batch, which has to be that of the trainer."""


def _of_batch_file(words: Pasted, evidence: Evidence) -> tuple[str, ...]:
    """Return the lines for DeepSpeed's own file; none if the words are about it already."""
    _, size, passes = divided(evidence)
    if not (size and passes) or any("train_micro_batch" in line for line in words.lines):
        return ()
    before = accumulation(evidence) or 1
    numbers = f'"train_micro_batch_size_per_gpu": {size}, "gradient_accumulation_steps": {passes}'
    return (f"{numbers}  # in DeepSpeed's file",) if before else ()


_OF_METRICS = Pasted(
    lines=("metric = BinaryAUROC(thresholds=200)  # bins instead of all predictions, or compute_on_cpu=True",),
    page="https://lightning.ai/docs/torchmetrics/stable/pages/overview.html",
)
_OF_ZERO_3 = Pasted(
    lines=(
        '"stage3_gather_16bit_weights_on_model_save": false',
        "python zero_to_fp32.py CHECKPOINT_DIR OUTPUT_DIR  # afterwards, on the host",
    ),
    page="https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training",
)
_FSDP_2 = re.compile(r"\bfsdp_version\W{1,4}2\b")
"""Accelerate's key for the newer FSDP, which has no `set_state_dict_type`."""
_OF_FSDP_2 = {
    "save_from_host": Pasted(
        lines=(
            "state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))",
        ),
        page="https://docs.pytorch.org/docs/stable/distributed.checkpoint.html",
    ),
    "save_sharded": Pasted(
        lines=(
            "accelerator.save_state(CHECKPOINT_DIR)  # with fsdp_state_dict_type: SHARDED_STATE_DICT",
            "accelerate merge-weights CHECKPOINT_DIR/pytorch_model_fsdp_0 OUTPUT_DIR  # afterwards, on the host",
        ),
        page="https://huggingface.co/docs/accelerate/usage_guides/fsdp",
    ),
}
_OF_OPTIMIZER_STATE = Pasted(
    lines=(
        "FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT,",
        "    FullStateDictConfig(offload_to_cpu=True, rank0_only=True),",
        "    FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=True))",
    ),
    page="https://docs.pytorch.org/docs/stable/fsdp.html",
)


def _autocast(device: str) -> Pasted:
    """Return the line that turns half precision on for a device other than CUDA's."""
    dtype = "float16" if device == "mps" else "bfloat16"
    page = "https://docs.pytorch.org/docs/stable/amp.html"
    return Pasted(lines=(f"with torch.autocast('{device}', dtype=torch.{dtype}):",), page=page)


_NEWER_WORDS = (
    (", use_reentrant=False", ""),
    ("torch.autocast('cuda', dtype=torch.bfloat16):", "torch.cuda.amp.autocast():  # PyTorch 1.6 or later"),
    ("inference_mode", "no_grad"),
    ("model.to(torch.bfloat16)", "model.half()"),
)
"""Words that PyTorch up to 1.9 does not have, and those that all versions take."""
_PAGES = {"inference_mode": "no_grad"}


def _for_version(words: Pasted, facts: Facts) -> Pasted:
    """Return the lines as the PyTorch of the message takes them."""
    if facts.torch_format not in _BEFORE_INFERENCE_MODE:
        return words
    lines, page = words.lines, words.page
    for newer, older in _NEWER_WORDS:
        lines = tuple(line.replace(newer, older) for line in lines)
    for newer, older in _PAGES.items():
        page = page.replace(f"autograd.grad_mode.{newer}", older)
    return Pasted(lines=lines, page=page)


_KEY = re.compile(r"^([a-z]\w*): ([\w*/.-]+)$")
"""A key with a plain value in YAML."""
_SHARE = re.compile(r"(?<=[ =])0?\.\d{1,2}\b")
_OF_CONTEXT, _SPARE = GIB // 2, 0.03
"""Bytes of a process's context on the card, and the share of it that is left free."""


def _beside_others(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with the share of the card that other programs leave, as an argument where the user has Python."""
    others = facts.others_bytes or max((facts.not_reserved_bytes or 0) - _OF_CONTEXT, 0)
    printed = _SHARE.search(line)
    if printed and others and facts.total_bytes:
        share = math.floor(10 * (1 - others / facts.total_bytes - _SPARE)) / 10
        if 0 < share < float(printed[0]):
            line = f"{line[: printed.start()]}{share:g}{line[printed.end() :]}"
    text = evidence.run.text
    if not line.startswith("--gpu-memory-utilization") or not shows(text, "switches.vllm_in_python"):
        return line
    is_shell = shows(text, "switches.vllm_in_shell")
    return line if is_shell else f"LLM(..., gpu_memory_utilization={line.rpartition(' ')[2]})"


_OLD_TORCH = ("T0", "T1", "T2", "T3")
"""Messages of PyTorch up to 2.0, which has no 8-bit floating point numbers."""
_TRANSFORMERS = re.compile(r"(?i:\btransformers\W{0,4}(?:version)?\W{0,4})v?(\d)\.(\d{1,2})\.\d")
_FIRST_WITH = {
    "attn_implementation": (4, 36),
    "eval_accumulation_steps": (3, 4),
    "preprocess_logits_for_metrics": (4, 17),
    "predict_with_generate": (3, 4),
    "adamw_bnb_8bit": (4, 20),
    "load_in_4bit": (4, 30),
    "use_liger_kernel": (4, 45),
}
"""Arguments of Transformers, and the first version that takes them."""
_OLD_PYTHON = re.compile(r"[/\\]lib[/\\]python3\.[5-7][/\\]")
"""A Python whose last Transformers is 4.30."""


def _with_its_version(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with the version that it needs, if the report shows an older one."""
    if "--fp8_base" in line and facts.torch_format in _OLD_TORCH:
        return f"{line}  # PyTorch 2.1 or later"
    named = next((name for name in _FIRST_WITH if name in line), None)
    if named is None:
        return line
    printed, first = _TRANSFORMERS.search(evidence.run.text), _FIRST_WITH[named]
    older = printed is not None and (int(printed[1]), int(printed[2])) < first
    if older or (printed is None and _OLD_PYTHON.search(evidence.run.text)):
        return f"{line}  # Transformers {first[0]}.{first[1]} or later"
    return line


_WITHOUT_BF16 = (
    ("autocast('cuda', dtype=torch.bfloat16):", "autocast('cuda', dtype=torch.float16):  # in training: GradScaler"),
    ("bf16=True  # fp16=True before Ampere", "fp16=True"),
    ("torch.bfloat16", "torch.float16"),
    ("mixed_precision=bf16", "mixed_precision=fp16"),
    ("mixed_precision bf16", "mixed_precision fp16"),
    ('"bf16"', '"fp16"'),
    ("bf16: true", "fp16: true"),
    ("bf16-", "16-"),
    ("--quantization fp8", "--quantization bitsandbytes"),
)
"""Words for numbers that cards before Ampere do not have, and what they take instead."""


def _before_ampere(line: str) -> str:
    for newer, older in _WITHOUT_BF16:
        line = line.replace(newer, older)
    return line


_SMALL_CARD = 5 * GIB


def _for_small_card(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with the stronger switch of a program, for a card of 4 GB or a run that has the weaker one."""
    is_small = facts.total_bytes is not None and facts.total_bytes < _SMALL_CARD
    return line.replace("--medvram", "--lowvram") if is_small or "--medvram" in evidence.run.text else line


def _of_sdxl(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with sd-scripts' script for SDXL, where the report shows that model."""
    return line.replace(" train_network.py", " sdxl_train_network.py") if "sdxl" in evidence.run.text.lower() else line


_ARGUMENT = re.compile(r"^([a-z]\w*)=(\"?[\w./*-]+\"?)(?=\s|$)")
"""An argument in Python with a plain value."""


def _as_option(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a trainer's argument as an option of the command that the report shows, under the name that it has."""
    line = _ARGUMENT.sub(lambda found: f"--{found[1]} {found[2].strip(chr(34))}", line)
    line = line.replace("# fp16=True", "# --fp16 True")
    is_old = "per_device_train_batch_size" not in evidence.run.text and "--train_batch_size" in evidence.run.text
    return line.replace("--per_device_train_batch_size", "--train_batch_size") if is_old else line


class _Change(NamedTuple):
    """A change of a remedy's lines that some runs need."""

    codes: tuple[str, ...]
    """Remedies that it is for; empty is all."""
    applies: Callable[[Evidence], bool]
    line: Callable[[str, Facts, Evidence], str]
    """Returns a line, changed."""


_OF_CARDS = "  # or max_memory, with less for card 0"
_BATCH_BY_NUMBER = "4  # a number instead of -1, which a short test chooses"
_CHANGES = (
    _Change(
        ("shard", "offload"),
        lambda evidence: shows(evidence.run.text, "versions.old_deepspeed"),
        lambda line, facts, evidence: f"{line}  # DeepSpeed 0.3.13 or later",
    ),
    _Change(
        (),
        lambda evidence: (
            evidence.framework in programs("options_in_files") and shows(evidence.run.text, "switches.by_options")
        ),
        lambda line, facts, evidence: _KEY.sub(r"--\1 \2", line),
    ),
    _Change(
        ("split_general",),
        lambda evidence: shows(evidence.run.text, "switches.batch_measured"),
        lambda line, facts, evidence: line.replace(f"BATCH/{evidence.passes}", _BATCH_BY_NUMBER),
    ),
    _Change((), lambda evidence: shows(evidence.run.text, "switches.trainer_by_options"), _as_option),
    _Change((), lambda evidence: True, _with_its_version),
    _Change(
        ("spread_model",),
        lambda evidence: shows(evidence.run.text, "subject.device_map_auto"),
        lambda line, facts, evidence: line.replace('"auto"', '"balanced_low_0"') + _OF_CARDS,
    ),
    _Change(
        ("outputs_reduced",),
        lambda evidence: shows(evidence.run.text, "subject.tuple_outputs"),
        lambda line, facts, evidence: line.replace("logits.argmax", "logits[0].argmax"),
    ),
    _Change(("offload",), lambda evidence: True, _for_small_card),
    _Change(("lora",), lambda evidence: evidence.framework == "kohya", _of_sdxl),
    _Change(
        ("half_precision", "smaller_weights", "qlora", "quantized_weights"),
        lambda evidence: is_before_ampere(evidence.run.text),
        lambda line, facts, evidence: _before_ampere(line),
    ),
    _Change(("share_of_card",), lambda evidence: True, _beside_others),
)
