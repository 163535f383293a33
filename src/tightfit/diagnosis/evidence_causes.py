"""Causes by the evidence for the failed tensor, and by the memory that the model alone takes."""

import re
from collections.abc import Iterator, Sequence

from tightfit.diagnosis.cause_records import (
    COMPUTED,
    LIKELY,
    Cause,
    FirstAxis,
    FixedPart,
    LargeRequest,
    LineRequest,
    LogitTokens,
    MigSlice,
    ModelBudget,
    OtherCard,
    PrintedBatch,
    Request,
    ServerShare,
    Shard,
    ShardShare,
    SizedWeight,
    SizedWeights,
    SmallRequest,
    ToldInput,
    WorksWith,
)
from tightfit.diagnosis.culprit import Culprit
from tightfit.diagnosis.evidence import OF_OTHERS, Evidence, named_bytes, weights_leave_room
from tightfit.diagnosis.failing_line import feeds_back, line_before_message
from tightfit.diagnosis.failure_case import Case, loads_on_first_card, reads_onto_first_card
from tightfit.diagnosis.figure_causes import holds_little, is_most_of_card, is_oversized
from tightfit.diagnosis.framework_words import programs
from tightfit.diagnosis.model_budget import Budget
from tightfit.diagnosis.named_card import mig_profile
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.report_words import shows
from tightfit.diagnosis.told_shape import told_input
from tightfit.diagnosis.usual_models import printed_name
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room
from tightfit.units import MIB

_SHOWN_MODELS = 3


def causes_of_evidence(
    facts: Facts, culprit: Culprit | None, evidence: Evidence, unplayed_because: str
) -> tuple[list[Cause], list[Cause]]:
    """Return the causes of a failure that was not played, or that fits when played: the first ones, and the rest.

    That the model alone is too large comes before all others.
    """
    other = [Cause(code="self_test", label=LIKELY)] if "self_test" in evidence.run.signs else []
    other += _of_setting(evidence)
    other += [*_of_other_card(facts, evidence), *_of_loading(facts, evidence), *_of_server(facts, evidence)]
    other += _of_beside(facts, evidence)
    tensor = [
        *_of_gradients(facts, evidence),
        *_of_first_card(facts, evidence),
        *_of_kept(facts, evidence),
        *_of_first_optimizer_step(facts, evidence),
        *_of_tensor(facts, culprit, evidence, unplayed_because),
    ]
    if evidence.budget is not None and weights_leave_room(facts, evidence):
        other.append(_budget_as(evidence.budget, "weights_leave_room"))
    budget = [*_of_budget(evidence.budget)] if evidence.budget else []
    run = [*_of_run(facts, evidence)]
    if evidence.budget is not None and (evidence.budget.exceeds or evidence.budget.what == "partial"):
        return [*other, *budget], [*tensor, *run]
    return other, [*budget, *tensor, *run] if evidence.grows is None else [*tensor, *budget, *run]


