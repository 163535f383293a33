"""The remedies for a failure that was not played: those that cure this case first, in the user's own words."""

import functools
import math
import re
from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import COMPUTED, LIKELY, MEASURED
from tightfit.diagnosis.evidence import Evidence, named_bytes, weights_leave_room
from tightfit.diagnosis.failing_line import feeds_back
from tightfit.diagnosis.figure_causes import (
    cache_is_large,
    fills_by_metal,
    fixes_of_figures,
    is_filled_by_library,
    is_of_one_block,
    is_oversized,
)
from tightfit.diagnosis.filled_lines import accumulation, divided, own_option, values_to_fill
from tightfit.diagnosis.framework_words import Pasted, frameworks, has_own, pasted, programs
from tightfit.diagnosis.measures import tried_in
from tightfit.diagnosis.model_budget import trains_all
from tightfit.diagnosis.own_options import options_of
from tightfit.diagnosis.own_place import placed
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.remedies import (
    DOES_NOT_FIT,
    NO_EFFECT,
    OTHERS_DO,
    UNCHECKED,
    WITH_SPLIT_SIZE,
    Remedy,
    Resized,
    close_others,
    empty_cache,
    expandable_segments,
    max_split_size,
    ranked,
    to_paste,
)
from tightfit.diagnosis.report_words import IN_WORDS, hears, in_own_words_first, inputs_of, is_in_words
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room, ownership
from tightfit.oomlog.run_facts import PrintedShape, RunFacts
from tightfit.tables import read_table
from tightfit.units import GIB

_BEFORE_AUTOCAST = ("T0", "T1")
"""Messages of PyTorch up to 1.3, which has neither autocast nor PEFT's adapters."""
_BEFORE_INFERENCE_MODE = ("T0", "T1", "T2")
"""Messages of PyTorch up to 1.10, the older of which have no_grad alone; or of a later one, cut at its end."""
_NOT_CUDA = ("mps_out_of_memory", "xpu_out_of_memory", "npu_out_of_memory")
_ON_CUDA_ONLY = frozenset({"optimizer_8bit", "shard", "offload", "quantized_weights", "qlora"})
"""Remedies that stand on libraries for CUDA."""
_ON_NPU = frozenset({"shard", "offload"})
"""Those of them that DeepSpeed and FSDP have on Ascend NPUs, too."""
_SHOWN_CURES = 4
_OWN_CAUSES = frozenset({"loading", "saving", "outputs"})
"""Quantities whose own cure comes before any other program's memory: it makes the request unnecessary."""
_OWN_LISTS = ("optimizer_temporary", "gathered_parameters")
"""Kinds of tensors with fixes of their own."""


@functools.cache
def _tables() -> dict[str, dict[str, str | list[str]]]:
    return read_table("tightfit.diagnosis", "advice.toml", dict[str, dict[str, str | list[str]]])


def applicability(code: str) -> str:
    """Return exact, changes_result, needs_hardware or to_be_checked."""
    return str(_tables()["applicability"].get(code, "to_be_checked"))


