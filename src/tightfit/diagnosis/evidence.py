"""Everything in a log that shows which tensor did not fit, the strongest first.

A printed shape; a tensor's printed name; the failing line's operator; the sizes of the printed model with its batch
and length. A request's size alone never names a tensor: others of the same model could have it.
"""

import re
from collections.abc import Iterator

import msgspec

from tightfit.diagnosis.failing_line import LineKind, line_before_message, line_kind, outer_kinds
from tightfit.diagnosis.framework_words import programs
from tightfit.diagnosis.model_budget import Budget, budget_of
from tightfit.diagnosis.named_card import least_bytes_in_words
from tightfit.diagnosis.picture_scores import picture_scores
from tightfit.diagnosis.printed_buffer import buffer_of_size
from tightfit.diagnosis.printed_module import printed_module
from tightfit.diagnosis.printed_sizes import sized_tensor
from tightfit.diagnosis.purpose import INFERENCE, TRAINING, purpose_of, purpose_of_words
from tightfit.diagnosis.tensor_fits import (
    FOUR_BIT,
    HALF,
    ONE_BYTE,
    Fit,
    Range,
    all_fits,
    range_of,
    shards,
    usual_weights,
    weights,
)
from tightfit.diagnosis.usual_models import Model, all_models, model_of, vocabulary_of
from tightfit.models.shape import PADDED_VOCAB
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.last_words import BELOW
from tightfit.oomlog.run_facts import PrintedShape, RunFacts
from tightfit.units import GIB

