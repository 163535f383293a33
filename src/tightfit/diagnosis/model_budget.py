"""Memory that a model takes before any batch: weights, gradients and the optimizer's state, by arithmetic."""

import re

import msgspec

from tightfit.diagnosis.named_card import bytes_in_words
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.usual_models import Model, printed_name
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.ownership import had_room
from tightfit.oomlog.run_facts import RunFacts
from tightfit.units import GIB

_WHOLE, _WEIGHT, _QUANTIZED = 4.0, 2.0, 0.5
"""Bytes of a parameter in 32 bits, in 16 bits, and in 4 bits."""
_LEAST_STATE, _MOST_STATE = 8, 16
"""Bytes of a parameter in training with AdamW: 2 (weight) + 2 (gradient) + 2 + 2 (moments), all in 16 bits, up to
2 + 2 + 4 (float32 master) + 4 + 4, which is also 4 + 4 + 4 + 4 in float32."""
_SMALL_STATE = {
    "paged": 4,
    "8bit": 6,
    "adafactor": 4,
    "lomo": 2,
    "galore": 4,
    "sgd": 4,
    "muon": 6,
    "lion": 6,
    "adagrad": 6,
}
"""At least as many bytes of a parameter with other optimizers; the state of paged ones may lie in the host's memory."""
_GRADIENT = 2
"""Bytes of a parameter's gradient, which an optimizer's step in the backward pass frees at once."""
_WITH_WEIGHTS = ("forward", "loss", "sample", "warmup", "eval")
"""Phases in which a model that is only used has its weights on the card: they fit."""
_WITHOUT_TRAINING = ("sample", "compile")


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes before any batch, beside the card's."""

    model: str
    parameters: int
    low_bytes: int
    """At least: everything in 16 bits."""
    high_bytes: int
    """At most: float32 state."""
    low_each: float
    """Bytes of a parameter, at least."""
    high_each: float
    total_bytes: int | None
    """The card's, by the message or by the report's words; None if neither states it."""
    what: str
    """weights, training, or partial: a part of the parameters is trained."""
    trained: int | None = None
    """Parameters that are trained, where they are a part."""
    is_sure: bool = True
    """False if the log does not show that all parameters are trained."""
    is_divided: bool
    """True if the log shows that ZeRO or FSDP divides it among cards, in a way that it does not print."""
    ranks: int = 1
    """Cards among which it is divided, as printed."""
    parts: int = 1
    """Cards of a server among which each matrix is divided, as printed."""
    cards: int = 1
    """Cards of the run, as the report names them; the model may be divided among them."""

    @property
    def exceeds(self) -> bool:
        """True if even the low estimate is more than the card has."""
        return self.is_sure and self.total_bytes is not None and self.low_bytes > self.total_bytes

    @property
    def exceeds_if_all(self) -> bool:
        """True if it does not fit in case all parameters are trained, which the log does not show."""
        return not self.is_sure and self.total_bytes is not None and self.low_bytes > self.total_bytes

    @property
    def may_exceed(self) -> bool:
        return self.total_bytes is not None and self.high_bytes > self.total_bytes


def budget_of(facts: Facts, run: RunFacts, model: Model | None, purpose: str | None) -> Budget | None:
    """Return the memory that the model alone takes; None if its size or its use is unknown, or the log refutes it."""
    found = _estimate(facts, run, model, purpose)
    return None if found is not None and _is_refuted(found, run) else found


def _is_refuted(found: Budget, run: RunFacts) -> bool:
    """Return True if steps were made: by then weights, gradients and optimizer state had fitted together."""
    is_beyond = found.total_bytes is not None and found.high_bytes > found.total_bytes
    return found.what == "training" and is_beyond and not run.signs.isdisjoint(("stepped", "ran_first"))


def _estimate(facts: Facts, run: RunFacts, model: Model | None, purpose: str | None) -> Budget | None:
    """Return the memory by arithmetic; None if the model's size or its use is unknown."""
    parameters = model.parameters if model else None
    total = facts.total_bytes or run.numbers.get("card_gb", 0) * GIB or bytes_in_words(run.text)
    if model is None or not parameters or had_room(facts) or facts.phase == "save":  # by then it had fit
        return None
    if "host_weights" in run.signs:
        return None
    if "host_state" in run.signs and total is not None:
        return _budget(model, parameters, total, _WEIGHT, _WEIGHT, "weights", run)
    stored, trained = _stored(run), run.numbers.get("trainable", 0)
    if _LEAST_PART * parameters < trained <= parameters // 2:
        return _of_part(model, parameters, total, trained, run)
    if total is None and (run.signs & {"lora", "qlora"} or not _trains(facts, run, parameters)):
        if run.signs & {"lora", "qlora"} or purpose != TRAINING or model.kind != "causal" or run.frameworks:
            return None
        found = _budget(model, parameters, None, _LEAST_STATE, _MOST_STATE, "training", run)
        return msgspec.structs.replace(found, is_sure=False)
    if total is None:
        return _budget(model, parameters, None, _LEAST_STATE, _MOST_STATE, "training", run)
    if run.framework == "vllm" and "spread" in run.signs:  # each card holds a part
        parts = run.numbers.get("tensor_parallel", 1)
        found = _budget(model, parameters, total, stored / parts, stored / parts, "weights", run)
        return msgspec.structs.replace(found, low_each=stored, parts=parts) if parts > 1 else None
    if run.signs & {"lora", "qlora"} or facts.phase in _WITHOUT_TRAINING or run.framework in ("vllm", "comfyui"):
        each = _QUANTIZED if "qlora" in run.signs else stored
        if facts.phase in _WITH_WEIGHTS and each * parameters > total:
            return None
        return _budget(model, parameters, total, each, each, "weights", run)
    takes_all = facts.phase == "backward" and (facts.requested_bytes or 0) >= parameters  # no adapter's gradients
    if not _trains(facts, run, parameters) and not takes_all:
        if (purpose == TRAINING or facts.phase == "backward") and model.kind not in _OF_PICTURES:
            found = _budget(model, parameters, total, _LEAST_STATE, _MOST_STATE, "training", run)
            return msgspec.structs.replace(found, is_sure=False)
        if "spread" in run.signs or (
            facts.phase in _WITH_WEIGHTS and stored * parameters > total
        ):  # on several cards, or in a smaller format than 16 bits
            return None
        return _budget(model, parameters, total, stored, stored, "weights", run)
    low, high = bytes_of_trained(run)
    return _budget(model, parameters, total, low, high, "training", run)