def advice(facts: Facts, evidence: Evidence) -> tuple[Remedy, ...]:
    """Return the remedies, those that cure this case first; a measured verdict that one does not help is kept."""
    cures = [_remedy(code, facts, evidence) for code in _codes(facts, evidence)]
    cures = in_own_words_first(cures, evidence)
    if evidence.framework is None:
        cures = [placed(each, facts.frames) for each in cures]
    if evidence.framework in programs("without_torch"):
        return ranked(cures)
    others, segments = close_others(facts), _segments(facts, evidence)
    first = [
        *_other_device(facts, evidence),
        *fixes_of_figures(facts),
        *(each for each in cures if each.code == "kept_graph"),
    ]
    cures = [each for each in cures if each.code != "kept_graph"]
    if is_of_one_block(facts):
        first, cures = [_remedy("xpu_relaxed_limit", facts, evidence), *first], cures[:2]
    elif had_room(facts) and facts.allowed_bytes is None:  # the size of a tensor is not the cause
        first = [] if evidence.framework in programs("applications") else first
        windows = facts.kind in _WITH_PAGING and evidence.is_maybe_on_windows
        paging = [_remedy("windows_paging", facts, evidence)] if windows else []
        is_sure = not evidence.run.signs.isdisjoint({"windows", "wsl"})
        first = paging if _OF_HOST.search(evidence.run.text) else [*paging, *first] if is_sure else [*first, *paging]
        less = [each for each in cures if each.code in _LESS_OF_ALL and each.paste]
        cures = [_remedy("watched_card", facts, evidence), *less[:2]]
    if others.reason in OTHERS_DO and not any(each.code == "set_device" for each in first):
        # A small estimate may be all this process's own libraries.
        decides = others.label == MEASURED or ownership(facts).decides
        comes_first = decides and evidence.grows not in _OWN_CAUSES and not _are_few(others, facts)
        first, cures = (
            ([*first, others], cures)
            if comes_first
            else (first, [*cures[:_SHOWN_CURES], others, *cures[_SHOWN_CURES:]])
        )
    last = [others] if others.verdict in (DOES_NOT_FIT, NO_EFFECT) else []
    may_be_pieces = not {"more_free_than_requested", "spills_to_host"} & set(facts.notes)
    if segments.code in tried_in(evidence.run.text):
        cures.append(segments)
    elif may_be_pieces and segments.reason in ("cache_might_do", "cache_needs_newer"):
        is_cause = cache_is_large(facts) and evidence.grows not in _OWN_CAUSES
        is_too_large = evidence.grows == "model" and not is_cause  # the next weights of the model need more still
        cures.insert(0 if is_cause else len(cures) if is_too_large else min(len(cures), _SHOWN_CURES), segments)
    elif may_be_pieces and segments.verdict == DOES_NOT_FIT:
        last.insert(0, segments)
    if facts.kind == "mps_out_of_memory":
        return ranked([*first, *cures[:_BEFORE_WATERMARK], _watermark(), *cures[_BEFORE_WATERMARK:]])
    return ranked([*first, *cures, *last, *([] if facts.kind in _NOT_CUDA else [empty_cache(facts)])])


def _other_device(facts: Facts, evidence: Evidence) -> Iterator[Remedy]:
    """Yield the remedy of a run on a card that is much smaller than those that the report names."""
    if named_bytes(facts, evidence) is not None:
        yield Remedy(
            code="other_device", verdict=UNCHECKED, reason="other_device", label=LIKELY, paste=to_paste("other_device")
        )
    if weights_leave_room(facts, evidence):
        yield Remedy(
            code="card_in_use", verdict=UNCHECKED, reason="card_in_use", label=LIKELY, paste=to_paste("close_others")
        )


_LESS_OF_ALL = frozenset({"less_at_once", "split_in_parts", "split_logged", "smaller_batch", "smaller_model"})
"""Remedies that lessen what the program needs of the card and of what backs it, whatever refused the request."""
_FEW = 0.05
"""Share of the card up to which other programs are a desktop, and no fix comes from ending them first."""


def _are_few(others: Remedy, facts: Facts) -> bool:
    """Return True if other programs hold so little that a run that needs it has hardly a chance without them."""
    held = others.figures.others_bytes or 0
    return 0 < held < _FEW * (facts.total_bytes or 0)


_IN_ANY_LANGUAGE = frozenset({"less_at_once", "smaller_inputs", "smaller_model", "shapes_first"})
"""Remedies without a line of Python."""
_BEFORE_WATERMARK = 2
"""Fixes on a Mac that come before its limit is lifted, which may freeze it."""
_WITH_PAGING = ("cuda_out_of_memory", "hip_out_of_memory", "device_out_of_memory")


def _segments(facts: Facts, evidence: Evidence) -> Remedy:
    """Return the allocator's setting that the user's PyTorch has: Windows, and versions up to 2.0, know only one."""
    found, on_windows = expandable_segments(facts), "windows" in evidence.run.signs
    if found.reason == "cache_needs_newer" and on_windows:  # expandable segments are not for Windows
        return replace(found, reason="unstated")
    if found.reason == "cache_might_do" and (on_windows or facts.torch_format == WITH_SPLIT_SIZE):
        return max_split_size(found)
    return found


def _watermark() -> Remedy:
    """Return the remedy that lifts PyTorch's own limit on a Mac."""
    return Remedy(
        code="mps_watermark", verdict=UNCHECKED, reason="mps_watermark", label=LIKELY, paste=to_paste("mps_watermark")
    )


