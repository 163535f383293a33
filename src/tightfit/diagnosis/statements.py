"""The sentences of each section of an explanation, for the text and for the page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec.structs import asdict, replace

from tightfit.diagnosis import kind_sentences, log_sentences
from tightfit.diagnosis.cause_records import SIMULATED, Cause
from tightfit.diagnosis.causes import by_size, is_of_device
from tightfit.diagnosis.culprit import Compared, Culprit, users_frame
from tightfit.diagnosis.foreign_config import Foreign
from tightfit.diagnosis.model_budget import bytes_of_trained, trains_all
from tightfit.diagnosis.model_run import ModelRun, can_be_step, parts_not_in_step
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.purpose import TRAINING
from tightfit.diagnosis.remedies import Remedy, SplitBatch
from tightfit.diagnosis.stable_codes import stable_code
from tightfit.diagnosis.usual_models import model_of, printed_name
from tightfit.oomlog.facts import Facts
from tightfit.units import format_bytes
from tightfit.wording.diagnosis import Words

if TYPE_CHECKING:
    from tightfit.diagnosis.explanation import Explanation


_DEVICES = {"npu_out_of_memory": "NPU", "xpu_out_of_memory": "XPU"}
"""Names of devices that their users do not call GPUs, by the kind of the failure."""
_GIVEN = ("batch_size", "accumulation", "length", "image", "world_size", "zero_stage")
"""Quantities of another program's configuration that are repeated, in this order."""


class Sentences:
    """Causes and remedies in one language."""

    def __init__(self, explanation: "Explanation", words: Words) -> None:
        self.config = " ".join(explanation.config_names) or "config.py"
        self._words, self._facts = words, explanation.facts

    def cause(self, cause: Cause) -> str:
        table = cause.code.partition("_")[0]
        if table == "kind" and self._facts is not None:
            return kind_sentences.said("cause", self._facts, self._words)
        return self._words("causes", cause.code, **asdict(cause))

    def told(self, cause: Cause) -> Cause:
        """Return a cause with its sentence and its stable code."""
        return replace(cause, sentence=self.cause(cause), stable_code=stable_code(cause.code))

    def title(self, remedy: Remedy) -> str:
        table = remedy.code.partition("_")[0]
        if table == "kind" and self._facts is not None:
            return kind_sentences.fix_said(remedy.code, self._facts, self._words)
        return self._words("remedies", remedy.code, **asdict(remedy.change))

    def reason(self, remedy: Remedy) -> str:
        return self._words("reasons", remedy.reason, **asdict(remedy.figures), **asdict(remedy.change))

    def paste(self, remedy: Remedy) -> tuple[str, ...]:
        """Return lines to copy, with the configuration's own name."""
        return tuple(line.replace("CONFIG", self.config) for line in remedy.paste)


def problem_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """Yield the failure, its tensor and its line of code."""
    facts, culprit = explanation.facts, explanation.culprit
    assert facts is not None
    yield _problem(facts, words)
    if "log_ends_within" in facts.notes:
        yield words("problem", "ends_within")
    yield from _told_phase(facts, words)
    yield from _told_purpose(explanation, words)
    on_device = facts.device_index and "tpu" not in facts.details
    device = _DEVICES.get(facts.kind, "GPU")
    if on_device and facts.rank is not None:
        yield words("problem", "on_device_of_rank", device=device, index=facts.device_index, rank=facts.rank)
    elif on_device:
        yield words("problem", "on_device", device=device, index=facts.device_index)
    elif facts.rank is not None:
        yield words("problem", "on_rank", rank=facts.rank)
    yield from _card_lines(explanation, words)
    if culprit is not None:
        yield from _culprit(culprit, words)
    frame = users_frame(facts)
    if frame is not None and frame.line is not None:
        if frame.file:
            yield words("problem", "at_module" if frame.function == "<module>" else "at", function=frame.function)
            yield f"    {frame.file}:{frame.line}" if frame.line is not None else f"    {frame.file}"
        else:  # the text begins behind it
            yield words("problem", "at_line", line=frame.line, function=frame.function)
        if frame.source:
            yield f"    {frame.source}"
    elif culprit is not None and culprit.source:
        yield f"    {culprit.source}"
    yield from log_sentences.follows_lines(explanation.reading, words)
    is_told = log_sentences.before_of(explanation.reading) is not None
    same = log_sentences.ranks_of(explanation.reading)
    if same:
        yield words("problem", "other_ranks", ranks=", ".join(map(str, same)))
    if (count := explanation.reading.others_count - is_told - len(same)) > 0:
        yield words("problem", "one_other") if count == 1 else words("problem", "others", count=count)


