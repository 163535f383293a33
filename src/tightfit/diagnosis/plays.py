"""The plays that judge the remedies of one run.

A play decides where one can. Where a law decides, no play is made and the reason names the law: fewer iterations of an
evaluation are not smaller ones.
"""

from dataclasses import replace

from msgspec.structs import replace as with_fields

from tightfit.config import TrainConfig
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.outcome import Outcome
from tightfit.diagnosis.remedies import USUAL_SHARE
from tightfit.diagnosis.variants import Stage, Variant
from tightfit.errors import DeviceError
from tightfit.oomlog.facts import Facts
from tightfit.wording import say

EXPANDABLE = "expandable_segments:True"
_GROWING = ("activations", "logits", "inputs")
"""Categories that grow with the tokens of a pass."""
_CLEARLY = 1.15
"""Multiple of the available memory above which a need read off the line is not played."""


class Plays:
    """Variants of one run on one card, and their outcomes by name."""

    def __init__(self, facts: Facts, card: Card, run: Variant) -> None:
        self.facts, self.card, self.run = facts, card, run
        self.outcomes: dict[str, Outcome] = {}
        self.variants: dict[str, Variant] = {}
        self._parts = _parts(run.config.batch_size)

    def play(self, stage: Stage) -> None:
        """Play the run, and variants that may help; a second batch plays those that depend on the first."""
        self._play(stage, self._first())
        for name in ("base", "train"):
            if name in stage.failed:
                raise DeviceError(say("explain.plays.not_played", reason=stage.failed[name]))
        if not self.base.fits:
            self._play(stage, self._second())

    def _play(self, stage: Stage, variants: dict[str, Variant]) -> None:
        self.variants |= variants
        self.outcomes |= stage.play(variants)

    @property
    def base(self) -> Outcome:
        """The run as configured."""
        return self.outcomes["base"]

    @property
    def train(self) -> Outcome:
        """The run's steps without an evaluation; `base` itself if that fails in a step, or fits."""
        return self.outcomes["train"] if self.base.in_evaluation else self.base

    @property
    def half(self) -> TrainConfig:
        """The run with half the block."""
        return replace(self.run.config, block_size=self.run.config.block_size // 2)

    @property
    def half_bytes(self) -> int | None:
        """Bytes that half the block would take: the peak of a divided step, and a straight line in tokens from there.

        The planner rests on the same line (`tightfit.planner.search`), and tests hold it.
        """
        split = self.outcomes.get("split")
        if split is None or not split.fits or not split.categories:
            return None
        times = self.half.batch_size * self.half.block_size / self.variants["split"].tokens
        growing = sum(split.categories.get(name, 0) for name in _GROWING)
        return round(split.device_bytes + (times - 1) * growing) if times >= 1 else None

    @property
    def eval_batch(self) -> int:
        """Sequences of a smaller evaluation's pass."""
        return max(1, self.run.config.batch_size // max(2, self._parts))

    @property
    def steps_fail_before_logits(self) -> bool:
        """True if a training step fails before any logits exist, so that they are not the excess."""
        train, failure = self.train, self.train.failure
        if failure is None or failure.category == "logits" or train.categories.get("logits"):
            return False
        return failure.phase in ("setup", "forward")

    def _first(self) -> dict[str, Variant]:
        """Return the run and the advice that only a play can judge, the longest first."""
        run, config, found = self.run, self.run.config, dict[str, Variant]()
        compiled = config.compile is True
        if self._parts > 1:
            # An evaluation takes more without torch.compile, and is played so: a plan that fits then fits with it.
            # One iteration for each split makes two, and so shows the logits that stay bound.
            split = _of(run, self._split(self._parts))
            found["split"] = with_fields(split, evaluate="eager" if compiled else "as_is", eval_iters=1)
        found["base"] = run
        if compiled:
            found["train"] = with_fields(run, evaluate="none")
        elif config.block_size > 1:
            found["shorter_block"] = _of(run, self.half)
        found["chunked_and_checkpointing"] = _by_tightfit(self._recomputed("chunked"))
        if compiled:
            found["compile_off"] = _of(run, replace(config, compile=False))
        else:
            found["train"] = with_fields(run, evaluate="none")
        return found

    def _second(self) -> dict[str, Variant]:
        """Return the variants that the first plays leave open."""
        run, config, found = self.run, self.run.config, dict[str, Variant]()
        if "split" in self.outcomes and not self.outcomes["split"].fits and self._parts < config.batch_size:
            found["split"] = _of(run, self._split(config.batch_size))
        if self.base.in_evaluation and self.train.fits:
            found["release_logits"] = with_fields(run, release=True)
            found["eval_micro_batch"] = _of(run, replace(config, eval_micro_batch=self.eval_batch))
        clearly_too_much = (self.half_bytes or 0) > _CLEARLY * self.card.room_bytes
        if config.block_size > 1 and "shorter_block" not in self.outcomes and not clearly_too_much:
            found["shorter_block"] = _of(run, self.half)
        if config.compile and config.mode != "reduce-overhead" and self.train.fits:
            found["reduce_overhead"] = _of(run, replace(config, mode="reduce-overhead"))
        if self.facts.cache_would_do is not False:
            found["expandable_segments"] = with_fields(run, alloc_conf=EXPANDABLE)
        if self._others_might_do:
            found["close_others"] = with_fields(run, used_bytes=0)
        if config.dtype == "float32":
            dtype = "bfloat16" if self.card.capability >= (8, 0) else "float16"
            found["smaller_dtype"] = _of(run, replace(config, dtype=dtype))
        if not self.steps_fail_before_logits:
            found["chunked_loss"] = _by_tightfit(replace(config, loss="chunked"))
        if not self.base.in_evaluation:
            found["checkpointing"] = _by_tightfit(self._recomputed("full"))
        return found

    def _split(self, parts: int) -> TrainConfig:
        config = self.run.config
        passes = config.gradient_accumulation_steps * parts
        return replace(config, batch_size=config.batch_size // parts, gradient_accumulation_steps=passes)

    def _recomputed(self, loss: str) -> TrainConfig:
        config = self.run.config
        return replace(config, loss=loss, activation_checkpointing=config.n_layer, compile=False)

    @property
    def _others_might_do(self) -> bool:
        """True if the failing request would fit if nobody else used the card."""
        facts = self.facts
        if facts.others_bytes is None or facts.free_bytes is None or facts.requested_bytes is None:
            return self.card.used_bytes > 0
        return facts.others_bytes > 0 and facts.free_bytes + facts.others_bytes >= facts.requested_bytes


def _of(run: Variant, config: TrainConfig) -> Variant:
    return with_fields(run, config=config)


def _by_tightfit(config: TrainConfig) -> Variant:
    return Variant(config=config, trainer="tightfit")


def _parts(batch_size: int) -> int:
    """Return the equal passes that a batch is divided into: sixteen by the usual advice, or the most below it.

    >>> _parts(64), _parts(12), _parts(1), _parts(7)
    (16, 12, 1, 7)
    """
    divisors = [parts for parts in range(1, batch_size + 1) if batch_size % parts == 0]
    below = [parts for parts in divisors if parts <= USUAL_SHARE]
    return below[-1] if below[-1] > 1 or batch_size == 1 else divisors[1]