def _codes(facts: Facts, evidence: Evidence) -> list[str]:
    """Return the codes of remedies that this run can take, the surest first."""
    codes = [code for cause in _lists(facts, evidence) for code in _tables()["fixes"][cause]]
    if facts.phase == "eval" and evidence.framework in frameworks():  # the program's own options come first
        codes.sort(key=lambda code: not has_own(code, evidence.framework or ""))
    if "not_python" in evidence.run.signs and not any(each.file.endswith(".py") for each in facts.frames):
        codes = [code for code in codes if code in _IN_ANY_LANGUAGE]
    would_do = not is_oversized(facts) or _batch_would_do(facts, evidence)
    if evidence.infers and would_do and evidence.run.numbers.get("batch_size", 1) > 1 and "less_at_once" in codes:
        codes = ["less_at_once", *codes]  # the report prints a batch that may be smaller
    if evidence.infers and evidence.framework is None:  # a program of another's has one model, and keeps no gradients
        codes.sort(key=lambda code: code in _RARELY_ONES_OWN)
    if is_filled_by_library(facts):
        codes = ["fewer_environments", *codes]
        codes = codes if _applies(codes[0], facts, evidence, {}) else ["other_library", *codes]
    if "growing" in evidence.run.signs or feeds_back(facts.frames):
        codes = ["kept_graph", *codes]
    needless = _needless_for_pass(facts, evidence) | _needless_for_model(facts, evidence)
    applied = [code for code in dict.fromkeys(codes) if _applies(code, facts, evidence, needless)]
    adapters = [each for each in applied if each in ("lora", "qlora")]
    if adapters == ["qlora", "lora"] and _fits_unquantized(evidence):
        applied = [{"lora": "qlora", "qlora": "lora"}.get(code, code) for code in applied]
    return applied


_MOST_OF_WEIGHTS = 0.4
"""Share of the card that weights in 16 bits may take, for adapters to be trained beside them without quantising."""


def _fits_unquantized(evidence: Evidence) -> bool:
    """Return True if the weights of the known model, in 16 bits, leave room on the card: LoRA does."""
    budget = evidence.budget
    return bool(budget and budget.total_bytes and 2 * budget.parameters < _MOST_OF_WEIGHTS * budget.total_bytes)


def _lists(facts: Facts, evidence: Evidence) -> Iterator[str]:
    """Yield the lists of advice.toml that fit this failure, the most fitting first."""
    budget, grows = evidence.budget, evidence.grows
    if fills_by_metal(facts):
        yield "metal"
        return
    if "loads_model" in evidence.run.signs and evidence.infers and grows is None:
        yield "model"
        return
    if budget is not None and budget.exceeds:
        yield "training" if budget.what == "training" or evidence.trains else "model"
    if budget is not None and budget.what == "partial":
        yield "partial"
    elif evidence.is_all_parameters:  # a smaller batch does not change it
        yield "training"
        return
    elif budget is not None and budget.what == "training" and not budget.exceeds and not evidence.batch_is_one:
        nearly = "if_all" if budget.exceeds_if_all else "nearly_full"
        yield from [nearly] if budget.may_exceed or budget.total_bytes is None else []
    elif budget is not None and budget.what == "training" and not budget.exceeds and budget.total_bytes is None:
        yield from ["if_all"] if evidence.framework is None else []
    trains = evidence.trains or (budget is not None and budget.what == "training")
    if is_oversized(facts):
        yield from [grows] if grows in _OVERSIZED else []
        yield "oversized_weight" if grows == "model" else "oversized"
        return
    if evidence.gathers_on_first_card(facts):
        yield "cards"
    if evidence.infers and facts.phase in (None, "forward") and grows is None:
        yield "sample"
        return
    if evidence.tensor in _OWN_LISTS:
        yield evidence.tensor
        if evidence.tensor == "gathered_parameters":
            return
    if grows is None:
        yield from _lists_of_phase(facts, evidence, trains=trains)
        return
    if evidence.infers and grows in _OF_SEQUENCES_AT_ONCE and has_own("share_of_card", evidence.framework or ""):
        yield "warmup"
    yield _of_weights(facts, evidence, trains=trains) if grows == "model" else _of_growing(grows, evidence)
    yield from ["eval"] if facts.phase == "eval" else []


_OF_SEQUENCES_AT_ONCE = frozenset({"logits", "batch", "attention", "mask"})
"""Quantities that a server holds for as many sequences as it takes at once, beside its cache."""


def _of_growing(grows: str, evidence: Evidence) -> str:
    """Return the list for what grows, for optimizer state that is divided among cards one of its own."""
    is_divided = grows == "state" and not evidence.run.signs.isdisjoint({"deepspeed", "fsdp"})
    return "state_divided" if is_divided else grows


def _of_weights(facts: Facts, evidence: Evidence, *, trains: bool) -> str:
    """Return the list for a tensor that grows with the model."""
    if facts.phase == "save":
        return "save"
    if trains or (evidence.framework is None and evidence.purpose == TRAINING):
        return "weights_to_train" if facts.phase in ("load", "setup") else "training"
    return "model"


