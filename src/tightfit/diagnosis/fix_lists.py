"""The lists of advice.toml that fit a failure, and the codes of those fixes that its run can take."""

import math
import re
from collections.abc import Iterator

from tightfit.diagnosis.failing_line import feeds_back
from tightfit.diagnosis.failure_case import Case, loads_on_first_card
from tightfit.diagnosis.figure_causes import fills_by_metal, holds_little, is_filled_by_library, is_most_of_card
from tightfit.diagnosis.fix_words import fix_tables, is_own_option, words_of
from tightfit.diagnosis.framework_words import frameworks, has_words
from tightfit.diagnosis.model_budget import trains_all
from tightfit.diagnosis.named_card import NOT_CUDA, mig_profile
from tightfit.diagnosis.needless import needless
from tightfit.diagnosis.own_options import options_of
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.report_words import hears, is_in_words, names_inputs
from tightfit.oomlog.ownership import had_room

_ON_CUDA_ONLY = frozenset({"optimizer_8bit", "shard", "offload", "quantized_weights", "qlora"})
"""Remedies that stand on libraries for CUDA."""
_ON_NPU = frozenset({"shard", "offload"})
"""Those of them that DeepSpeed and FSDP have on Ascend NPUs, too."""
_IN_ANY_LANGUAGE = frozenset({"less_at_once", "smaller_inputs", "smaller_model", "shapes_first"})
"""Remedies without a line of Python."""
_GATHERED = "gathered_parameters"
"""Parameters of one layer, gathered from all cards."""
_FLAT = ("shard", "zero_partition")
"""Tensors of many parameters in one, which no pass makes larger."""
_UNDIVIDED = (1, 2)
"""Stages of ZeRO at which each card holds all parameters."""
_OF_SAVING = ("save_adapters", "save_on_host")
"""Remedies that need no option: what is written, and where it is put together."""
_OWN_LISTS = ("optimizer_temporary", "optimizer_state_dict", _GATHERED)
"""Kinds of tensors with fixes of their own."""
_RARELY_ONES_OWN = ("smaller_model", "no_gradients")
"""Remedies that a program for the use of a trained model mostly has no room for."""
_OF_KEPT_RESULTS = ("no_gradients", "outputs_to_host")
"""Remedies for what a program that uses a trained model keeps from one pass to the next."""
_OF_PICTURES = ("smaller_picture", "vae_in_tiles", "quantized_weights")
"""Remedies that ComfyUI has for models of pictures."""
_OF_ALL_OUTPUTS = ("chunked_general", "outputs_to_host", "outputs_reduced", "outputs_dropped", "eval_batch")
"""Remedies for the outputs that an evaluation keeps, for the loss of a training, and for one batch."""
_OF_SMALLER_INPUTS = (
    "less_at_once",
    "fewer_pixels",
    "fewer_points",
    "shorter_length",
    "smaller_picture",
    "smaller_inputs",
)
"""Remedies that make the inputs of a pass smaller."""
_OVERSIZED = frozenset({"logits", "attention", "mask", "pairs", "outputs", "windows", "data", "edges"})
"""Quantities that a tensor larger than the card may well grow with."""
_OF_SEQUENCES_AT_ONCE = frozenset({"logits", "batch", "attention", "mask"})
"""Quantities that a server holds for as many sequences as it takes at once, beside its cache."""
_OF_INPUTS = frozenset({None, "batch", "attention", "logits"})
"""Quantities of a tensor that smaller inputs would make smaller, and an unknown one."""
_OF_A_STEP = (None, "forward", "loss", "backward", "compile", "setup", "optimizer")
"""Phases of which a smaller pass is the usual fix; None is unknown."""
_MOST_OF_WEIGHTS = 0.4
"""Share of the card that weights in 16 bits may take, for adapters to be trained beside them without quantising."""


def codes_for(case: Case) -> list[str]:
    """Return the codes of remedies that this run can take, the surest first."""
    if case.is_absurd:
        return ["shapes_first"]
    left_out = needless(case)
    applied = [code for code in dict.fromkeys(_fitting(case)) if _applies(code, case, left_out)]
    adapters = [each for each in applied if each in ("lora", "qlora")]
    if adapters == ["qlora", "lora"] and _fits_unquantized(case):
        applied = [{"lora": "qlora", "qlora": "lora"}.get(code, code) for code in applied]
    return applied