_LARGE = 2 * GIB
_OF_PARAMETERS = (
    "moved_model",
    "converted_weight",
    "created_weight",
    "optimizer_moment",
    "named_parameter",
    "dequantized_weight",
)
"""Tensors of one parameter's shape."""
_GATHERED = ("gathered_parameters", "state_dict")
"""Parameters of one module, mostly, put together from the shares of all ranks."""
_LEAST_WORDS = 30_000
_OF_LOGITS = ("logits", "float_outputs", "float_logits", "loss_of_logits")
_VOCABULARIES = {"nanochat": 65536, "nanogpt": PADDED_VOCAB}
"""Vocabularies of programs that train one model: nanochat's tokenizer and nanoGPT's padded one."""
_OF_ANY_PURPOSE = (None, "transformers", "accelerate", "sentence_transformers", "mace", "raft")
"""Programs that train as often as they do not; None is an unknown one."""
_BARE = 12
"""Characters besides the message, its class and its advice, below which a log without a traceback is bare."""
_CLASS = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|ERROR)\b(?:\(|: ?|\[[^\]\n]*\])?|\[?[Rr]ank ?\d+\]?:?")
"""The class of an exception, or a rank, before a message."""
_OF_PICTURES = re.compile(
    r"[Cc]onv[23]d|\b(?:images?|imgs?|masks?|pixels?|segment\w*|[Yy][Oo][Ll][Oo]\w*|[Uu]-?[Nn]et)\b|torchvision"
)
_OF_LANGUAGE = re.compile(
    r"vocab|token|lm_head|\b(?:gpt|llama|qwen|bert|t5|mistral|gemma)|transformers/|trl/", re.IGNORECASE
)
_ADVICE = re.compile(r"If reserved[^\n]*(?:\n[^\n]*?(?:ALLOC_CONF|fragmentation|Management|variables)[^\n]*){0,3}")


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Signs in a log of the failed tensor and of its model."""

    run: RunFacts
    model: Model | None = None
    within: Range | None = None
    """Bytes of the tensors that make the request; None if it is not stated."""
    line: LineKind | None = None
    shape: PrintedShape | None = None
    """A printed shape that has as many bytes as the request."""
    sized: Fit | None = None
    """The failing line's tensor with its sizes, where printed numbers make the request."""
    fits: tuple[Fit, ...] = ()
    """Tensors of the shown kind, or of the known model, that make the request."""
    is_complete: bool = False
    """True if batch, length and model are known, so that `fits` holds every kind of tensor."""
    is_all_parameters: bool = False
    """True if the request is as large as all parameters together, or as the printed share of each rank."""
    vocabulary: int | None = None
    budget: Budget | None = None
    purpose: str | None = None
    """training, inference, or None where the log does not show it."""
    purpose_sign: str = ""
    """The words of the log that show it; empty where its phase or its program does."""
    passes: int = 4
    """Passes into which the usual advice divides a batch: 2 where half of the request has room, else 4."""
    is_bare: bool = False
    """True if the log is hardly more than the message: anybody's run, perhaps one of nanoGPT."""

    @property
    def framework(self) -> str | None:
        return self.run.framework

    @property
    def tensor(self) -> str | None:
        """The kind of tensor that the log shows, or None."""
        if self.shape is not None:
            if self._is_over_vocabulary and (self.line is None or not self.line.is_named):
                return "logits"
            return self.line.tensor if self.line else "printed_tensor"
        if self.run.tensor_name:
            return "named_parameter"
        if self.line is not None:
            return self.line.tensor
        if self.sized is not None:
            return self.sized.tensor
        if self.is_all_parameters:
            return "shard"
        kinds = {fit.tensor for fit in self.fits} if self.is_complete else set()
        return kinds.pop() if len(kinds) == 1 and all(map(self._is_telling, self.fits)) else None

    @property
    def _is_over_vocabulary(self) -> bool:
        """True if the printed shape ends with the number of words of a usual model."""
        last = self.shape.shape[-1] if self.shape is not None else 0
        if self.shape is not None and self.shape.shape[:-1] == (last,):  # a square may be one of pairs
            return last == self.vocabulary
        known = {PADDED_VOCAB, *(each.vocabulary for each in all_models())}
        return last > _LEAST_WORDS and any(last * cards in known for cards in _TENSOR_PARALLEL)

    @property
    def _is_of_tokens(self) -> bool:
        """True for a buffer of compiled code with rows of a usual model's width that no weight of it has."""
        sizes = self.shape.shape if self.shape is not None else ()
        if len(sizes) != 2 or "empty_strided" not in self.run.text:
            return False
        of_width = [each for each in all_models() if each.hidden == sizes[1]]
        return bool(of_width) and all(sizes not in each.matrices(merged=True) for each in of_width)

    @property
    def _is_written(self) -> bool:
        """True if the sizes of the printed shape stand as numbers in a call that makes the tensor."""
        sizes = r", ?".join(map(str, self.shape.shape)) if self.shape is not None else "$"
        return bool(re.search(rf"\btorch\.(?:empty|zeros|ones|rand|randn|full)\(\(?\[?{sizes}\b", self.run.text))

    def _is_telling(self, fit: Fit) -> bool:
        """Return True if a size alone points to a tensor: not if some number of tokens always makes that size.

        DeepSpeed and FSDP have buckets of any size; most attention keeps no scores.
        """
        numbers = self.run.numbers
        if fit.tensor == "weight":
            return not {"deepspeed", "fsdp"} & self.run.signs
        whole = numbers.get("batch_size", 0) * numbers.get("length", 0)
        return fit.tensor == "shard" or (fit.tensor != "attention_scores" and fit.shape[0] == whole)

    @property
    def grows(self) -> str | None:
        """Quantity that the failed tensor grows with, or None."""
        if self.run.tensor_name and self.shape is None:
            return "saving" if "training_ended" in self.run.signs or "fsdp" in self.run.signs else "model"
        if self.line is not None and (self.line.is_named or not self._is_over_vocabulary):
            return self.line.grows
        if "optimizer_init" in self.run.signs:
            return "state"
        if "copies_modules" in self.run.signs:
            return "module_copy"
        if "large_dictionary" in self.run.signs:
            return "dictionary"
        if self._is_over_vocabulary:
            return "logits"
        if self.shape is not None:
            is_of_inputs = len(self.shape.shape) > 2 or self._is_of_tokens
            return "batch" if is_of_inputs and not self._is_written else None
        return _GROWS.get(self.tensor or "")

    @property
    def fit(self) -> Fit | None:
        """The only shape that makes the request, or None."""
        return self.fits[0] if len(self.fits) == 1 else None

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of logits in float32, and in 16 bits, that make the request."""
        if self.tensor not in _OF_LOGITS or not self.vocabulary or self.within is None or self.within.is_small:
            return None
        middle = (self.within.low + self.within.high) // 2
        bytes_of_token = 2 * self.vocabulary // self.run.numbers.get("tensor_parallel", 1)
        return middle // (2 * bytes_of_token), middle // bytes_of_token

    def gathers_on_first_card(self, facts: Facts) -> bool:
        """Return True if DataParallel gathers the outputs of all cards on the card that failed."""
        return "data_parallel" in self.run.signs and not facts.device_index

    @property
    def trains(self) -> bool:
        """True if the log is of a program that trains."""
        divides = "deepspeed" in self.run.signs or not _ALSO_SERVE.isdisjoint(self.run.frameworks)
        trainers = programs("trainers").intersection(self.run.frameworks) - _ALSO_SERVE
        return bool(trainers) or (divides and self.purpose != INFERENCE)

    @property
    def infers(self) -> bool:
        """True if the log is of a program that uses a trained model, and shows no sign of training."""
        return self.framework in programs("servers") or (self.purpose == INFERENCE and not self.trains)

    @property
    def is_of_unknown_purpose(self) -> bool:
        """True if a report of an unknown program shows neither a training nor the use of a trained model."""
        is_shown = self.purpose is not None or self.infers or self.trains or "batch_size" in self.run.numbers
        return not is_shown and self.framework in _OF_ANY_PURPOSE and not self.is_bare

    @property
    def is_on_windows(self) -> bool:
        """True if the report shows Windows, or WSL."""
        return not self.run.signs.isdisjoint({"windows", "wsl"})

    @property
    def is_of_one_process(self) -> bool:
        """True if the report shows neither several processes nor a library that divides the model among them."""
        run = self.run
        several = run.numbers.get("world_size", 1) > 1 or "zero_stage" in run.numbers
        return not several and not run.signs & {"fsdp", "deepspeed"} and not _DIVIDES.search(run.text)

    @property
    def may_be_of_nanogpt(self) -> bool:
        """True for nanoGPT's own log, and for a message alone; a report's title is a person's, about some program."""
        text = self.run.text
        is_open = self.is_bare and not text.lstrip().startswith("# ") and not OF_OTHERS.search(text)
        return self.framework == "nanogpt" or is_open

    @property
    def batch_is_one(self) -> bool:
        return self.run.numbers.get("batch_size") == 1 or "batch_at_floor" in self.run.signs

    @property
    def has_no_smaller_batch(self) -> bool:
        """True for a batch of one, and for a program without one by its user's words."""
        return self.batch_is_one or "no_batch" in self.run.signs