def _lists_of_phase(facts: Facts, evidence: Evidence, *, trains: bool) -> Iterator[str]:
    """Yield the lists for a failure of which the phase alone is known."""
    if facts.phase == "eval" and evidence.framework in programs("share_batch"):
        yield "shared_batch"
    if facts.phase in _tables()["fixes"]:
        yield str(facts.phase)
    if facts.phase == "setup" and not evidence.run.signs.isdisjoint({"fsdp", "deepspeed"}) and not evidence.infers:
        yield "training"
        return  # before any pass
    if facts.phase == "save":  # what one pass holds is gone by then
        return
    if facts.phase == "load":
        yield "weights_to_train" if trains or evidence.purpose == TRAINING else "model"
    if evidence.batch_is_one and evidence.framework in programs("trainers_of_one"):
        yield "of_one"
    if evidence.batch_is_one and evidence.framework in programs("trainers") and not evidence.infers:
        adapts = bool(evidence.run.signs & {"lora", "qlora"})
        yield "of_one_adapter" if adapts else "of_one_full" if trains_all(evidence.run) else "of_one_text"
    if facts.phase in (None, "forward", "loss", "backward", "compile", "setup", "optimizer"):
        yield from ["undivided"] if evidence.run.numbers.get("zero_stage") in (1, 2) and not evidence.infers else []
        yield "unknown_purpose" if evidence.is_of_unknown_purpose else "unknown"


_RARELY_ONES_OWN = ("smaller_model", "no_gradients")
"""Remedies that a program for the use of a trained model mostly has no room for."""
_OF_PICTURES = ("smaller_picture", "vae_in_tiles", "quantized_weights")
"""Remedies that ComfyUI has for models of pictures."""
_OVERSIZED = frozenset({"logits", "attention", "mask", "pairs", "outputs"})
"""Quantities that a tensor larger than the card may well grow with."""


def _applies(code: str, facts: Facts, evidence: Evidence, needless: Mapping[str, bool]) -> bool:
    """Return True if this run can take a remedy: it does not have it already, and its program has words for it."""
    program = evidence.framework
    if needless.get(code, False):
        return False
    if hears(evidence) and code in ("smaller_inputs", *_OF_PICTURES):
        return code == "smaller_inputs"
    if code == "smaller_inputs" and program in programs("texts"):
        return has_own(code, program or "")
    if code == "smaller_inputs" and any(is_in_words(each, evidence) for each in IN_WORDS):
        return bool(options_of(code, evidence.run.text))
    if code == "smaller_inputs":
        return not any(_applies(each, facts, evidence, needless) for each in ("shorter_length", "smaller_picture"))
    if code == "shorter_length" and program in programs("pictures"):
        return has_own(code, program or "")
    if facts.kind in _NOT_CUDA and code in _ON_CUDA_ONLY - (
        _ON_NPU if facts.kind == "npu_out_of_memory" else frozenset()
    ):
        return False
    if is_in_words(code, evidence):
        return True
    needs_words = code in _tables()["needs_words"]["codes"] or program in programs("applications")
    needs_words = needs_words or (program in programs("without_torch") and code not in _IN_ANY_LANGUAGE)
    return not needs_words or _words(code, evidence) is not None


def _words(code: str, evidence: Evidence) -> Pasted | None:
    parts = divided(evidence)
    return own_option(code, evidence, parts) or pasted(code, evidence.run.frameworks, values_to_fill(evidence, parts))


