"""A failure as the rules of the advice read it: yes-or-no properties of its request, its program and its pass."""

import re
from typing import NamedTuple

from tightfit.diagnosis.evidence import Evidence
from tightfit.diagnosis.figure_causes import is_oversized
from tightfit.diagnosis.framework_words import has_own, programs
from tightfit.diagnosis.measures import without_effect
from tightfit.diagnosis.one_item import takes_one_item
from tightfit.diagnosis.own_options import options_of
from tightfit.diagnosis.report_words import shows
from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts

_BEFORE_AUTOCAST = ("T0", "T1")
"""Messages of PyTorch up to 1.3, which has neither autocast nor PEFT's adapters."""
_BEFORE_REENTRANT = ("T0", "T1", "T2")
"""Messages of PyTorch up to 1.9."""
_OF_SCORES = 2**29
"""Bytes from which on a request of a program that uses a trained model may well be of attention's scores."""
_OWN_SHARE, _SMALL_SHARE = 0.85, 0.02
"""Shares of a card: what a process holds if it nearly fills it, and a request that is small beside that."""
_OF_INPUTS = ("split_general", "smaller_picture", "shorter_length")
"""Remedies by less in one pass."""
_CARDS = 8
"""Times the card from which on a request is no matter of a batch or a length."""
_OF_NOBODY = 2**40
"""Bytes that no card has."""
_ROOM = 0.8
"""Share of the card that one sequence of a batch may take, for a smaller batch to be a fix of an oversized request."""


_OF_LANGUAGE = ("causal", "seq2seq", "encoder", "vision_language")
"""Kinds of usual models that Transformers loads as language models."""
_DATA_PARALLEL = re.compile(r"\bDataParallel\b|\bData Parallel\b")
"""PyTorch's class for several cards in one process. The name of the other class ends alike."""