OF_OTHERS = re.compile(
    r"diffusion|audio|whisper|\bunet\b|\bvae\b|\b(?:images?|pictures?|photos?|videos?)\b|speech|voice", re.IGNORECASE
)
"""Words of programs whose models are no language models."""
_TENSOR_PARALLEL = (1, 2, 4)
"""Cards among which tensor parallelism divides a vocabulary."""
_ALSO_SERVE = frozenset({"deepspeed", "fsdp"})
"""Libraries of trainings that also use trained models."""
_DIVIDES = re.compile(
    r"fsdp|fullyshard|fully_shard|deepspeed|state_dict_utils|\bzero_?[123]?\b|nproc|\brank", re.IGNORECASE
)
"""Words of runs of several processes."""
_GROWS = {
    "weight": "model",
    "shard": "state",
    "logits": "logits",
    "attention_scores": "attention",
    "mlp_activation": "batch",
    "hidden_states": "batch",
}


def evidence_of(facts: Facts, run: RunFacts) -> Evidence:
    """Return the evidence in a log."""
    figure = facts.figures.get("requested_bytes")
    within = range_of(figure) if figure is not None and "request_beyond_1eb" not in facts.notes else None
    run = _without_servers(facts, run)
    model = model_of(run) or printed_module(run.text) or (_by_flat_tensor(run, within) if within else None)
    run = _with_adapters(run, model)
    line = _in_words_of(facts, run, line_kind(facts.frames) or _line_alone(facts, run))
    shape, shown = _printed_shape(run, within, line) if within else None, purpose_of(facts, run)
    purpose = shown.purpose if shown else None
    if run.framework in programs("quantizers"):
        purpose = INFERENCE
    elif run.framework in programs("trains_only"):
        purpose = TRAINING
    found = Evidence(
        run=run,
        model=model,
        within=within,
        line=line,
        shape=shape,
        vocabulary=model.vocabulary if model else _VOCABULARIES.get(run.framework or "") or vocabulary_of(run.family),
        budget=None if line is not None and line.grows == "hessian" else budget_of(facts, run, model, purpose),
        purpose=purpose,
        purpose_sign=shown.sign if shown and shown.purpose == purpose else "",
        passes=2 if _half_has_room(facts, line) else 4,
        is_bare=_is_bare(facts, run),
    )
    if within is None or within.is_small or shape is not None:
        return found
    found = _with_sizes(facts, found, within)
    fits, is_complete = _fits(found, within)
    if (
        not fits
        and found.tensor is None
        and model is not None
        and facts.phase in (None, "backward", "optimizer", "setup")
    ):
        fits = tuple(_whole(model, run, within))
        return _of_all(msgspec.structs.replace(found, fits=fits, is_all_parameters=bool(fits)))
    return _of_all(msgspec.structs.replace(found, fits=fits, is_complete=is_complete))