def _needless_for_pass(facts: Facts, evidence: Evidence) -> dict[str, bool]:
    """Return for each remedy of what one pass holds True where it is done already, or cannot help."""
    run, keeps_nothing, program = evidence.run, _keeps_nothing(facts, evidence), evidence.framework
    is_known = program not in (None, "nanogpt")
    return {
        "vae_in_tiles": program in ("comfyui", "diffusers", "diffusers_pipeline") and not _shows_vae(facts, run),
        "split_general": evidence.has_no_smaller_batch
        or (facts.phase == "eval" and _EVAL_BATCH.search(run.text) is not None)
        or program in programs("without_batch")
        or (keeps_nothing and (is_known or evidence.infers) and program not in programs("share_batch"))
        or (is_oversized(facts) and not _batch_would_do(facts, evidence))
        or evidence.is_of_unknown_purpose
        or (evidence.grows == "pairs" and not is_known and not run.numbers.get("batch_size")),
        "less_at_once": _is_of_use_only(facts, evidence) or _has_one_pass(evidence) or _slides(facts, evidence),
        "checkpointing_general": keeps_nothing
        or "checkpointing" in run.signs
        or (program in programs("checkpoint_always") and not _RECOMPUTES_NOT.search(run.text))
        or _encodes_pictures(facts, program)
        or evidence.is_of_unknown_purpose,
        "fused_kernel": evidence.line is None or evidence.line.tensor != "attention_output",
        "fused_attention": "flash" in run.signs
        or (evidence.line is not None and evidence.line.tensor == "attention_output")
        or (_keeps_little(facts, evidence) and not is_oversized(facts))
        or evidence.grows == "pairs"
        or (is_oversized(facts) and evidence.grows != "attention" and not _may_attend(evidence)),
        "eval_batch": program in programs("evaluate_one"),
        "no_gradients": "no_grad" in run.signs
        or _is_foreign(facts, evidence)
        or not (evidence.infers or evidence.is_of_unknown_purpose or facts.phase in ("eval", "sample")),
        "shorter_length": evidence.infers
        and facts.phase in (None, "forward", "sample")
        and has_own("less_at_once", program or ""),
        "chunked_general": program in ("unsloth", "grpo"),  # its own loss is in chunks
        "half_precision": "half" in run.signs
        or (evidence.is_of_unknown_purpose and program == "sentence_transformers")
        or (facts.torch_format in _BEFORE_AUTOCAST and not has_own("half_precision", program or ""))
        or _is_half(evidence.shape)
        or any(word in run.texts.get("dtype", "") for word in ("bf16", "fp16", "float16", "16-")),
        "pairs_in_parts": evidence.grows != "pairs" or has_own("pairs_on_host", program or ""),
        "release_logits": not any(each.function == "estimate_loss" for each in facts.frames),
    }


def _slides(facts: Facts, evidence: Evidence) -> bool:
    """Return True if the traceback shows that a picture is looked at in parts, as the program's words would have it."""
    words = _words("less_at_once", evidence)
    is_slid = any(each.function.rpartition(".")[2] == "slide_inference" for each in facts.frames)
    return is_slid and words is not None and any("'slide'" in line for line in words.lines)


_RECOMPUTES_NOT = re.compile(r"disable_gradient_checkpointing\W{1,4}[Tt]rue")
"""A switch that turns off what a program does by default."""


def _has_one_pass(evidence: Evidence) -> bool:
    """Return True where one pass cannot be made smaller, as far as its program and its batch tell."""
    run, program = evidence.run, evidence.framework
    has_parts = _has_parts(run, program)
    return (
        not (evidence.infers or evidence.is_of_unknown_purpose or has_parts)
        or (evidence.has_no_smaller_batch and not has_parts)
        or (program == "webui" and run.numbers.get("batch_size", 1) == 1)
    )


def _needless_for_model(facts: Facts, evidence: Evidence) -> dict[str, bool]:
    """Return for each remedy of weights and optimizer state True where it is done already, or cannot help."""
    run, program = evidence.run, evidence.framework
    is_too_large = evidence.budget is not None and evidence.budget.exceeds
    adapts_quantized = bool(run.signs & {"qlora", "four_bit"})
    rearranges = any("bitsandbytes" in each.file for each in facts.frames)  # each 8-bit weight, for the state dict
    return {
        "offload": _has_no_offload(facts, evidence)
        or (adapts_quantized and not evidence.infers)  # DeepSpeed's stage 3 takes no quantised weights
        or (evidence.trains and program == "unsloth")
        or not (_has_large_state(facts, evidence) or evidence.infers or has_own("offload", program or "")),
        "save_from_host": evidence.is_of_one_process,
        "save_sharded": evidence.is_of_one_process,
        "save_on_host": not evidence.is_of_one_process or bool(run.signs & {"lora", "qlora"}) or rearranges,
        "save_adapters": not run.signs & {"lora", "qlora"} or not evidence.is_of_one_process or rearranges,
        "built_divided": not any(each.function == "_configure_distributed_model" for each in facts.frames)
        or run.numbers.get("zero_stage") != 3,
        "no_reserve": not _RESERVES.search(run.text),
        "share_of_card": program in programs("with_servers") and not re.search(r"vllm|sglang", run.text, re.IGNORECASE),
        "fewer_pixels": not (_SEES.search(run.text) or options_of("fewer_pixels", run.text)),
        "lora": bool(run.signs & {"lora", "qlora"})
        or (evidence.budget is not None and evidence.budget.what == "partial")  # adapters, and whole layers beside them
        or _is_before("lora", facts, program),
        "text_encoder_first": "network" not in run.text and "LoRA" not in run.text,
        "shard_quantized": not adapts_quantized or evidence.infers or run.numbers.get("world_size") == 1,
        "fewer_trained": evidence.budget is None or evidence.budget.what != "partial",
        "qlora": adapts_quantized or _is_before("qlora", facts, program),
        "quantized_weights": bool(run.signs & {"qlora", "four_bit", "quantized_4"})
        or (evidence.trains and not has_own("quantized_weights", program or "")),
        "smaller_weights": bool(run.signs & {"qlora", "four_bit", "quantized_4", "quantized_8"})
        or ("half" in run.signs and evidence.infers)
        or ((_is_foreign(facts, evidence) or evidence.is_of_unknown_purpose) and not _is_full_of_its_own(facts)),
        "smaller_model": not (evidence.infers and (is_too_large or program is None))
        and not has_own("smaller_model", program or ""),
        "shard": run.numbers.get("zero_stage") == 3
        or "full_shard" in run.signs
        or adapts_quantized  # DeepSpeed's stage 3 takes no quantised weights
        or program == "unsloth"  # a library for one card
        or run.numbers.get("world_size") == 1
        or evidence.tensor == "gathered_parameters"
        or evidence.infers
        or (evidence.grows == "model" and program is None and not evidence.trains and evidence.purpose != TRAINING),
        "optimizer_foreach": not any("foreach" in f"{each.source} {each.function}" for each in facts.frames[-2:]),
        "optimizer_8bit": "8bit" in run.texts.get("optimizer", "").lower() or not _has_large_state(facts, evidence),
    }