def bytes_of_trained(run: RunFacts) -> tuple[int, int]:
    """Return the bytes of a trained parameter, at least and at most: weight, gradient and the optimizer's state."""
    optimizer = run.texts.get("optimizer", "").lower()
    small = next((size for word, size in _SMALL_STATE.items() if word in optimizer), None)
    low, high = (small, small) if small else (_LEAST_STATE, _MOST_STATE)
    if "paged" in optimizer:
        high = _SMALL_STATE["8bit"] if "8bit" in optimizer else _MOST_STATE
    return low - _GRADIENT if "in_backward" in run.signs else low, high


_LEAST_PART = 0.05
"""Share of the parameters from which on the trained ones have a state that counts; adapters have one per cent."""
_OF_PICTURES = ("diffusion", "convolutional", "vision")
"""Kinds of models of which mostly a part is trained, or which are small beside their activations."""
_LEAST_OF_PART, _MOST_OF_PART = 4, 14
"""Bytes of a trained parameter beside its weight: 2 (gradient) + 2 (moments in 8 bits), up to 2 + 4 + 8."""


def _of_part(model: Model, parameters: int, total: int | None, trained: int, run: RunFacts) -> Budget:
    """Return the memory of the gradients and the state of a part of the parameters."""
    low, high = _LEAST_OF_PART * trained / parameters, _MOST_OF_PART * trained / parameters
    found = _budget(model, parameters, total, low, high, "partial", run)
    return msgspec.structs.replace(found, trained=trained, is_sure=False)


_BITS = re.compile(r"\b[Ee][Xx][Ll][23][-_ ](\d)[._](\d{1,2})(?!\d)|(?<![\d.])(\d(?:\.\d{1,2})?)[ -]?bpw\b")
"""Bits of a weight in the name of a quantised model."""


def _stored(run: RunFacts) -> float:
    """Return the bytes of a parameter in the format that the log names; 16 bits where it names none."""
    if bits := _BITS.search(run.text):
        return float(".".join(each for each in (bits[1] or bits[3], bits[2]) if each)) / 8
    whole = _WHOLE if "float32" in run.signs else _WEIGHT
    return _QUANTIZED if "quantized_4" in run.signs else 1.0 if "quantized_8" in run.signs else whole


def _trains(facts: Facts, run: RunFacts, size: int) -> bool:
    """Return True if the log shows a training of all parameters of a model of this size."""
    if facts.phase == "optimizer":  # the state of adapters is small; a backward pass is one of any training
        return True
    trainable = run.numbers.get("trainable")
    if trainable:
        return trainable > run.numbers.get("parameters", size) // 2
    return trains_all(run)


def trains_all(run: RunFacts) -> bool:
    """Return True if a report's words, its configuration or its recipe's name are of a training of all parameters."""
    return "all_trained" in run.signs or bool(_TRAINS_ALL.search(run.text))


_TRAINS_ALL = re.compile(
    r"\bfull[_ -](?:parameters?[_ -]|param[_ -])?(?:fine[_ -]?tun\w*|sft|training)|\bfinetuning_type\W{1,3}full\b"
    r"|\bfull[_ -]param(?:eter)?s?\b[^\n]{0,40}(?:fine[_ -]?tun|train)|全(?:参数|量)(?:微调|训练|sft)",
    re.IGNORECASE,
)
"""Words and names of recipes for a training of all parameters."""


def _budget(
    model: Model, parameters: int, total: int | None, low: float, high: float, what: str, run: RunFacts
) -> Budget:
    stage, world = run.numbers.get("zero_stage"), run.numbers.get("world_size")
    divides = bool(run.signs & {"deepspeed", "fsdp"})
    of_all = stage == 3 or "full_shard" in run.signs
    ranks = world if divides and of_all and world else 1
    return Budget(
        model=printed_name(model, run),
        parameters=parameters,
        low_bytes=round(parameters * low / ranks),
        high_bytes=round(parameters * high / ranks),
        low_each=low,
        high_each=high,
        total_bytes=total,
        what=what,
        is_divided=divides and ranks == 1 and world != 1,
        ranks=ranks,
        cards=world or 1,
    )