def _card_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """Yield the card of the simulation, where nobody named it: all that is simulated depends on it."""
    card = explanation.card
    if explanation.played and card is not None and card.how_named == "assumed":
        yield words("assumed", "card", name=card.name, total=card.total_bytes)


_OF_PASS = ("forward", "loss", "backward", "optimizer", "sample")
"""Phases of one pass, which the sentence on a runtime without memory does not name."""


def _phase_named(facts: Facts) -> str | None:
    """Return the phase under which the problem is told: a checkpoint may be loaded for another end than to resume."""
    resumes = "told_phase" in facts.details or any(
        "resum" in f"{each.function} {each.source}".lower() for each in facts.frames
    )
    return "restore" if facts.phase == "resume" and not resumes else facts.phase


def _told_phase(facts: Facts, words: Words) -> Iterator[str]:
    """Yield the phase, where the sentence on the failure does not name it."""
    has_figures = facts.free_bytes is not None and facts.total_bytes is not None and bool(facts.short_by_bytes)
    has_figures = has_figures and is_of_device(facts)
    if facts.phase is not None and not has_figures and is_of_device(facts):
        yield words("problem", "told_phase" if "told_phase" in facts.details else "in_phase", phase=_phase_named(facts))
    elif facts.kind == "cuda_driver" and facts.phase in _OF_PASS and "told_phase" not in facts.details:
        yield words("problem", "in_phase", phase=_phase_named(facts))
    elif "told_phase" in facts.details and not has_figures:
        yield words("problem", "told_phase", phase=_phase_named(facts))


def _told_purpose(explanation: "Explanation", words: Words) -> Iterator[str]:
    """Yield what the run was for, where no phase of it is known and no cause names it."""
    facts, purpose = explanation.facts, explanation.purpose
    is_named = any(each.code.startswith(_OF_PURPOSE) for each in explanation.causes)
    if facts is not None and facts.phase in (None, "forward") and purpose is not None and not is_named:
        sign = explanation.purpose_sign
        supposed, shown = _TRAINS if purpose == TRAINING else _INFERS
        yield words("problem", shown if sign else supposed, sign=sign)


_TRAINS, _INFERS = ("told_training", "told_training_by"), ("told_inference", "told_inference_by")
"""Sentences on a purpose that is supposed, and on one that words of the log show."""
_OF_PURPOSE = ("grows_saving", "self_test", "pass_of_", "held_by_server", "share_of_server")
"""Causes that name a training, or the use of a trained model."""


def _problem(facts: Facts, words: Words) -> str:
    if not is_of_device(facts):
        return kind_sentences.said("problem", facts, words)
    requested, free, total = facts.requested_bytes, facts.free_bytes, facts.total_bytes
    if requested is None:
        cut = "class_without_message" in facts.notes
        return words("problem", "message_missing" if cut else "figures_missing")
    allowed, allocated = facts.allowed_bytes, facts.allocated_bytes
    if facts.kind == "mps_out_of_memory" and allowed and allocated and allocated <= allowed:
        return words("problem", "of_allowed", requested=requested, allocated=allocated, allowed=allowed)
    if free is None or total is None:
        return words("problem", "request_only", requested=requested)
    short, phase = facts.short_by_bytes, _phase_named(facts)
    key = "device_enough_free" if short is None else "device_in_phase" if phase is not None else "device"
    key = "device_nearly" if short == 0 else key
    return words("problem", key, requested=requested, free=free, total=total, short=short, phase=phase)


def _culprit(culprit: Culprit, words: Words) -> Iterator[str]:
    yield f"[{words('labels', culprit.label)}] " + words("culprit", _key_of(culprit), **asdict(culprit))
    if culprit.label != SIMULATED:
        return
    different = words("units", "separator").join(_compared(each, words) for each in culprit.disagreements)
    allocated = next((each for each in culprit.compared if each.what == "allocated"), None)
    if not culprit.matches:
        yield words("culprit", "differs", compared=different)
        return
    if allocated is not None and allocated.agrees:
        yield words("culprit", "agrees", log=allocated.log, play=allocated.play)
    elif culprit.compared:
        yield words("culprit", "same_request")
    if different:
        yield words("culprit", "differs_slightly", compared=different)