def _is_before(code: str, facts: Facts, program: str | None) -> bool:
    """Return True for a PyTorch older than the library of a remedy, unless the program has words of its own for it."""
    return facts.torch_format in _BEFORE_AUTOCAST and not has_own(code, program or "")


_OF_SCORES = 2**29
"""Bytes from which on a request of a program that uses a trained model may well be of attention's scores."""


_EVAL_BATCH = re.compile(
    r"\b(?:eval|val|valid|validation|test)_?batch_?size\W{1,4}\d|\beval_batch\W{1,4}\d", re.IGNORECASE
)
"""An option for the batch of an evaluation alone: the training's batch does not change it."""
_RESERVES = re.compile(r"\btrain\.py\b[^\n]*\s(?:-o|--occupy)\b")
"""YOLOX's option to take the card's memory before the training."""
_SEES = re.compile(r"[Qq]wen\S{0,8}VL(?![A-Za-z])|[Qq]wen\S{0,8}[-_]vl|\bMAX_PIXELS\b|\bmax_pixels\b")
"""Models of language that see pictures of any size."""


def _keeps_little(facts: Facts, evidence: Evidence) -> bool:
    """Return True if a program uses a trained model, and nothing shows that attention's scores did not fit."""
    if not evidence.infers or evidence.grows is not None:
        return False
    is_large = (facts.requested_bytes or 0) >= _OF_SCORES
    return not (is_large and has_own("fused_attention", evidence.framework or ""))


def _has_large_state(facts: Facts, evidence: Evidence) -> bool:
    """Return True where the optimizer's state may be much of the memory: of language models, or by the failing line."""
    program = evidence.framework or ""
    shown = (
        facts.phase == "optimizer"
        or has_own("optimizer_8bit", program)
        or evidence.grows in ("state", "model")
        or evidence.budget is not None
    )
    return shown or evidence.trains or evidence.is_bare or program in programs("language_models")


_VAE = re.compile(r"VAE ?(?:De|En)code|\bvae\b|[Aa]uto_?[Ee]ncoder")


_OF_HOST = re.compile(r"[Mm]emory allocation failure|\bMemoryError\b|paging file|[Nn]ot enough memory resources")
"""Words for the host's memory in a log of a card that has room."""
_OF_SEQUENCES = re.compile(
    r"[Tt]ranscri|[Dd]iariz|\b[Ll]ong (?:audio|text|document|context|sequence)|\b(?:LLM|tokens?|prompt)\b|protein"
)
"""Words of programs whose attention grows with the square of a length."""


def _encodes_pictures(facts: Facts, program: str | None) -> bool:
    """Return True where a training of diffusers failed in its autoencoder, which keeps nothing for a backward pass."""
    return program == "diffusers" and any("autoencoder" in each.file for each in facts.frames)