def _fitting(case: Case) -> list[str]:
    """Return the codes of the lists that fit, in the order of this run's purpose."""
    codes = [code for cause in _lists(case) for code in fix_tables()["fixes"][cause]]
    codes = _in_order_of_program(codes, case)
    codes = _with_state_of_run(codes, case)
    if case.shows("subject.any_picture_size") and case.evidence.batch_is_one:
        codes.sort(key=lambda code: code != "fewer_pixels")
    if case.evidence.infers:
        codes = _in_order_of_use(codes, case)
    if case.takes_one_item and case.facts.phase != "eval":
        codes.sort(key=lambda code: code not in ("smaller_inputs", "shorter_length"))
    if case.evidence.grows == "attention" and "fused_attention" in codes[2:]:  # without it, the scores stay
        codes = [codes[0], "fused_attention", *codes[1:]]
    return _with_growth(codes, case)


def _in_order_of_program(codes: list[str], case: Case) -> list[str]:
    """Return the codes in the order of the user's program: its own options first, where it has some."""
    facts, evidence = case
    is_known = evidence.framework in frameworks() and evidence.grows != "outputs"
    if facts.phase == "eval" and is_known:  # the program's own options come first
        codes.sort(key=lambda code: not case.has_own(code))
    has_batch = "eval_batch" in codes and not case.is_of("share_batch")
    if facts.phase == "eval" and evidence.grows == "logits" and has_batch:  # those of one batch
        codes = ["eval_batch", *(code for code in codes if code not in _OF_ALL_OUTPUTS)]
    if case.has_sign("not_python") and not any(each.file.endswith(".py") for each in facts.frames):
        codes = [code for code in codes if code in _IN_ANY_LANGUAGE]
    if _prints_divisible_batch(case) and "less_at_once" in codes:
        codes = ["less_at_once", *codes]
    if evidence.infers and evidence.framework is None:  # a program of another's has one model, and keeps no gradients
        codes.sort(key=lambda code: code in _RARELY_ONES_OWN)
        codes = ["no_gradients", *codes] if "no_gradients" in codes and case.shows("subject.own_loop") else codes
    codes = [*codes[:_BEFORE_SLICE], "larger_slice", *codes[_BEFORE_SLICE:]] if mig_profile(case.run.text) else codes
    return ["weaker_card_out", *codes] if _UNLIKE_CARDS in case.run.text else codes


_BEFORE_SLICE = 2
"""Fixes of the program's own need that come before a larger slice of the card."""
_UNLIKE_CARDS = "imbalance between your GPUs"
"""DataParallel's warning of a card with less memory than the first."""


def _with_state_of_run(codes: list[str], case: Case) -> list[str]:
    """Return the codes behind the cures of a card that is full before any pass."""
    if case.facts.other_processes and case.shows("subject.test_run"):
        codes = ["fewer_test_workers", *codes]
    if case.held_beside == "tensorflow":
        codes = ["tensorflow_off_card", *codes]
    elif is_filled_by_library(case.facts) or case.held_beside == "simulator":
        codes = ["fewer_environments", *codes]
        codes = codes if _applies(codes[0], case, frozenset()) else ["other_library", *codes]
    if case.shows("subject.lacks_no_grad") and case.keeps_nothing:
        codes = ["no_gradients", *codes]
    if case.is_of("with_servers") and case.shows("switches.share_of_server"):
        codes = ["share_of_card", "smaller_cache", *codes]
    if case.shows("subject.second_model"):
        codes = ["free_training", *codes]
    if case.shows("subject.smaller_fits"):
        codes.sort(key=lambda code: code not in _OF_SMALLER_INPUTS)
    if case.shows("subject.spread_unevenly"):
        codes = ["spread_model", *codes]
    if loads_on_first_card(case):
        codes = ["load_on_host"]  # without the checkpoint there, it fits
    if case.is_of("sized_models"):
        codes.sort(key=lambda code: code == "smaller_model")
    if case.fits_smaller_model:
        codes = ["smaller_model", *codes]
    if case.quantity_without_effect is not None:
        name = "fixed_part_of_unknown" if case.evidence.is_of_unknown_purpose else "fixed_part"
        fixed = fix_tables()["fixes"][name]
        codes = [*fixed, *codes] if case.evidence.grows in _OF_INPUTS else [*codes, *fixed]
    return codes