def _key_of(culprit: Culprit) -> str:
    """Return the key of the sentence that names the tensor."""
    if culprit.label != SIMULATED:
        return f"{culprit.evidence}_sized" if culprit.evidence == "line" and culprit.shape else culprit.evidence
    if not culprit.shape:
        return "shapeless"
    return "eval" if culprit.iteration is not None else "step" if culprit.step is not None else "plain"


def _compared(each: Compared, words: Words) -> str:
    if each.what == "phase":
        return words("culprit", "compared_phase", log=each.log, play=each.play)
    return words("culprit", "compared_bytes", what=each.what, log=each.log, play=each.play)


def assumption_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """Yield assumptions of the verdicts on fixes: the configuration, where nobody named it."""
    if explanation.foreign is not None:
        yield from _foreign_lines(explanation, explanation.foreign, words)
    if explanation.unplayed_because:
        suffix = "_elsewhere" if explanation.is_elsewhere else "_unnamed" if explanation.is_unnamed else ""
        yield words("unplayed", explanation.unplayed_because + suffix)
    if explanation.model_run is not None:
        yield _step_line(explanation.model_run, words)
    if explanation.played == "log":
        yield words("assumed", "log")


def configuration_lines(explanation: "Explanation", foreign: Foreign, words: Words) -> Iterator[str]:
    """Yield what a configuration alone tells, where there is no log: its values, and the memory of its model."""
    run = explanation.reading.run
    model = model_of(run)
    yield from _foreign_lines(explanation, foreign, words)
    if model is not None and model.parameters:
        name, weights = printed_name(model, run), _BYTES_OF_WEIGHT * model.parameters
        yield words("assumed", "weights_alone", of=name, parameters=model.parameters, bytes=weights)
        if trains_all(run):
            low, high = (each * model.parameters for each in bytes_of_trained(run))
            yield words("assumed", "training_alone", low=low, high=high)
    yield words("assumed", "no_log")


_BYTES_OF_WEIGHT = 2
"""Bytes of a parameter in 16 bits."""


def _foreign_lines(explanation: "Explanation", foreign: Foreign, words: Words) -> Iterator[str]:
    """Yield what was read from another program's configuration, why it is not played, and what is missing."""
    run, model = explanation.reading.run, model_of(explanation.reading.run)
    values, separator = list(_given_values(explanation, foreign, words)), words("units", "separator")
    program = words.name("programs", foreign.program)
    parts = parts_not_in_step(foreign, run) if can_be_step(foreign) and explanation.played != "model" else ()
    if values and parts:
        told = separator.join(words("parts", part, value=run.texts.get("optimizer", "")) for part in parts)
        yield words("assumed", "read_as_counted", program=program, values=separator.join(values), parts=told)
    elif values:
        key = "read_as_played" if explanation.played == "model" else "read_as"
        yield words("assumed", key, program=program, values=separator.join(values))
    else:
        yield words("assumed", "nothing_read", program=program)
    if model is None:
        yield words("assumed", "model_unknown")


def _given_values(explanation: "Explanation", foreign: Foreign, words: Words) -> Iterator[str]:
    """Yield what was read of a configuration: its numbers, its model, and its parts."""
    run, model = explanation.reading.run, model_of(explanation.reading.run)
    for name in _GIVEN:
        if name == "world_size" and run.numbers.get(name) == 1:
            yield words("given", "one_card")
        elif name in run.numbers:
            yield words("given", name, value=run.numbers[name])
    if model is not None and model.name:
        yield words("given", "model", value=model.name)
    if foreign.found is None:
        return
    texts = foreign.found.texts
    yield from (words("given", name, value=texts[name]) for name in ("dtype", "optimizer") if name in texts)
    said = {"deepspeed"} if "zero_stage" in run.numbers else set()
    yield from (words("parts", part, value="") for part in _PARTS if part in foreign.found.parts - said)


_PARTS = (
    *("lora", "qlora", "eight_bit", "gptq", "float8", "frozen", "other_adapter", "saved_modules", "dora"),
    *("several_models", "checkpointing", "selective", "activation_offload", "host_state", "host_weights"),
    *("in_backward", "packed", "chunked_loss", "compiled", "deepspeed", "fsdp", "spread"),
)
"""Parts of a configuration that are repeated, in this order."""