def _is_foreign(facts: Facts, evidence: Evidence) -> bool:
    """Return True for an unknown program that uses a trained model, in a report without any line of its code."""
    uses = evidence.infers or evidence.is_of_unknown_purpose
    return uses and evidence.framework is None and not facts.frames and not _IS_CODE.search(evidence.run.text)


_OWN_SHARE, _SMALL_SHARE = 0.85, 0.02
"""Shares of a card: what a process holds if it nearly fills it, and a request that is small beside that."""


def _is_full_of_its_own(facts: Facts) -> bool:
    """Return True if tensors of this process nearly fill the card, and the request is small: weights, mostly."""
    total, held, requested = (facts.figures.get(f"{name}_bytes") for name in ("total", "allocated", "requested"))
    if total is None or held is None or requested is None:
        return False
    return held.bytes >= _OWN_SHARE * total.bytes and requested.bytes <= _SMALL_SHARE * total.bytes


_IS_CODE = re.compile(r"\bimport |\btorch\.(?!cuda\.OutOf|OutOf)\w+|\w+\(\w+\)|^\s{0,20}[\w.]+ = ", re.MULTILINE)
"""Signs of the user's own program in a report."""
_VAE_NODE = re.compile(r"(?:executing|Node Type:\W*)\s*VAE")


def _shows_vae(facts: Facts, run: RunFacts) -> bool:
    """Return True unless the log shows that another part than the VAE failed."""
    shown = " ".join(f"{each.file} {each.function} {each.source}" for each in facts.frames)
    return bool(_VAE.search(shown) or _VAE_NODE.search(run.text)) if shown else bool(_VAE.search(run.text))


_ROOM = 0.8
"""Share of the card that one sequence of a batch may take, for a smaller batch to be a fix of an oversized request."""


def _may_attend(evidence: Evidence) -> bool:
    """Return True unless the failing line shows another tensor than attention's scores."""
    return evidence.line is None and _attends(evidence)


def _attends(evidence: Evidence) -> bool:
    """Return True if the log is from the user's own program and shows that it works on sequences."""
    is_own = evidence.framework not in programs("applications")
    return is_own and _OF_SEQUENCES.search(evidence.run.text) is not None


def _has_parts(run: RunFacts, program: str | None) -> bool:
    """Return True if a program works on parts of a batch: by its words, or by an option that the report prints."""
    return has_own("less_at_once", program or "") or bool(options_of("less_at_once", run.text))


def _is_of_use_only(facts: Facts, evidence: Evidence) -> bool:
    """Return True in a training, where a program's words for smaller parts are those of using a trained model."""
    program = evidence.framework or ""
    if facts.phase in ("eval", "sample") or program in programs("parts_of_training"):
        return False
    is_training = evidence.purpose == TRAINING and not evidence.infers
    return is_training and has_own("less_at_once", program) and not options_of("less_at_once", evidence.run.text)


def _batch_would_do(facts: Facts, evidence: Evidence) -> bool:
    """Return True if the request of one sequence of the printed batch, in proportion, has room on the card."""
    batch = evidence.run.numbers.get("batch_size", 1)
    return (facts.requested_bytes or 0) / batch < _ROOM * (facts.total_bytes or 0)


def _keeps_nothing(facts: Facts, evidence: Evidence) -> bool:
    """Return True if the program keeps no activations for a backward pass."""
    return facts.phase in ("eval", "sample") or (evidence.infers and facts.phase in (None, "forward"))


def _has_no_offload(facts: Facts, evidence: Evidence) -> bool:
    """Return True where a program's words for offloading are about another part of its work."""
    loads = facts.phase in ("load", "setup") and not evidence.trains
    if (_keeps_nothing(facts, evidence) and facts.phase != "eval") or loads:
        words = _words("offload", evidence)
        of_training = words is not None and any(_OF_STATE.search(line) for line in words.lines)
        has_words = has_own("offload", evidence.framework or "") or options_of("offload", evidence.run.text)
        return of_training or not has_words or bool(_BEFORE_OFFLOAD.search(evidence.run.text))
    return evidence.framework == "diffusers"


_OF_STATE = re.compile(r"zero_?(?:stage|3)|offload_optimizer|deepspeed|full_shard", re.IGNORECASE)
"""Words of lines that move a training's optimizer state, of which loading a model for its use has none."""
_BEFORE_OFFLOAD = re.compile(r"\bInvokeAI,? version:? ?[1-4]\.|\bopensora-v1")
"""Programs of a version older than their option."""


def _is_half(shape: PrintedShape | None) -> bool:
    return shape is not None and shape.dtype in ("bfloat16", "float16", "half")


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