def _in_order_of_use(codes: list[str], case: Case) -> list[str]:
    """Return the codes in the order of a program that uses a trained model."""
    if not case.has_sign("spread") and case.facts.rank is None:  # more cards come last
        codes.sort(key=lambda code: code == "spread_model")
    if case.has_sign("float32"):
        codes = ["smaller_weights", *codes]
    if case.program in _WITH_PREFILL:
        is_first = case.shows("subject.prefill")
        codes.sort(key=lambda code: (code == "less_at_once") != is_first)
    if case.is_of("merge_weights") and case.shows("subject.profile_run"):  # before the cache has its share
        codes = ["smaller_cache", "less_at_once", *(code for code in codes if code != "share_of_card")]
    if case.shows("subject.decodes_titled"):
        codes = ["vae_in_tiles", *codes]
    if case.shows("subject.any_picture_size"):  # its pictures have any size
        codes.sort(key=lambda code: code not in ("fewer_pixels", "smaller_inputs"))
    return codes


_WITH_PREFILL = ("vllm", "sglang")
"""Servers with an option for the tokens of prompts in one pass."""
_OF_GROWTH = ("growing", "accumulates", "ran_first")
"""Signs of passes that went well before the one that failed."""


def _with_growth(codes: list[str], case: Case) -> list[str]:
    """Return the codes with the fixes for kept results first, if earlier passes went well by the report."""
    facts, evidence = case
    if evidence.infers and any(_KEEPS.search(each.source or "") for each in facts.frames if not each.is_library):
        return [*_OF_KEPT_RESULTS, *codes]
    may_keep = not (case.is_oversized or is_most_of_card(facts) or had_room(facts))
    is_open = case.program is None or case.is_of("libraries") or case.has_own("outputs_to_host")
    if evidence.infers and is_open and may_keep and case.has_sign(*_OF_GROWTH):
        codes = _with_kept_results(codes, case)
    grows = case.has_sign("growing") and not evidence.infers and not case.is_oversized
    grows = grows or (case.has_sign("accumulates") and not evidence.infers and may_keep)
    grows = grows and not holds_little(facts) and not case.asks_for_much
    if (grows and facts.phase != "save") or feeds_back(facts.frames) or case.has_sign("retains_graph"):
        codes = ["kept_graph", *codes]
    return codes


_KEEPS = re.compile(r"\.(?:append|extend)\((?!.*\b(?:cpu|item|numpy|tolist)\(\))\w+\(")
"""A line that appends what a call returns to a list, as it is."""


def _with_kept_results(codes: list[str], case: Case) -> list[str]:
    """Return the codes with those for kept results: first in the user's own code, else behind a smaller pass."""
    if case.shows("subject.generates_text"):
        return codes
    if not case.is_foreign:
        return [*_OF_KEPT_RESULTS, *codes]
    place = codes.index("less_at_once") + 1 if "less_at_once" in codes else 0
    return [*codes[:place], "outputs_to_host", *codes[place:]]


def _prints_divisible_batch(case: Case) -> bool:
    """Return True if a program that uses a trained model prints a batch that may be smaller, and that would do."""
    would_do = not case.is_oversized or case.batch_would_do
    return case.evidence.infers and would_do and case.run.numbers.get("batch_size", 1) > 1


def _fits_unquantized(case: Case) -> bool:
    """Return True if the weights of the known model, in 16 bits, leave room on the card: LoRA does."""
    budget = case.evidence.budget
    return bool(budget and budget.total_bytes and 2 * budget.parameters < _MOST_OF_WEIGHTS * budget.total_bytes)