def _of_other_card(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that the card is much smaller than those that the report names."""
    named, total = named_bytes(facts, evidence), facts.total_bytes
    if named is not None and total is not None:
        yield OtherCard(code="other_card", total_bytes=total, named_bytes=named)


def _of_loading(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that by the report's words the checkpoints of all processes are on the first card."""
    if reads_onto_first_card(facts):
        yield Cause(code="read_onto_first_card", label=LIKELY)
    elif loads_on_first_card(Case(facts, evidence)):
        yield Cause(code="all_on_first_card", label=LIKELY)


_COLOCATED = re.compile(r"\b(?:vllm_|rollout\.)gpu_memory_utilization[\"' ]{0,3}[=:] ?(0?\.\d{1,3})\b")
_MUCH = 0.4
"""Share of the card from which on a server beside a training is named as a cause."""


def _of_server(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield the share of the card that vLLM takes in the process of a training, by the printed setting."""
    found, total = _COLOCATED.findall(evidence.run.text), facts.total_bytes
    if found and total and float(found[-1]) >= _MUCH:
        share = float(found[-1])
        yield ServerShare(code="server_beside", label=COMPUTED, share=share, share_bytes=round(share * total))


def _of_beside(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield another library in this process that holds most of the card, outside of PyTorch."""
    beside = Case(facts, evidence).held_beside
    if beside == "tensorflow":
        yield Cause(code="tensorflow_beside", label=LIKELY)
    elif beside == "simulator":
        yield Cause(code="simulator_beside", label=LIKELY)


def _of_gradients(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that an evaluation or the use of a model lacks no_grad(), by the report or by PyTorch's own warning."""
    case = Case(facts, evidence)
    if case.keeps_nothing and case.shows("subject.lacks_no_grad"):
        yield Cause(code="gradients_kept", label=LIKELY)


def _of_first_card(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that by the report's words nn.DataParallel leaves the other cards without work."""
    if Case(facts, evidence).first_card_works_alone:
        yield Cause(code="first_card_alone", label=LIKELY)


def _of_kept(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield tensors that are kept from step to step, by a line that feeds a state back, or by the report's words."""
    if feeds_back(facts.frames):
        yield Cause(code="fed_back", label=LIKELY)
    elif "retains_graph" in evidence.run.signs:
        yield Cause(code="retained_graph", label=LIKELY)
    elif evidence.infers and evidence.run.signs & _OF_PASSES and not (is_oversized(facts) or had_room(facts)):
        yield Cause(code="larger_input" if is_most_of_card(facts) else "kept_between_passes", label=LIKELY)
    elif _grows(facts, evidence):
        yield Cause(code="growing", label=LIKELY)
    elif "stepped" in evidence.run.signs and facts.phase in _OF_A_STEP and evidence.purpose == TRAINING:
        yield Cause(code="stepped", label=LIKELY)
    else:
        yield from _of_earlier_steps(facts, evidence)


def _of_first_optimizer_step(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that the optimizer makes its state in its first step, where the message has no figures."""
    if Case(facts, evidence).makes_optimizer_state:
        yield Cause(code="optimizer_makes_state", label=LIKELY)


def _grows(facts: Facts, evidence: Evidence) -> bool:
    """Return True if the report says that memory grows, and the request is no single large one."""
    says_so = "growing" in evidence.run.signs or ("accumulates" in evidence.run.signs and not had_room(facts))
    return says_so and not holds_little(facts) and not Case(facts, evidence).asks_for_much


_OF_PASSES = frozenset({"growing", "accumulates", "ran_first"})
"""Signs of passes that went well before the one that failed."""


def _of_earlier_steps(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that by the report's words earlier steps of the training went well."""
    if evidence.infers and evidence.run.signs & _OF_PASSES and "growing" not in facts.details:
        yield Cause(code="kept_between_passes", label=LIKELY)
        return
    has_run = "ran_first" in evidence.run.signs or (
        "growing" in evidence.run.signs and Case(facts, evidence).asks_for_much
    )
    may_be = has_run and facts.phase in _OF_A_STEP and not is_oversized(facts)
    if may_be and evidence.purpose == TRAINING and "growing" not in facts.details:
        yield Cause(code="ran_first", label=LIKELY)


_OF_A_STEP = (None, "forward", "loss", "backward", "optimizer")
"""Phases of a training's step; None is unknown."""


def causes_of_report(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield the causes of a failure of which only a person's words are known."""
    yield from _of_setting(evidence)
    if facts.phase == "save":
        code = "grows_saving_alone" if evidence.is_of_one_process else "grows_saving"
        yield Request(code=code, label=LIKELY, requested_bytes=facts.requested_bytes)
        return
    if evidence.line is not None and evidence.line.is_named:
        yield Request(code=f"grows_{evidence.line.grows}", requested_bytes=facts.requested_bytes)
    yield from _of_loading(facts, evidence)
    yield from _of_gradients(facts, evidence)
    yield from _of_first_card(facts, evidence)
    yield from _of_budget(evidence.budget) if evidence.budget else ()
    yield from _of_earlier_steps(facts, evidence)
    yield from _of_fixed_part(facts, evidence)
    yield from causes_of_purpose(facts, evidence)
    yield from _of_batch(evidence)


_WORKS_WITH = re.compile(
    r"\b(?:[Ww]hen|[Ii]f|[Aa]fter|[Oo]nce|[Ww]ith|[Bb]y)\b (?:(?:I|we|you) )?(?:only )?"
    r"(?:(?:set|us|pass|add)(?:e|t?ing)? )?"
    r"[`'\"]?(?P<name>[A-Za-z_][\w.-]{1,60}) ?= ?(?P<value>['\"]?[\w.+-]{1,30}['\"]?)[`'\"]?,? (?:then )?"
    r"(?:(?:it|this|that|everything|training|the (?:code|script|training)) )?(?:all )?"
    r"(?:works?|worked|runs?(?! (?:out|into))|ran(?! (?:out|into))|is (?:fine|ok))\b"
)
"""A person's words for a setting with which memory does not run out."""


def _of_setting(evidence: Evidence) -> Iterator[Cause]:
    """Yield that the report says with which setting it works."""
    if shows(evidence.run.text, "subject.smaller_fits") and evidence.grows not in _OF_NO_INPUT:
        yield Cause(code="smaller_input_fits", label=LIKELY)
    elif (told_of := told_input(evidence.run.text)) is not None and evidence.grows is None and not evidence.trains:
        yield ToldInput(code="told_input", label=LIKELY, told=told_of)
    if (told := _WORKS_WITH.search(evidence.run.text)) is not None:
        yield WorksWith(code="works_with", setting=f"{told['name']}={told['value'].rstrip('.')}")


def causes_of_purpose(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield the quantities that fill a card in such a run, where neither a line nor a figure shows more."""
    budget, trains = evidence.budget, evidence.trains or evidence.purpose == TRAINING
    has_no_effect = Case(facts, evidence).quantity_without_effect is not None
    if has_no_effect or (budget is not None and (budget.exceeds or budget.what == "partial")):
        return
    if evidence.grows == "dictionary":
        return
    code = _code_of_purpose(facts, evidence, trains=trains)
    if code is not None and "growing" not in facts.details:
        yield Cause(code=code, label=LIKELY)


_OWN_CARDS = re.compile(r"--vllm_num_engines\b")
_COLOCATES = re.compile(r"colocate_all_models|colocate_actor_vllm|hybrid_engine")
"""Options of a training whose server has cards of its own, and of one whose server does not."""
_SERVES = re.compile(r"vllm|sglang", re.IGNORECASE)


def _code_of_purpose(facts: Facts, evidence: Evidence, *, trains: bool) -> str | None:
    program = evidence.framework
    apart = _OWN_CARDS.search(evidence.run.text) and not _COLOCATES.search(evidence.run.text)
    serves = program in programs("with_servers") and _SERVES.search(evidence.run.text)
    if serves and not apart and facts.phase in (None, "warmup"):
        return "share_of_server"
    if program in ("vllm", "sglang", "tgi", "lmdeploy", "tensorrt_llm") and facts.phase in (None, "warmup"):
        return "held_by_server"
    if program == "pyg":
        return "whole_graph"
    if facts.phase == "eval":
        return "pass_of_evaluation" if trains else None
    if facts.phase not in (None, "forward", "loss", "backward"):
        return None
    return "pass_of_inference" if evidence.infers else "pass_of_training" if trains else None


def _of_tensor(facts: Facts, culprit: Culprit | None, evidence: Evidence, unplayed_because: str) -> Iterator[Cause]:
    """Yield the quantity that the tensor grows with, and tensors of its size; or that the size does not tell."""
    requested = facts.requested_bytes
    if evidence.grows is not None and (evidence.line is None or evidence.line.is_named or evidence.shape is not None):
        yield Request(code=f"grows_{evidence.grows}", requested_bytes=requested)
    elif evidence.grows is None and facts.phase == "load":
        yield Request(code="grows_model", label=LIKELY, requested_bytes=requested)
    if is_most_of_card(facts) and evidence.grows not in _OF_NO_INPUT and facts.phase != "load":
        yield LargeRequest(code="most_of_card", requested_bytes=requested, total_bytes=facts.total_bytes)
    yield from _of_sizes(requested, evidence)
    is_of_items = evidence.shape is not None and len(evidence.shape.shape) > 2 and evidence.grows == "batch"
    if culprit is not None and is_of_items and culprit.shape[0] > 1:
        first, whole = culprit.shape[0], culprit.bytes
        yield FirstAxis(code="first_axis", label=COMPUTED, axis=first, one_bytes=whole // first)
    yield from _of_request(facts, culprit, evidence, unplayed_because)


def _of_request(facts: Facts, culprit: Culprit | None, evidence: Evidence, unplayed_because: str) -> Iterator[Cause]:
    """Yield the cause by the request's size or its line, or that neither tells the tensor."""
    requested = facts.requested_bytes
    if evidence.within is not None and evidence.within.is_small:
        high = evidence.within.high
        codes = (
            ("smallest_request_free", "small_request_free")
            if had_room(facts)
            else ("smallest_request", "small_request")
        )
        code = codes[high > MIB] if culprit is None or had_room(facts) else "small_request_of_kind"
        yield SmallRequest(code=code, requested_bytes=requested, tensor_high=high)
    elif culprit is None and evidence.within is not None and evidence.within.high < MIB and not had_room(facts):
        yield Request(code="tiny_request", requested_bytes=requested)
    elif culprit is None and requested is None and facts.frames and (line := _line_of(facts, evidence)):
        yield line
    elif culprit is None and evidence.within is not None:
        made_by = None if evidence.is_complete else _line_of(facts, evidence)
        untold = _not_told(facts, evidence, unplayed_because)
        if Case(facts, evidence).computes_scores_whole:
            yield Cause(code="scores_without_kernel", label=LIKELY)
        elif made_by is not None:
            yield made_by
        elif untold:
            yield Request(code=untold, requested_bytes=requested)


_OF_NO_INPUT = ("state", "model", "saving", "reordered", "pool", "loading", "bucket", "table", "cards")
"""Quantities of tensors that a smaller input leaves as they are."""
_OF_PICTURES = re.compile(r"diffusion|unet|transformer_blocks|first_stage|decoder\.up")
"""Names of parameters of models of pictures, which the table of language models does not hold."""
_CALLS = (
    "from_pretrained(",
    "forward_call(",
    "_call_impl(",
    "self.forward(",
    "run_backward(",
    "func(*",
    "fn(*",
    "(*args",
    "main()",
)
"""Calls in which a traceback that somebody cut ends: the request is further inside."""
_COMPILED = re.compile(r"(?<![\w.])(?:_C|_ext|_cuda|\w+_(?:C|ext|cuda))\.\w+\(")
"""A call of a module that was compiled: no line of Python is further inside."""
_OF_MORE = (
    re.compile(r"(?<![\w.])(?:self\.)?(?:model|net|network|module)\("),
    re.compile(r"(?<!\w)(?:train(?:ing)?_step|train|fit|compute_loss|process_api|run|main|launch)\("),
)
"""Calls of a compiled model, or of a whole pass whose own lines were cut: it may be any of their tensors."""


_ENDS_IN_FRAME = re.compile(r"File \"[^\"\n]{0,300}\s*\Z|File \"[^\"\n]{1,300}\"(?:, line(?: \d*)?)?[^\n]{0,40}\s*\Z")
"""The head of a frame at the end of a text: the traceback went on."""


def _line_of(facts: Facts, evidence: Evidence) -> LineRequest | None:
    """Return the innermost line of the traceback, or the one that the report quotes; None where it may be cut."""
    frame = facts.frames[-1] if facts.frames else line_before_message(evidence.run.text)
    if frame is None or not frame.source or facts.phase == "backward" or frame.source.startswith("raise "):
        return None
    is_outer = any(call in frame.source for call in _CALLS) and not _COMPILED.search(frame.source)
    if is_outer or any(each.search(frame.source) for each in _OF_MORE):
        return None
    if "traceback_cut" in facts.notes:
        return None
    if facts.frames and _ENDS_IN_FRAME.search(evidence.run.text):
        return None
    if facts.frames and evidence.run.text.rstrip(" `\n").endswith(frame.source):  # the paste ends within a traceback
        return None
    name = frame.file.replace("\\", "/").rsplit("/", 1)[-1]
    place = f"{name}:{frame.line}" if frame.file and frame.line else name
    return LineRequest(
        code="tensor_of_line" if frame.file else "tensor_of_line_alone", place=place, source=frame.source[:200]
    )


def _not_told(facts: Facts, evidence: Evidence, unplayed_because: str) -> str | None:
    """Return the code of the sentence that the size does not tell the tensor, and what would."""
    if unplayed_because in ("card", "maker"):
        return "tensor_not_told_without_gpu"
    if had_room(facts):  # the tensor is not the matter
        return None
    if unplayed_because != "config":  # a play that fits already names the next step
        return None
    if evidence.is_complete:
        return "tensor_not_told_by_sizes"
    if facts.phase == "backward":
        return "tensor_not_told_in_backward"
    return "tensor_not_told" if evidence.may_be_of_nanogpt else "tensor_not_told_elsewhere"


_CLASS_OF_MODEL = re.compile(r"\b([A-Z]\w{1,30}?)(?:DecoderLayer|ForCausalLM|ForConditionalGeneration|LMHeadModel)\b")


def _classes_in(text: str) -> tuple[str, ...]:
    """Return the families of models whose classes a report names, in small letters.

    >>> _classes_in("--fsdp_transformer_layer_cls_to_wrap 'OPTDecoderLayer', AutoModelForCausalLM")
    ('opt',)
    """
    return tuple(dict.fromkeys(name.lower() for name in _CLASS_OF_MODEL.findall(text) if name != "AutoModel"))


def _squeezed(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


_OF_VOCABULARY = re.compile(r"lm_head|embed|\bwte\b")
"""Parameters with a row a token, of which tables of models may be longer than usual."""


def _of_sizes(requested: int | None, evidence: Evidence) -> Iterator[Cause]:
    """Yield tensors that have the request's size, where the log shows their kind."""
    run, fits, tokens = evidence.run, evidence.fits, evidence.tokens
    classes = _classes_in(run.text)
    weights = tuple(
        SizedWeight(shape=fit.shape, dtype=fit.dtype, bytes=fit.bytes, models=", ".join(fit.models[:_SHOWN_MODELS]))
        for fit in fits
        if fit.tensor == "weight" and (not classes or any(map(_squeezed(" ".join(fit.models)).startswith, classes)))
    )
    is_other = _OF_PICTURES.search(run.tensor_name or "") or (evidence.model is None and OF_OTHERS.search(run.text))
    is_other = is_other or (evidence.model is None and _OF_VOCABULARY.search(run.tensor_name or ""))
    if weights and evidence.sized is None and not evidence.is_complete and not is_other:
        yield SizedWeights(code="weights_of_size", label=COMPUTED, requested_bytes=requested, weights=weights)
    shares = tuple(
        ShardShare(ranks=fit.ranks or 1, dtype=fit.dtype, bytes=fit.bytes) for fit in fits if fit.tensor == "shard"
    )
    model = evidence.model
    if shares and evidence.tensor == "shard" and model is not None and model.parameters:
        yield Shard(
            code="shard_of_size",
            label=COMPUTED,
            requested_bytes=requested,
            parameters=model.parameters,
            of=_name(printed_name(model, run)),
            shares=shares,
        )
    of = _name(printed_name(model, run) if model else run.family or run.framework or "")
    if tokens and evidence.vocabulary and evidence.sized is None and of:
        yield LogitTokens(
            code="tokens_of_size",
            label=COMPUTED,
            requested_bytes=requested,
            vocab_size=evidence.vocabulary,
            of=of,
            float_tokens=tokens[0],
            half_tokens=tokens[1],
        )


def _of_budget(budget: Budget) -> Iterator[Cause]:
    if (code := _code_of(budget)) is not None:
        yield _budget_as(budget, code)


def _budget_as(budget: Budget, code: str) -> ModelBudget:
    return ModelBudget(
        code=code,
        label=COMPUTED,
        of=_name(budget.model),
        parameters=budget.parameters,
        low_bytes=budget.low_bytes,
        high_bytes=budget.high_bytes,
        low_each=budget.low_each,
        high_each=budget.high_each,
        total_bytes=budget.total_bytes,
        ranks=max(budget.ranks, budget.parts),
        trained=budget.trained,
    )


_IN_4_BITS = 0.5
_PARTS_OF_16_BITS = 4
"""Weights, gradients and two moments: of equal size where all are in 16 bits."""


def _code_of(budget: Budget) -> str | None:
    """Return the code of the sentence on the memory that a model alone takes; None if it says nothing."""
    if budget.what == "partial":
        return "budget_partial"
    if budget.exceeds:
        if budget.parts > 1:
            return "budget_weights_in_parts"
        may_be_divided = budget.is_divided or (budget.cards > 1 and budget.ranks == 1)
        code = f"budget_{budget.what}_divided" if may_be_divided else f"budget_{budget.what}"
        return f"{code}_in_4_bits" if budget.what == "weights" and budget.low_each == _IN_4_BITS else code
    if budget.total_bytes is None:
        return "budget_of_unknown_card"
    is_doubtful = budget.what == "training" and budget.may_exceed and not budget.is_divided
    if is_doubtful and budget.exceeds_if_all:
        weights = budget.low_bytes // _PARTS_OF_16_BITS
        return "budget_beyond_adapters" if weights > budget.total_bytes else "budget_if_all"
    return "budget_may_exceed" if is_doubtful else None


def _of_run(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield what else the log prints of the run: a batch that cannot shrink, DataParallel."""
    if profile := mig_profile(evidence.run.text):
        yield MigSlice(code="mig_slice", profile=profile)
    if "training_ended" in evidence.run.signs and evidence.grows in (None, "saving"):
        yield Cause(code="training_ended")
    if evidence.gathers_on_first_card(facts) and not Case(facts, evidence).first_card_works_alone:
        batch_size = evidence.run.numbers.get("batch_size")
        yield PrintedBatch(code="data_parallel" if batch_size else "data_parallel_gathers", batch_size=batch_size)
    if facts.phase != "eval" or evidence.run.numbers.get("eval_batch_size", 1) == 1:
        yield from _of_batch(evidence)
    yield from _of_fixed_part(facts, evidence)


_UNDECIDED = ("others_too", "others_open", "others_estimated_too", "others_estimated_open")
"""Causes that leave open whether the end of other programs helps, or deny it."""


def with_closed(causes: Sequence[Cause]) -> tuple[Cause, ...]:
    """Return the causes of a report in which closing another program helped, with that one first."""
    closed = Cause(code="others_closed", label=LIKELY)
    return (closed, *(each for each in causes if each.code not in _UNDECIDED))


def _of_fixed_part(facts: Facts, evidence: Evidence) -> Iterator[Cause]:
    """Yield that a quantity of the inputs has no effect, by the report's words."""
    quantity = Case(facts, evidence).quantity_without_effect
    if quantity is not None:
        yield FixedPart(code="fixed_part", label=LIKELY, quantity=quantity)


def _of_batch(evidence: Evidence) -> Iterator[Cause]:
    """Yield that the batch is as small as it can be, unless a server in the program has one of its own."""
    if evidence.batch_is_one and evidence.framework not in programs("own_batch"):
        yield Cause(code="batch_at_floor")


def _name(model: str) -> str:
    return model.replace("_", " ")