class Case(NamedTuple):
    """A failure, with the evidence in its log."""

    facts: Facts
    evidence: Evidence

    @property
    def run(self) -> RunFacts:
        return self.evidence.run

    @property
    def program(self) -> str | None:
        return self.evidence.framework

    def has_own(self, code: str) -> bool:
        """Return True if the user's program has words of its own for a remedy."""
        return has_own(code, self.program or "")

    def is_of(self, group: str) -> bool:
        """Return True if the user's program is one of a group (program_groups.toml)."""
        return self.program in programs(group)

    def shows(self, words: str) -> bool:
        """Return True if the report has one of the words of a list (report_words.toml)."""
        return shows(self.run.text, words)

    def has_sign(self, *signs: str) -> bool:
        """Return True if the run shows one of the signs."""
        return not self.run.signs.isdisjoint(signs)

    @property
    def first_card_works_alone(self) -> bool:
        """True if the report says that nn.DataParallel leaves all work to the first card."""
        wraps = _DATA_PARALLEL.search(self.run.text) is not None
        return wraps and not self.facts.device_index and self.shows("subject.first_card_works")

    @property
    def is_oversized(self) -> bool:
        """True if the request alone is larger than the card."""
        return is_oversized(self.facts)

    @property
    def is_absurd(self) -> bool:
        """True for a request of so many cards that a count, an index or a shape must be wrong."""
        requested, total = self.facts.requested_bytes or 0, self.facts.total_bytes
        is_many = total is not None and requested > _CARDS * total
        is_open = self.evidence.grows in (None, "batch") and self.evidence.sized is None
        is_open = is_open and (self.program is None or self.is_of("libraries"))
        return (is_many or requested >= _OF_NOBODY) and is_open

    @property
    def fills_card_at_once(self) -> bool:
        """True if one request of a training is most of the card, and no optimizer's or model's tensor."""
        total, requested = self.facts.figures.get("total_bytes"), self.facts.requested_bytes or 0
        if self.evidence.infers or self.evidence.grows in ("state", "model"):
            return False
        return total is not None and requested > total.bytes / 2

    @property
    def batch_would_do(self) -> bool:
        """True if the request of one sequence of the printed batch, in proportion, has room on the card."""
        batch = self.run.numbers.get("batch_size", 1)
        return (self.facts.requested_bytes or 0) / batch < _ROOM * (self.facts.total_bytes or 0)

    @property
    def takes_one_item(self) -> bool:
        """True if an unknown program works on one document or recording at a time, by its lines or its user's words."""
        return (self.program is None or self.is_of("libraries")) and takes_one_item(self.facts, self.run)

    @property
    def keeps_nothing(self) -> bool:
        """True if the program keeps no activations for a backward pass."""
        phase = self.facts.phase
        return phase in ("eval", "sample") or (self.evidence.infers and phase in (None, "forward"))

    @property
    def has_small_scores(self) -> bool:
        """True if a program uses a trained model, and nothing shows that attention's scores did not fit."""
        if not self.evidence.infers or self.evidence.grows is not None:
            return False
        is_large = (self.facts.requested_bytes or 0) >= _OF_SCORES
        return not (is_large and self.has_own("fused_attention"))

    @property
    def has_large_state(self) -> bool:
        """True if the optimizer's state may be much of the memory: of language models, or by the failing line."""
        evidence = self.evidence
        is_shown = (
            self.facts.phase == "optimizer"
            or self.has_own("optimizer_8bit")
            or evidence.grows in ("state", "model")
            or evidence.budget is not None
        )
        is_shown = is_shown or self.quantity_without_effect is not None
        return is_shown or evidence.trains or evidence.is_bare or self.is_of("language_models")

    @property
    def is_too_large(self) -> bool:
        """True if the known model does not fit the card."""
        return self.evidence.budget is not None and self.evidence.budget.exceeds

    @property
    def exceeds_in_parts(self) -> bool:
        """True if a server's weights do not even fit divided among its cards."""
        return self.evidence.budget is not None and self.evidence.budget.exceeds and self.evidence.budget.parts > 1

    @property
    def trains_part(self) -> bool:
        """True if a part of the parameters is trained, and a large one."""
        return self.evidence.budget is not None and self.evidence.budget.what == "partial"

    @property
    def without_effect(self) -> frozenset[str]:
        """Codes of the quantities that by the report change nothing, and of a length that is at its floor."""
        found = without_effect(self.run.text)
        return found | {"shorter_length"} if self.run.numbers.get("length") == 1 else found

    @property
    def quantity_without_effect(self) -> str | None:
        """The remedy by smaller inputs that changes nothing: the state of the training fills the card."""
        is_open = (self.program is None or self.is_of("libraries")) and not self.evidence.infers
        found = [each for each in _OF_INPUTS if each in self.without_effect]
        return found[0] if found and is_open else None

    @property
    def fits_smaller_model(self) -> bool:
        """True if the user's own model fails in a larger size only, by the report."""
        is_open = self.program is None or self.is_of("libraries")
        return is_open and self.shows("subject.model_size")

    @property
    def may_be_of_language(self) -> bool:
        """True if the model may be a language model, which the libraries of adapters and quantised weights know."""
        if self.is_of("trainers") or self.is_of("language_models") or self.has_sign("deepspeed", "fsdp", "full_shard"):
            return True
        is_named = self.shows("subject.language_model") or self.shows("named_inputs.shorter_length")
        model = self.evidence.model
        return is_named or (model is not None and model.kind in _OF_LANGUAGE)

    @property
    def adapts(self) -> bool:
        """True if adapters are trained."""
        return self.has_sign("lora", "qlora")

    @property
    def adapts_quantized(self) -> bool:
        """True if the model has 4-bit weights below its adapters."""
        return self.has_sign("qlora", "four_bit")

    @property
    def is_attentions_output(self) -> bool:
        """True if the failing line shows the output of a fused attention."""
        return self.evidence.line is not None and self.evidence.line.tensor == "attention_output"

    @property
    def computes_scores_whole(self) -> bool:
        """True for a call of PyTorch's attention that asks for far more than its output: no kernel was fused."""
        return self.is_attentions_output and self.asks_for_much

    @property
    def may_attend(self) -> bool:
        """True if the user's own program works on sequences, and the failing line shows no other tensor."""
        return self.evidence.line is None and not self.is_of("applications") and self.shows("subject.sequences")

    @property
    def shows_no_code(self) -> bool:
        """True for a person's report of an unknown program without a line of code: it may be anybody's."""
        is_report = self.run.text.lstrip().startswith("# ")
        is_open = self.program is None and not self.facts.frames
        return is_report and is_open and not self.shows("subject.own_code") and self.evidence.line is None

    @property
    def is_foreign(self) -> bool:
        """True for an unknown program that uses a trained model, in a report without any line of its code."""
        uses = self.evidence.infers or self.evidence.is_of_unknown_purpose
        return uses and self.program is None and not self.facts.frames and not self.shows("subject.own_code")

    @property
    def is_full_of_its_own(self) -> bool:
        """True if tensors of this process nearly fill the card, and the request is small: weights, mostly."""
        total, held, requested = (
            self.facts.figures.get(f"{name}_bytes") for name in ("total", "allocated", "requested")
        )
        if total is None or held is None or requested is None:
            return False
        return held.bytes >= _OWN_SHARE * total.bytes and requested.bytes <= _SMALL_SHARE * total.bytes

    @property
    def shows_vae(self) -> bool:
        """True unless the log shows that another part than the VAE failed."""
        shown = " ".join(f"{each.file} {each.function} {each.source}" for each in self.facts.frames)
        if not shown:
            return self.shows("subject.vae")
        return shows(shown, "subject.vae") or self.shows("subject.vae_node")

    @property
    def held_beside(self) -> str | None:
        """The library that holds much of the card beside PyTorch: tensorflow, simulator or None."""
        outside = self.facts.not_reserved_bytes or self.facts.outside_pytorch_bytes or 0
        if outside < _MUCH_OUTSIDE * (self.facts.total_bytes or 0) or not self.facts.total_bytes:
            return None
        if self.has_sign("tensorflow_beside"):
            return "tensorflow"
        return "simulator" if self.program == "isaac" else None

    @property
    def is_below_limit(self) -> bool:
        """True for a request that the card had room for, and the program's own limit did not."""
        requested, free = self.facts.requested_bytes, self.facts.free_bytes
        is_limited = self.facts.allowed_bytes is not None
        return is_limited and requested is not None and free is not None and free >= requested

    @property
    def asks_for_much(self) -> bool:
        """True for a request of a large part of the card: a larger input rather than what is kept."""
        requested, total = self.facts.requested_bytes, self.facts.total_bytes
        return requested is not None and total is not None and requested > _MUCH_OF_CARD * total

    @property
    def makes_optimizer_state(self) -> bool:
        """True for the first step of an optimizer in a message without figures: it makes its state there."""
        is_unstated = self.facts.phase == "optimizer" and self.facts.requested_bytes is None
        return is_unstated and bool(_FIRST_STEP.search(self.run.text))

    def calls(self, *functions: str) -> bool:
        """Return True if one of the functions is in the traceback."""
        return any(each.function.rpartition(".")[2] in functions for each in self.facts.frames)

    def passes_file(self, name: str) -> bool:
        """Return True if a file with this name in its path is in the traceback."""
        return any(name in each.file for each in self.facts.frames)

    @property
    def has_parts(self) -> bool:
        """True if a program works on parts of a batch: by its words, or by an option that the report prints."""
        return self.has_own("less_at_once") or bool(options_of("less_at_once", self.run.text))

    @property
    def is_before_reentrant(self) -> bool:
        """True for a PyTorch up to 1.9, whose checkpoint() has no argument use_reentrant."""
        return self.facts.torch_format in _BEFORE_REENTRANT

    def is_before(self, code: str) -> bool:
        """Return True for a PyTorch older than a remedy's library, unless the program has words of its own for it."""
        return self.facts.torch_format in _BEFORE_AUTOCAST and not self.has_own(code)