def _step_line(run: ModelRun, words: Words) -> str:
    """Return the step that was played, and the quantities that the configuration leaves open."""
    parts = [words("step", "weights", dtype=run.weights)]
    parts += [words("step", "cast", dtype=run.cast)] if run.cast else []
    parts += [words("step", "lora", rank=run.rank) if run.rank else words("step", "full")]
    parts += [words("step", "checkpointing" if run.checkpointing else "kept")]
    parts += [words("step", "optimizer", optimizer=words.name("optimizers", run.optimizer))]
    text = words("units", "separator").join(parts)
    return words("assumed", "model_step", of=run.name, batch_size=run.batch, length=run.length, parts=text)


def expected_lines(explanation: "Explanation", said: Sentences, words: Words) -> Iterator[str]:
    """Yield the result of the best fix, and how to check it."""
    best, card, max_iters = explanation.best, explanation.card, explanation.max_iters
    if best is None:
        facts = explanation.facts
        other = facts is not None and not is_of_device(facts)
        yield (
            kind_sentences.expected_said(facts, words)
            if other and facts
            else words("expected", _without_fix(explanation))
        )
        return
    yield words("expected", "fits", title=said.title(best), device=best.device_bytes, room=best.figures.room_bytes)
    if isinstance(best.change, SplitBatch):
        yield words("expected", "result_same", effective=best.change.effective)
        step_s = best.change.step_s
        if step_s and max_iters is not None:
            yield words("expected", "time", step=step_s, max_iters=max_iters, all=step_s * max_iters)
    if max_iters is not None and card is not None:
        yield words("expected", "verify", command="")
        yield f"      {_command(card, explanation.config_names, best)}"
    if explanation.config_names and explanation.foreign is None:
        yield words("expected", "own", config=said.config)


def _without_fix(explanation: "Explanation") -> str:
    """Return the key of the sentence for an explanation in which no fix is known to help."""
    if any(each.code == "play_fits" for each in explanation.causes):
        return "configuration_fits"
    keys = {"config": "nothing_fits", "log": "nothing_fits", "script": "script_unchecked", "model": "model_unchecked"}
    is_nanogpt = explanation.framework == "nanogpt" and not explanation.is_elsewhere
    if explanation.unplayed_because == "maker":
        return "unchecked_elsewhere"
    has_no_card = explanation.unplayed_because == "card"
    return keys.get(explanation.played, "unchecked" if is_nanogpt or has_no_card else "unchecked_elsewhere")


def _command(card: Card, config_names: tuple[str, ...], best: Remedy) -> str:
    """Return a dry run of the user's own script with the best remedy."""
    used, context = format_bytes(card.used_bytes), format_bytes(card.context_bytes)
    words = [
        "tightfit dryrun",
        f'--gpu "{card.name}"',
        f"--memory {format_bytes(card.total_bytes).replace(' ', '')}",
        f"--used {used.replace(' ', '')} --context {context.replace(' ', '')}",
        "train.py",
        *config_names,
    ]
    if isinstance(best.change, SplitBatch):
        words += [f"--batch_size={best.change.size}", f"--gradient_accumulation_steps={best.change.passes}"]
    return " ".join(words)


_ARITHMETIC = {
    "reserved": ("reserved_bytes", "allocated", "unallocated"),
    "outside": ("outside_pytorch_bytes", "process", "reserved"),
    "others": ("others_bytes", "total", "free", "process"),
    "short": ("short_by_bytes", "requested", "free"),
}
"""Computed figures: a sentence's key, the figure, and the figures it is computed from."""


def arithmetic_lines(explanation: "Explanation", words: Words) -> Iterator[str]:
    """Yield how the figures follow from those of the log."""
    facts, culprit = explanation.facts, explanation.culprit
    assert facts is not None
    yield words("arithmetic", "message", message=facts.message)
    for key, (name, *terms) in _ARITHMETIC.items():
        result = facts.figures.get(name)
        known = {term: facts.figures[f"{term}_bytes"].bytes for term in terms if f"{term}_bytes" in facts.figures}
        if result is not None and not result.stated and len(known) == len(terms):
            yield words("arithmetic", key, result=result.bytes, low=result.low, high=result.high, **known)
    process, requested = facts.process_bytes, facts.requested_bytes
    if process and requested:
        yield words("arithmetic", "need", process=process, requested=requested, result=process + requested)
    if culprit is None:
        return
    if culprit.categories:
        yield words("arithmetic", "held", held=by_size(culprit.categories))
    if culprit.compared:
        compared = words("units", "separator").join(_compared(each, words) for each in culprit.compared)
        yield words("arithmetic", "compared", compared=compared)