def _lists(case: Case) -> Iterator[str]:
    """Yield the lists of advice.toml that fit this failure, the most fitting first."""
    facts, evidence = case
    if case.calls("prepare_model_for_kbit_training", "prepare_model_for_int8_training"):
        yield "conversion"
    if fills_by_metal(facts):
        yield "metal"
    elif case.exceeds_in_parts:
        yield "parts"
    elif case.has_sign("loads_model") and evidence.infers and evidence.grows is None:
        yield "model"
    elif evidence.is_all_parameters and not case.trains_part:  # a smaller batch does not change it
        yield from _lists_of_budget(case)
        yield "training"
    elif evidence.tensor in _FLAT and case.run.numbers.get("zero_stage") in _UNDIVIDED:  # whatever a pass holds
        yield from _lists_of_tensor(case)
    elif evidence.tensor == _GATHERED and not case.is_oversized:  # what is gathered at once comes before the model
        yield from _lists_of_tensor(case)
        yield from _lists_of_budget(case)
    else:
        yield from _lists_of_budget(case)
        yield from _lists_of_tensor(case)


def _lists_of_budget(case: Case) -> Iterator[str]:
    """Yield the lists for a known model that does not fit the card, or hardly."""
    budget, evidence = case.evidence.budget, case.evidence
    if budget is None:
        return
    if budget.exceeds:
        yield "training" if budget.what == "training" or evidence.trains else "model"
    if budget.what == "partial":
        yield "partial"
    if budget.what != "training" or budget.exceeds or evidence.is_all_parameters:
        return
    if not evidence.batch_is_one:
        nearly = "if_all" if budget.exceeds_if_all else "nearly_full"
        nearly = "training" if case.facts.phase in ("load", "setup") else nearly  # no pass has begun
        yield from [nearly] if budget.may_exceed or budget.total_bytes is None else []
    elif (budget.total_bytes is None and evidence.framework is None) or (
        budget.exceeds_if_all and evidence.grows in ("batch", "attention", "logits")
    ):
        yield "if_all"


def _lists_of_tensor(case: Case) -> Iterator[str]:
    """Yield the lists for the failed tensor; where the log does not show it, those for the phase."""
    evidence, grows = case.evidence, case.evidence.grows
    if case.is_oversized and grows == "largest_index":
        yield grows
        return
    if case.is_oversized:
        yield from [grows] if grows in _OVERSIZED else []
        of_weight = "oversized_table" if _is_of_own_layer(case) else "oversized_weight"
        yield of_weight if grows == "model" else "oversized"
        return
    if evidence.gathers_on_first_card(case.facts) or case.first_card_works_alone:
        yield "cards"
    if evidence.infers and case.facts.phase in (None, "forward") and grows is None:
        yield "sample"
        return
    if evidence.tensor in _OWN_LISTS:
        yield evidence.tensor
    if evidence.tensor == _GATHERED:
        return
    if grows is None:
        yield from _lists_of_phase(case)
        return
    if evidence.infers and grows in _OF_SEQUENCES_AT_ONCE and case.has_own("share_of_card"):
        yield "warmup"
    yield _of_weights(case) if grows == "model" else _of_growing(grows, case)
    yield from ["eval"] if case.facts.phase == "eval" and grows != "windows" else []


_OF_ONE_WEIGHT = ("moved_model", "converted_weight", "created_weight")
"""Kinds of tensors that are one weight of a model."""


def _is_of_own_layer(case: Case) -> bool:
    """Return True for one weight of a model that the user's own program builds: its sizes can be other ones."""
    return case.program is None and case.evidence.model is None and case.evidence.tensor in _OF_ONE_WEIGHT


def _trains(case: Case) -> bool:
    """Return True if the log is of a program that trains, or its known model is one in training."""
    budget = case.evidence.budget
    return case.evidence.trains or (budget is not None and budget.what == "training")


def _of_growing(grows: str, case: Case) -> str:
    """Return the list for what grows, for optimizer state that is divided among cards one of its own."""
    sized, model = case.evidence.sized, case.evidence.model
    if sized is not None and model is not None and sized.tensor == "zero_partition":
        is_part = math.prod(sized.shape) < (model.parameters or 0)
        return "state_partition" if is_part else "state_divided"
    return "state_divided" if grows == "state" and case.has_sign("deepspeed", "fsdp") else grows


def _of_weights(case: Case) -> str:
    """Return the list for a tensor that grows with the model."""
    phase, evidence = case.facts.phase, case.evidence
    if phase == "save":
        return "save"
    is_before_pass = phase in ("load", "setup")
    trains = _trains(case) or (evidence.framework is None and evidence.purpose == TRAINING)
    if is_before_pass and (trains or (evidence.purpose == TRAINING and not evidence.infers)):
        return "weights_to_train"
    return "training" if trains else "model"