_TELLING = 0.02
"""Share of the card from which on a request shows how much a pass takes: a small one fails on any full card."""


def _half_has_room(facts: Facts, line: LineKind | None) -> bool:
    """Return True if half of the failing request has room: all that a pass holds shrinks with its batch.

    Logits are the last and mostly the largest tensors of a pass, so they show it however small they are.
    """
    requested, free, total = facts.requested_bytes, facts.free_bytes, facts.total_bytes
    if requested is None or free is None or total is None:
        return False
    is_telling = requested > _TELLING * total or (line is not None and line.grows == "logits")
    return is_telling and requested <= 2 * free


def _of_all(found: Evidence) -> Evidence:
    """Return the evidence with all parameters as trained, where a flat tensor of all of them shows it."""
    budget = found.budget
    if budget is None or budget.what != "training" or found.tensor != "shard":
        return found
    return msgspec.structs.replace(found, budget=msgspec.structs.replace(budget, is_sure=True))


_TRAINS = ("backward", "optimizer")
"""Phases that only a training has."""


_MUCH = 2
"""Times a card's memory from which on another card is a different one, and no part of it is in use."""


def named_bytes(facts: Facts, evidence: Evidence) -> int | None:
    """Return the least memory of the cards that a report of several names, if the one that failed is much smaller."""
    several = (facts.device_index or 0) > 0
    named = least_bytes_in_words(evidence.run.text) if several and facts.total_bytes else None
    return named if named is not None and named > _MUCH * (facts.total_bytes or 0) else None


def weights_leave_room(facts: Facts, evidence: Evidence) -> bool:
    """Return True if a server got no memory for a weight, and all its weights are far less than the named card has.

    Something else fills that card then, or it is not the one that was meant. A message with figures tells more.
    """
    budget = evidence.budget
    if budget is None or budget.what != "weights" or budget.total_bytes is None or facts.total_bytes is not None:
        return False
    is_weight = evidence.infers and evidence.grows == "model" and evidence.line is not None
    return is_weight and _MUCH * budget.low_bytes < budget.total_bytes


def _without_servers(facts: Facts, run: RunFacts) -> RunFacts:
    """Return the facts without programs that only use trained models, where the report shows a training.

    A traceback shows it by the phase, and a report without one by its title.
    """
    shows = facts.phase in _TRAINS if facts.frames else _trains_by_title(run.text)
    if not shows:
        return run
    kept = tuple(each for each in run.frameworks if each not in programs("servers"))
    return msgspec.structs.replace(run, frameworks=kept)


_TO_TRAIN = re.compile(r"\b(?:fine[- ]?tun(?:e|ing)|(?:pre-?)?train(?:ing)?)\b(?![- ]?(?:data|set|images|free))", re.I)