def of_one_sequence(fix: Remedy, evidence: Evidence) -> Remedy:
    """Return the fix of a smaller batch with one sequence a pass."""
    assert isinstance(fix.change, Resized)
    batch, parts = fix.change.batch, (fix.change.batch, 1, fix.change.batch * fix.change.accumulation)
    words = own_option("split_general", evidence, parts) or pasted(
        "split_general", evidence.run.frameworks, values_to_fill(evidence, parts)
    )
    change = replace(fix.change, size=1, passes=batch * fix.change.accumulation, parts=batch)
    return replace(fix, change=change, paste=words.lines if words else ())


_OLD_DEEPSPEED = re.compile(r"\bdeepspeed[/\\]pt[/\\]")
"""Files of DeepSpeed up to 0.2, which has no stage 3."""
_BATCH_NORM = re.compile(r"batch_?norm|BatchNorm")
"""Words of a report whose model normalises over the batch, which smaller parts of a batch change."""


_BY_OPTIONS = re.compile(r"(?<=\s)--(?:per_device_train_batch_size|finetuning_type|model_name_or_path)[ =]")
"""Options of a trainer that takes its configuration from the command, too."""
_KEY = re.compile(r"^([a-z]\w*): ([\w*/.-]+)$")
"""A key with a plain value in YAML."""
_SHARE = re.compile(r"(?<=[ =])0?\.\d{1,2}\b")
_OF_CONTEXT, _SPARE = GIB // 2, 0.03
"""Bytes of a process's context on the card, and the share of it that is left free."""
_IN_PYTHON, _IN_SHELL = (
    re.compile(r"\bLLM\(\s*\n?\s*\w"),
    re.compile(r"--gpu-memory-utilization|\bvllm serve\b|api_server"),
)


def _beside_others(line: str, facts: Facts, evidence: Evidence) -> str:
    """Return a line with the share of the card that other programs leave, as an argument where the user has Python."""
    others = facts.others_bytes or max((facts.not_reserved_bytes or 0) - _OF_CONTEXT, 0)
    printed = _SHARE.search(line)
    if printed and others and facts.total_bytes:
        share = math.floor(10 * (1 - others / facts.total_bytes - _SPARE)) / 10
        if 0 < share < float(printed[0]):
            line = f"{line[: printed.start()]}{share:g}{line[printed.end() :]}"
    if line.startswith("--gpu-memory-utilization") and _IN_PYTHON.search(evidence.run.text):
        is_shell = _IN_SHELL.search(evidence.run.text)
        return line if is_shell else f"LLM(..., gpu_memory_utilization={line.rpartition(' ')[2]})"
    return line


def _remedy(code: str, facts: Facts, evidence: Evidence) -> Remedy:
    words = _words(code, evidence)
    if code == "half_precision" and facts.kind in _NOT_CUDA:
        words = _autocast(facts.kind.partition("_")[0])
    words = words and _for_version(words, facts)
    if code in ("shard", "offload") and words and _OLD_DEEPSPEED.search(evidence.run.text):
        words = replace(words, lines=tuple(f"{line}  # DeepSpeed 0.3.13 or later" for line in words.lines))
    if words and evidence.framework in programs("options_in_files") and _BY_OPTIONS.search(evidence.run.text):
        words = replace(words, lines=tuple(_KEY.sub(r"--\1 \2", line) for line in words.lines))
    if code == "share_of_card" and words:
        words = replace(words, lines=tuple(_beside_others(line, facts, evidence) for line in words.lines))
    effect = applicability(code)
    if code == "split_general" and _BATCH_NORM.search(evidence.run.text):
        effect = "changes_result"
    named = inputs_of(evidence) if code == "smaller_inputs" and not words else code
    remedy = Remedy(
        code=named,
        verdict=UNCHECKED,
        reason=named if named in ("fewer_atoms", "shorter_protein") else code,
        label=COMPUTED,
        exact={"exact": True, "changes_result": False}.get(effect),
        applicability=effect,
        paste=words.lines if words else (),
        page=words.page if words else "",
    )
    batch, size, passes = divided(evidence)
    if code == "split_general" and evidence.framework in programs("without_accumulation"):
        code = "smaller_batch"
        return replace(remedy, code=code, reason=code, exact=False, applicability=applicability(code))
    if code == "split_general" and batch and size and passes:
        before = accumulation(evidence)
        change = Resized(size=size, passes=passes, batch=batch, accumulation=before or 1, parts=batch // size)
        code = "split_logged" if before else "split_in_parts"
        return replace(remedy, code=code, reason="split_general", change=change)
    return remedy