def _lists_of_phase(case: Case) -> Iterator[str]:
    """Yield the lists for a failure of which the phase alone is known."""
    phase, evidence = case.facts.phase, case.evidence
    if phase is None and case.has_sign("training_ended"):
        yield "after_training"
        return
    if phase == "eval" and case.shows("subject.metrics_alone"):
        yield "outputs"
    if phase == "eval" and case.is_of("share_batch"):
        yield "shared_batch"
    if phase in fix_tables()["fixes"]:
        yield str(phase)
    if phase == "setup" and case.has_sign("fsdp", "deepspeed") and not evidence.infers:
        yield "training"
        return  # before any pass
    if phase == "setup" and _trains(case) and case.facts.frames and case.facts.frames[-1].function == "__init__":
        yield "weights_to_train"
        return
    if phase in ("save", "merge"):  # what one pass holds is gone by then
        return
    if phase == "load":
        yield "weights_to_train" if _trains(case) or evidence.purpose == TRAINING else "model"
    if evidence.batch_is_one:
        yield from _lists_of_one(case)
    if phase in _OF_A_STEP:
        yield from ["undivided"] if case.run.numbers.get("zero_stage") in (1, 2) and not evidence.infers else []
        yield "unknown_purpose" if evidence.is_of_unknown_purpose else "unknown"


def _lists_of_one(case: Case) -> Iterator[str]:
    """Yield the lists for a batch that is one already."""
    if case.is_of("trainers_of_one"):
        yield "of_one"
    if case.is_of("trainers") and not case.evidence.infers:
        yield "of_one_adapter" if case.adapts else "of_one_full" if trains_all(case.run) else "of_one_text"


def _applies(code: str, case: Case, left_out: frozenset[str]) -> bool:
    """Return True if this run can take a remedy: it does not have it already, and its program has words for it."""
    if code in left_out:
        return False
    if hears(case.evidence) and code in ("smaller_inputs", *_OF_PICTURES):
        return code == "smaller_inputs"
    if code == "smaller_inputs":
        return _names_smaller_inputs(case, left_out)
    if code == "shorter_length" and case.is_of("pictures"):
        return case.has_own(code)
    if case.facts.kind in NOT_CUDA and code in _ON_CUDA_ONLY:
        is_on_npu = case.facts.kind == "npu_out_of_memory" and code in _ON_NPU
        return is_on_npu and _has_words(code, case)
    return is_in_words(code, case.evidence) or _has_words(code, case)


def _names_smaller_inputs(case: Case, left_out: frozenset[str]) -> bool:
    """Return True if no remedy says more exactly which inputs are to be smaller."""
    if case.is_of("texts"):
        return case.has_own("smaller_inputs")
    own = set(options_of("smaller_inputs", case.run.text))
    if own.difference(*(options_of(code, case.run.text) for code in ("shorter_length", "smaller_picture"))):
        return True
    if names_inputs(case.evidence):
        return bool(own)
    return not any(_applies(each, case, left_out) for each in ("shorter_length", "smaller_picture"))


_ABSURD = 20
"""Times the card from which on a request is hardly one of too large inputs."""


def _is_absurd(case: Case) -> bool:
    """Return True for a request of many times the card."""
    total, requested = case.facts.total_bytes, case.facts.requested_bytes
    return total is not None and requested is not None and requested > _ABSURD * total


def _has_words(code: str, case: Case) -> bool:
    """Return True unless a remedy needs words of the program, and it has none."""
    if code in _OF_SAVING and case.facts.phase == "save" and not case.is_of("servers"):
        return True
    if code == "shapes_first" and _is_absurd(case):
        return True
    if case.is_of("applications"):
        has_some = has_words(code, case.program or "") or is_own_option(code, case.evidence)
        return has_some and words_of(code, case.evidence) is not None
    is_open = case.is_of("without_torch") and code not in _IN_ANY_LANGUAGE
    needs_words = is_open or code in fix_tables()["needs_words"]["codes"]
    return not needs_words or words_of(code, case.evidence) is not None