def _trains_by_title(text: str) -> bool:
    """Return True if the title of a report is about a training, and not about the use of what was trained."""
    title = text.lstrip().partition("\n")[0]
    return title.startswith("# ") and bool(_TO_TRAIN.search(title)) and purpose_of_words(title) == TRAINING


def _by_flat_tensor(run: RunFacts, within: Range) -> Model | None:
    """Return the one model of a family in the text that makes the request with all its parameters in one tensor.

    Only DeepSpeed and FSDP make such tensors.
    """
    if within.low < _LARGE or not run.signs & {"deepspeed", "fsdp"}:
        return None
    text = _squeezed(run.text)
    named = (each for each in all_models() if (family := _squeezed(each.name.rpartition(" ")[0])) and family in text)
    found = [each for each in named if any(fit.ranks == 1 for fit in shards(each, run, within))]
    return found[0] if len(found) == 1 else None


def _squeezed(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


_MOST_OF_ADAPTERS = 0.05
"""Share of a model's parameters that adapters have at most."""


def _with_adapters(run: RunFacts, model: Model | None) -> RunFacts:
    """Return the facts with the sign of adapters, where so few parameters of the model are trained."""
    trained = run.numbers.get("trainable")
    if not trained or model is None or trained > _MOST_OF_ADAPTERS * (model.parameters or 0):
        return run
    added = {"lora", "qlora"} if "quantized_4" in run.signs else {"lora"}
    return msgspec.structs.replace(run, signs=run.signs | added)


def _is_bare(facts: Facts, run: RunFacts) -> bool:
    """Return True for a message alone, of a run that may be anybody's."""
    shown = run.frameworks or facts.frames or facts.phase or facts.rank
    return not shown and _is_one_message(run.text, facts.message)


def _is_one_message(text: str, message: str) -> bool:
    """Return True if a log has hardly anything besides the message and PyTorch's advice behind it."""
    rest = _CLASS.sub("", _ADVICE.sub("", BELOW.sub("", text)))
    return len("".join(rest.split())) - len("".join(_CLASS.sub("", message).split())) < _BARE


def _in_words_of(facts: Facts, run: RunFacts, line: LineKind | None) -> LineKind | None:
    """Return the kind of a line; scores of pictures' classes in a loss are no logits over a vocabulary."""
    if line is not None and line.tensor in ("gathered_parameters", "state_dict") and facts.phase == "save":
        is_of_optimizer = any("_optim_utils" in each.file for each in facts.frames)
        tensor = "optimizer_state_dict" if is_of_optimizer else "state_dict"
        return msgspec.structs.replace(line, tensor=tensor, grows="saving")
    if line is not None and line.tensor == "attention_output" and _may_be_scores(facts, line):
        return msgspec.structs.replace(line, grows="attention", is_named=False)
    if line is not None and line.grows == "batch" and line.tensor in _OF_LAYERS and _is_in_autoencoder(facts):
        return msgspec.structs.replace(line, tensor="vae_activation", is_named=True)
    if line is not None and line.grows == "batch" and facts.phase == "optimizer":  # a decorator's call, no layer's
        return None
    if line is None or line.tensor != "loss_of_logits":
        return line
    if facts.phase == "sample":  # scores of the next token, and no loss
        return msgspec.structs.replace(line, tensor="logits")
    of_pictures = run.framework in programs("pictures") or _OF_PICTURES.search(run.text)
    if of_pictures and not _OF_LANGUAGE.search(run.text):
        return msgspec.structs.replace(line, tensor="activation", grows="batch", is_named=False)
    return line


_MAY_BE_SCORES = 4 * GIB
"""Bytes from which on a request of PyTorch's attention is hardly its input or output."""


def _may_be_scores(facts: Facts, line: LineKind) -> bool:
    """Return True if PyTorch's attention may have asked for its scores, as it does where no fused kernel fits."""
    requested = facts.figures.get("requested_bytes")
    is_of_torch = "scaled_dot_product_attention" in (line.frame.source or "")
    return is_of_torch and requested is not None and requested.high >= _MAY_BE_SCORES


_OF_LAYERS = ("activation", "convolution", "resized_image")


def _is_in_autoencoder(facts: Facts) -> bool:
    """Return True if one of the innermost frames is in an image or video autoencoder (VAE) of a library."""
    return any("autoencoder" in each.file for each in facts.frames[-8:])


def _line_alone(facts: Facts, run: RunFacts) -> LineKind | None:
    """Return the kind of a line of code that the report quotes without its traceback."""
    frame = line_before_message(run.text) if not facts.frames else None
    return line_kind([frame]) if frame else None


def _with_sizes(facts: Facts, found: Evidence, within: Range) -> Evidence:
    """Return the evidence with the sizes of the failing line's tensor, where the log's numbers make the request.

    Logits that are printed with three axes show the batch, where nothing else does.
    """
    if found.line is None:
        return msgspec.structs.replace(found, sized=picture_scores(found.run, within))
    inner = [found.line.frame, *(each for each in reversed(facts.frames[-_INNER:]) if each != found.line.frame)]
    sources, run, line = [each.source or "" for each in inner], found.run, found.line
    if facts.phase == "eval" and "eval_batch_size" in run.numbers:
        run = msgspec.structs.replace(run, numbers={**run.numbers, "batch_size": run.numbers["eval_batch_size"]})
    sized = sized_tensor(line.tensor, sources, run, found.model, within)
    if line.tensor == "activation" and sized is None:
        for each in outer_kinds(facts.frames):
            sized = sized or sized_tensor(each.tensor, [each.frame.source or ""], run, found.model, within)
            line = each if sized is not None and sized.tensor == each.tensor else line
    run = found.run
    if sized is not None and found.tensor in _OF_LOGITS and len(sized.shape) > 2 and "batch_size" not in run.numbers:
        run = msgspec.structs.replace(run, numbers={**run.numbers, "batch_size": sized.shape[0]})
    return msgspec.structs.replace(found, sized=sized, run=run, line=line)


_INNER = 4
"""Innermost frames whose lines may hold the operator and the names of its tensors."""


def _printed_shape(run: RunFacts, within: Range, line: LineKind | None) -> PrintedShape | None:
    for printed in run.shapes:
        if within.holds(printed.bytes):
            return printed
        state = PrintedShape(shape=printed.shape, dtype="uint8")
        if line is not None and _has_8_bit_state(line) and within.holds(state.bytes):
            return state
    return buffer_of_size(run.text, within)


def _has_8_bit_state(line: LineKind) -> bool:
    """Return True for a line of bitsandbytes that makes an optimizer's state of one byte a number."""
    return line.tensor == "optimizer_moment" and "uint8" in (line.frame.source or "")


def _whole(model: Model, run: RunFacts, within: Range) -> Iterator[Fit]:
    """Yield a flat tensor of all parameters; only of large models, where hardly any other tensor is as large."""
    if within.low > _LARGE:
        known = {1, run.numbers.get("world_size")}
        yield from (fit for fit in shards(model, run, within) if fit.ranks in known)


def _fits(found: Evidence, within: Range) -> tuple[tuple[Fit, ...], bool]:
    """Return the tensors that make the request, and True if every kind of tensor was looked at."""
    model, run, tensor = found.model, found.run, found.tensor
    if tensor in _OF_PARAMETERS:
        if "four_bit" in run.signs:
            return weights([model] if model and model.hidden else all_models(), within, FOUR_BIT), False
        if found.line is not None and _has_8_bit_state(found.line):
            return weights([model] if model and model.hidden else all_models(), within, ONE_BYTE), False
        if run.framework in programs("merge_weights"):
            known = [model] if model and model.hidden else all_models()
            return weights(known, within, HALF, merged=True), False
        if model and model.hidden:
            return weights([model], within), False
        return usual_weights(within, draws=found.framework in programs("pictures")), False
    if tensor in _GATHERED and model and model.hidden:
        return weights([model], within), False
    if tensor is not None or model is None:
        return (), False
    is_complete = bool(model.hidden and model.parameters and {"batch_size", "length"} <= run.numbers.keys())
    return (all_fits(model, run, within), True) if is_complete else ((), False)