_MUCH_OF_CARD = 0.3
"""Share of the card from which on one request shows a larger input."""
_MUCH_OUTSIDE = 0.3
"""Share of the card from which on memory outside of PyTorch is more than contexts and a desktop."""
_FIRST_STEP = re.compile(r"(?<![\d/])0/\d{1,9} \[0?0:00<\?")
"""A bar before its first step is done."""
_READS = re.compile(r"\btorch\.load\((?!.*\bmap_location)")
"""A line that loads a checkpoint to where it was saved from."""
_BEFORE_A_STEP = (None, "load", "resume", "setup")
"""Phases in which a checkpoint may be read; None is unknown."""


def loads_on_first_card(case: Case) -> bool:
    """Return True if every process loads its checkpoint onto the first card: by the report, or by a rank's line."""
    may_be = case.facts.phase in _BEFORE_A_STEP or "told_phase" in case.facts.details
    is_told = may_be and case.shows("subject.reads_checkpoint") and case.shows("subject.all_on_first_card")
    return is_told or reads_onto_first_card(case.facts)


def reads_onto_first_card(facts: Facts) -> bool:
    """Return True if a rank other than the first failed on the first card, in a line that loads a checkpoint."""
    is_of_other = facts.phase in ("load", "resume") and bool(facts.rank) and facts.device_index == 0
    return is_of_other and any(_READS.search(each.source or "") for each in facts.frames)
