"""What to do: each piece of advice that people give for this failure, judged for this very run.

A play decides where one can; where a law decides (fewer iterations of an evaluation are not smaller ones), no play is
made and the reason says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from tightfit.diagnosis.causes import LIKELY, MEASURED, SIMULATED
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.variants import Outcome, Stage, Variant
from tightfit.errors import DeviceError
from tightfit.oomlog.facts import Facts

FITS, FITS_SLOWLY, DOES_NOT_FIT, NO_EFFECT, NOT_MEMORY, UNCHECKED = (
    "fits", "fits_slowly", "does_not_fit", "no_effect", "not_memory", "unchecked",
)  # fmt: skip
VERDICTS = (FITS, FITS_SLOWLY, UNCHECKED, DOES_NOT_FIT, NO_EFFECT, NOT_MEMORY)
"""The order in which they are shown."""
USUAL_SHARE = 16
"""Into how many passes the usual advice divides a batch: 64 into 4."""
_GROWING = ("activations", "logits", "inputs")
"""Categories that grow with the tokens of a pass."""
_CLEARLY = 1.15
"""Times what there is: what needs more by the line is not played."""
HOST_FLOPS = 5e11
"""FLOP/s of float32 matrix products on a desktop's processor: eight cores with AVX2 at 4 GHz peak at 1.0e12, and
training reaches about half."""
EXPANDABLE = "expandable_segments:True"
_ENVIRON = f"PYTORCH_CUDA_ALLOC_CONF={EXPANDABLE}"


class Remedy(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of advice and what it does here."""

    code: str
    """A key of the words' table `remedies`."""
    verdict: str
    reason: str
    """A key of the words' table `reasons`."""
    label: str
    """measured, simulated or likely."""
    exact: bool | None = None
    """Whether the result of training stays as it was, up to rounding; None where nothing would be changed."""
    device_bytes: int | None = None
    """Of this process at most, predicted; where it does not fit, what would be needed at that point."""
    saved_bytes: int | None = None
    """Against what the failing request would have needed."""
    slowdown: float | None = None
    """Predicted: 0.05 is 5% more time a step; None is not estimated."""
    paste: tuple[str, ...] = ()
    """Lines for the configuration, the program or the shell."""
    values: Mapping[str, Any] = msgspec.field(default_factory=dict)


def ranked(remedies: Sequence[Remedy]) -> tuple[Remedy, ...]:
    """What fits first, exact before lossy, then by how little it slows down; the rest in the order given."""
    return tuple(
        sorted(
            remedies,
            key=lambda each: (
                (VERDICTS.index(each.verdict), each.exact is False, each.slowdown or 0.0)
                if each.verdict == FITS
                else (VERDICTS.index(each.verdict), False, 0.0)
            ),
        )
    )


@dataclass(frozen=True, kw_only=True)
class Played:
    """What was played of a run."""

    base: Outcome
    """The run as configured."""
    train: Outcome
    """Its steps without an evaluation; `base` itself if that fails in a step, or fits."""
    remedies: tuple[Remedy, ...]


def play_all(facts: Facts, card: Card, run: Variant, stage: Stage, *, max_iters: int, eval_iters: int) -> Played:
    """Play the run and what may help; two batches of plays at most, the second for what the first left open."""
    plan = _Plan(facts, card, run, max_iters, eval_iters)
    plan.outcomes |= stage.play(plan.first())
    for name in ("base", "train"):
        if name in stage.failed:
            raise DeviceError(f"the run could not be played on the virtual GPU: {stage.failed[name]}")
    if plan.base.fits:  # what failed was another run
        return Played(base=plan.base, train=plan.base, remedies=())
    plan.outcomes |= stage.play(plan.second())
    return Played(base=plan.base, train=plan.train, remedies=ranked(plan.remedies()))


class _Plan:
    """The variants of one run, and what follows from their outcomes."""

    def __init__(self, facts: Facts, card: Card, run: Variant, max_iters: int, eval_iters: int) -> None:
        self._facts, self._card, self._run = facts, card, run
        self._max_iters, self._eval_iters = max_iters, eval_iters
        self.outcomes: dict[str, Outcome] = {}
        self._parts = _parts(run.batch_size)

    @property
    def base(self) -> Outcome:
        return self.outcomes["base"]

    @property
    def train(self) -> Outcome:
        return self.outcomes["train"] if self.base.in_evaluation else self.base

    # What is played

    def first(self) -> dict[str, Variant]:
        """The run and the advice that only a play can judge, the longest first."""
        run, found = self._run, dict[str, Variant]()
        if self._parts > 1:
            # An evaluation takes more without torch.compile, and is played so: what fits then fits with it.
            # One iteration for each split makes two, and so shows the logits that stay bound.
            found["split"] = self._split(self._parts, evaluate="eager" if run.compile else "as_is", eval_iters=1)
        found["base"] = run
        if run.compile:
            found["train"] = run.but(evaluate="none")
        if not run.compile and run.block_size > 1:
            found["shorter_block"] = self._half
        found["chunked_and_checkpointing"] = run.but(
            trainer="tightfit", loss="chunked", activation_checkpointing=run.n_layer, compile=False
        )
        if run.compile:
            found["compile_off"] = run.but(compile=False)
        else:
            found["train"] = run.but(evaluate="none")
        return found

    @property
    def _half(self) -> Variant:
        return self._run.but(block_size=self._run.block_size // 2)

    def _half_bytes(self) -> int | None:
        """What half the block would take, by a divided step's peak: what grows with tokens grows in a straight line.

        The planner rests on the same line (`tightfit.planner.search`), and tests hold it.
        """
        split = self.outcomes.get("split")
        if split is None or split.variant is None or not split.fits or not split.categories:
            return None
        times = self._half.tokens / split.variant.tokens
        growing = sum(split.categories.get(name, 0) for name in _GROWING)
        return round(split.device_bytes + (times - 1) * growing) if times >= 1 else None

    def second(self) -> dict[str, Variant]:
        """What the first plays leave open."""
        run, found = self._run, dict[str, Variant]()
        if "split" in self.outcomes and not self.outcomes["split"].fits and self._parts < run.batch_size:
            found["split"] = self._split(run.batch_size, evaluate="as_is")
        if self.base.in_evaluation and self.train.fits:
            found["release_logits"] = run.but(release=True)
            found["eval_micro_batch"] = run.but(eval_batch=self._eval_batch)
        by_line = self._half_bytes()
        clear = by_line is not None and by_line > _CLEARLY * self._room
        if run.block_size > 1 and "shorter_block" not in self.outcomes and not clear:
            found["shorter_block"] = self._half
        if run.compile and run.mode != "reduce-overhead" and self.train.fits:
            found["reduce_overhead"] = run.but(mode="reduce-overhead")
        if self._facts.cache_would_do is not False:
            found["expandable_segments"] = run.but(alloc_conf=EXPANDABLE)
        if self._others_might_do:
            found["close_others"] = run.but(used_bytes=0)
        if run.dtype == "float32":
            found["smaller_dtype"] = run.but(dtype="bfloat16" if self._card.capability >= (8, 0) else "float16")
        if not self._before_logits(self.train):
            found["chunked_loss"] = run.but(trainer="tightfit", loss="chunked")
        if not self.base.in_evaluation:
            found["checkpointing"] = run.but(
                trainer="tightfit", loss="full", activation_checkpointing=run.n_layer, compile=False
            )
        return found

    def _split(self, parts: int, **changes: Any) -> Variant:
        run = self._run
        return run.but(batch_size=run.batch_size // parts, accumulation=run.accumulation * parts, **changes)

    @property
    def _eval_batch(self) -> int:
        return max(1, self._run.batch_size // max(2, self._parts))

    @property
    def _others_might_do(self) -> bool:
        """Whether the failing request would fit if nobody else used the card."""
        facts = self._facts
        if facts.others_bytes is None or facts.free_bytes is None or facts.requested_bytes is None:
            return self._card.used_bytes > 0
        return facts.others_bytes > 0 and facts.free_bytes + facts.others_bytes >= facts.requested_bytes

    @staticmethod
    def _before_logits(outcome: Outcome) -> bool:
        """Whether it fails before any logits exist, so that they are not what is too much."""
        failure = outcome.failure
        return bool(failure) and failure is not None and failure["category"] != "logits" and not outcome.categories.get(
            "logits"
        ) and failure["phase"] in ("setup", "forward")  # fmt: skip

    # What follows

    def remedies(self) -> list[Remedy]:
        """Every piece of advice."""
        found = [
            self._of_split(),
            self._of_combined(),
            self._of_chunked(),
            self._of_checkpointing(),
            self._of_shorter_block(),
            *self._of_evaluation(),
            *self._of_compile(),
            self._of_expandable(),
            self._of_empty_cache(),
            self._of_dtype(),
            self._of_others(),
            Remedy(code="grad_scaler", verdict=NOT_MEMORY, reason="grad_scaler", label=LIKELY, exact=True,
                   paste=("scaler = torch.amp.GradScaler('cuda', enabled=(dtype == 'float16'))",)),
            self._of_host(),
        ]  # fmt: skip
        return [each for each in found if each is not None]

    def _judged(self, code: str, outcome: Outcome, *, exact: bool, paste: Sequence[str], **values: Any) -> Remedy:
        """A remedy by its own play."""
        failure = outcome.failure
        saved = self.base.device_bytes - outcome.device_bytes
        given: dict[str, Any] = {
            "device_bytes": outcome.device_bytes, "total_bytes": self._card.total_bytes,
            "room_bytes": self._room, "phase": outcome.phase,
        }  # fmt: skip
        if failure:
            given |= {"requested_bytes": failure["requested_bytes"], "free_bytes": failure["free_bytes"]}
        reason = "fits" if outcome.fits else "fails_at" if failure else "too_much"
        return Remedy(
            code=code,
            verdict=FITS if outcome.fits else DOES_NOT_FIT,
            reason=reason,
            label=SIMULATED,
            exact=exact,
            device_bytes=outcome.device_bytes,
            saved_bytes=saved,
            slowdown=self._slowdown(outcome),
            paste=tuple(paste),
            values=given | values,
        )

    @property
    def _room(self) -> int:
        """What this process may use of the card."""
        return self._card.total_bytes - self._card.used_bytes

    def _reference_s(self) -> float | None:
        """Seconds of a step as configured: played, or a divided step's without the launches that it has more."""
        if self.base.step_s is not None or self.train.step_s is not None:
            return self.base.step_s or self.train.step_s
        split = self.outcomes.get("split")
        if split is None or split.variant is None or split.step_s is None:
            return None
        more = split.variant.accumulation - self._run.accumulation
        return split.step_s - more * split.launch_s

    def _slowdown(self, outcome: Outcome) -> float | None:
        usual = self._reference_s()
        return outcome.step_s / usual - 1 if usual and outcome.step_s else None

    def _of_split(self) -> Remedy | None:
        run, outcome = self._run, self.outcomes.get("split")
        if outcome is None:
            return None
        assert outcome.variant is not None
        size, passes = outcome.variant.batch_size, outcome.variant.accumulation
        keys = (f"batch_size = {size}", f"gradient_accumulation_steps = {passes}")
        values = {"size": size, "passes": passes, "effective": run.batch_size * run.accumulation}
        found = self._judged("split", outcome, exact=True, paste=keys, **values)
        return replace(found, values={**found.values, "step_s": outcome.step_s})

    def _of_combined(self) -> Remedy | None:
        run = self._run
        keys = (
            "tightfit train CONFIG"
            f" --micro_batch={run.batch_size} --loss=chunked --activation_checkpointing={run.n_layer} --no-compile",
        )
        outcome = self.outcomes.get("chunked_and_checkpointing")
        if outcome is None:
            return None
        return self._judged("chunked_and_checkpointing", outcome, exact=True, paste=keys, blocks=run.n_layer)

    def _of_chunked(self) -> Remedy | None:
        keys = (f"tightfit train CONFIG --micro_batch={self._run.batch_size} --loss=chunked",)
        outcome = self.outcomes.get("chunked_loss")
        if outcome is not None:
            return self._judged("chunked_loss", outcome, exact=True, paste=keys)
        return (
            self._by_train("chunked_loss", "chunked_too_late", paste=keys) if self._before_logits(self.train) else None
        )

    def _of_checkpointing(self) -> Remedy:
        outcome = self.outcomes.get("checkpointing")
        keys = (f"tightfit train CONFIG --micro_batch={self._run.batch_size} --loss=full"
                f" --activation_checkpointing={self._run.n_layer} --no-compile",)  # fmt: skip
        if outcome is not None:
            return self._judged("checkpointing", outcome, exact=True, paste=keys, blocks=self._run.n_layer)
        return Remedy(
            code="checkpointing", verdict=DOES_NOT_FIT, reason="checkpointing_no_gradients",
            label=SIMULATED, exact=True, device_bytes=self.base.device_bytes, saved_bytes=0, paste=keys,
            values={"requested_bytes": self.base.failure["requested_bytes"] if self.base.failure else None},
        )  # fmt: skip

    def _by_train(self, code: str, reason: str, *, paste: Sequence[str], **values: Any) -> Remedy:
        """Advice that helps where the run fails now, while its training step fails, too."""
        train = self.train
        failure = train.failure or {"requested_bytes": None, "free_bytes": None}
        return Remedy(
            code=code,
            verdict=DOES_NOT_FIT,
            reason=reason,
            label=SIMULATED,
            exact=True,
            device_bytes=train.device_bytes,
            saved_bytes=self.base.device_bytes - train.device_bytes,
            paste=tuple(paste),
            values={
                "phase": train.phase, "device_bytes": train.device_bytes, "room_bytes": self._room,
                "requested_bytes": failure["requested_bytes"], "free_bytes": failure["free_bytes"],
                "batch_size": self._run.batch_size, **values,
            },
        )  # fmt: skip

    def _of_shorter_block(self) -> Remedy | None:
        half, paste = self._half.block_size, (f"block_size = {self._half.block_size}",)
        outcome, by_line = self.outcomes.get("shorter_block"), self._half_bytes()
        values = {"half": half, "block_size": self._run.block_size}
        if outcome is not None:
            return self._judged("shorter_block", outcome, exact=False, paste=paste, **values)
        if by_line is None:
            return None
        return Remedy(
            code="shorter_block", verdict=DOES_NOT_FIT, reason="by_line", label=LIKELY, exact=False,
            device_bytes=by_line, saved_bytes=self.base.device_bytes - by_line, paste=paste,
            values={**values, "device_bytes": by_line, "room_bytes": self._room},
        )  # fmt: skip

    def _of_evaluation(self) -> list[Remedy]:
        if not self.base.in_evaluation:
            names = ("release_logits", "eval_micro_batch", "eval_cpu", "eval_iters")
            return [
                Remedy(code=name, verdict=NO_EFFECT, reason="not_in_evaluation", label=SIMULATED, exact=True,
                       values={"phase": self.base.phase, **self._evaluation_values()})
                for name in names
            ]  # fmt: skip
        fewer = Remedy(
            code="eval_iters", verdict=NO_EFFECT, reason="eval_iters", label=SIMULATED, exact=True, saved_bytes=0,
            device_bytes=self.base.device_bytes,
            values={"iteration": self.base.iteration + 1, **self._evaluation_values()},
        )  # fmt: skip
        found = [fewer]
        release = ("# estimate_loss(): losses[k] = loss.item()", "del logits, loss")
        small = (f"tightfit train CONFIG --eval_micro_batch={self._eval_batch}",)
        first = self.base.iteration == 0
        split = self.outcomes.get("split")
        for code, paste in (("release_logits", release), ("eval_micro_batch", small), ("eval_cpu", ())):
            values = self._evaluation_values()
            if code == "release_logits" and first:
                found.append(Remedy(code=code, verdict=NO_EFFECT, reason="first_iteration", label=SIMULATED, exact=True,
                                    saved_bytes=0, paste=paste, values=values))  # fmt: skip
            elif self.train.fits:
                outcome = self.train if code == "eval_cpu" else self.outcomes.get(code)
                if outcome is not None:
                    found.append(self._judged(code, outcome, exact=True, paste=paste, **values))
            elif code == "eval_cpu":
                found.append(self._by_train(code, "eval_cpu_then_step", paste=paste, **values))
            else:
                # Without the logits of the iteration before, each begins as the first did, which passed; and a divided
                # step's evaluation is of the same few sequences.
                passes = code == "release_logits" or (split is not None and split.fits)
                reason = "eval_then_step" if passes else "step_anyway"
                found.append(self._by_train(code, reason, paste=paste, **values))
        return found

    def _evaluation_values(self) -> dict[str, Any]:
        run = self._run
        forward = run.flops_per_token / 3 * run.tokens
        return {
            "eval_batch": self._eval_batch,
            "eval_iters": self._eval_iters,
            "iterations": 2 * self._eval_iters,
            "host_tflops": HOST_FLOPS / 1e12,
            "host_eval_s": forward * 2 * self._eval_iters / HOST_FLOPS,
        }

    def _of_compile(self) -> list[Remedy]:
        if not self._run.compile:
            return [Remedy(code="compile_off", verdict=NO_EFFECT, reason="compile_is_off", label=MEASURED, exact=True)]
        plain = self.outcomes.get("compile_off")
        found = [self._judged("compile_off", plain, exact=True, paste=("compile = False",))] if plain else []
        graphs, paste = self.outcomes.get("reduce_overhead"), ('model = torch.compile(model, mode="reduce-overhead")',)
        if graphs is not None:
            judged = self._judged("reduce_overhead", graphs, exact=True, paste=paste)
            found.append(replace(judged, reason=judged.reason if graphs.fits else "graphs_fail"))
        elif self._run.mode != "reduce-overhead" and not self.train.fits:
            found.append(self._by_train("reduce_overhead", "graphs_never_less", paste=paste))
        return found

    def _of_expandable(self) -> Remedy:
        outcome = self.outcomes.get("expandable_segments")
        if outcome is not None:
            return self._judged("expandable_segments", outcome, exact=True, paste=(f"export {_ENVIRON}",))
        return _cache_remedy("expandable_segments", self._facts, paste=(f"export {_ENVIRON}",))

    def _of_empty_cache(self) -> Remedy:
        return _cache_remedy("empty_cache", self._facts, paste=("torch.cuda.empty_cache()",))

    def _of_dtype(self) -> Remedy:
        dtype, outcome = self._run.dtype, self.outcomes.get("smaller_dtype")
        if outcome is not None and outcome.variant is not None:
            chosen = outcome.variant.dtype
            paste = (f"dtype = '{chosen}'",)
            return self._judged("smaller_dtype", outcome, exact=False, paste=paste, dtype=dtype, other=chosen)
        other = "float16" if dtype == "bfloat16" else "bfloat16"
        return Remedy(
            code="other_dtype", verdict=NO_EFFECT, reason="same_size", label=SIMULATED, exact=False, saved_bytes=0,
            device_bytes=self.base.device_bytes, paste=(f"dtype = '{other}'",), values={"dtype": dtype, "other": other},
        )  # fmt: skip

    def _of_others(self) -> Remedy:
        outcome = self.outcomes.get("close_others")
        if outcome is None:
            return _others_remedy(self._facts)
        judged = self._judged(
            "close_others", outcome, exact=True, paste=("nvidia-smi",), others_bytes=self._card.used_bytes
        )
        room = self._card.total_bytes
        return replace(judged, values={**judged.values, "room_bytes": room})

    def _of_host(self) -> Remedy:
        run = self._run
        step_s = run.flops_per_token * run.tokens * run.accumulation / HOST_FLOPS
        slowdown = step_s / usual - 1 if (usual := self._reference_s()) else None
        return Remedy(
            code="cpu_run", verdict=FITS_SLOWLY, reason="cpu_run", label=LIKELY, exact=True, slowdown=slowdown,
            paste=("device = 'cpu'", "compile = False"),
            values={"step_s": step_s, "all_s": step_s * self._max_iters, "max_iters": self._max_iters,
                    "host_tflops": HOST_FLOPS / 1e12},
        )  # fmt: skip


def _parts(batch_size: int) -> int:
    """Into how many equal passes a batch is divided: sixteen as the usual advice has it, or the most below it.

    >>> _parts(64), _parts(12), _parts(1), _parts(7)
    (16, 12, 1, 7)
    """
    divisors = [parts for parts in range(1, batch_size + 1) if batch_size % parts == 0]
    below = [parts for parts in divisors if parts <= USUAL_SHARE]
    return below[-1] if below[-1] > 1 or batch_size == 1 else divisors[1]


def _cache_remedy(code: str, facts: Facts, *, paste: tuple[str, ...]) -> Remedy:
    """By the message's own figures: a request that is more than what is free and cached together fails in any case."""
    values = {"cache_bytes": facts.cache_bytes, "free_bytes": facts.free_bytes,
              "requested_bytes": facts.requested_bytes, "short_by_bytes": facts.short_by_bytes}  # fmt: skip
    if code == "empty_cache":
        reason = "empty_cache" if facts.cache_bytes is not None else "empty_cache_unstated"
        return Remedy(
            code=code, verdict=NO_EFFECT, reason=reason, label=MEASURED, exact=True, paste=paste, values=values
        )
    if facts.cache_would_do is False:
        return Remedy(
            code=code, verdict=DOES_NOT_FIT, reason="cache_too_small", label=MEASURED, exact=True, paste=paste,
            saved_bytes=facts.cache_bytes, values=values,
        )  # fmt: skip
    reason = "cache_might_do" if facts.cache_would_do else "unstated"
    return Remedy(code=code, verdict=UNCHECKED, reason=reason, label=LIKELY, exact=True, paste=paste, values=values)


def _others_remedy(facts: Facts) -> Remedy:
    """Closing other programs, by the message's own figures."""
    others, free, requested = facts.others_bytes, facts.free_bytes, facts.requested_bytes
    if others is None or free is None or requested is None:
        return Remedy(code="close_others", verdict=UNCHECKED, reason="unstated", label=LIKELY, exact=True,
                      paste=("nvidia-smi",))  # fmt: skip
    if others == 0:
        return Remedy(code="close_others", verdict=NO_EFFECT, reason="no_others", label=MEASURED, exact=True)
    enough = free + others >= requested
    need = (facts.process_bytes or 0) + requested
    return Remedy(
        code="close_others",
        verdict=UNCHECKED if enough else DOES_NOT_FIT,
        reason="others_might_do" if enough else "others_too_little",
        label=MEASURED,
        exact=True,
        saved_bytes=others,
        paste=("nvidia-smi",),
        values={
            "others_bytes": others, "free_bytes": free, "requested_bytes": requested, "room_bytes": free + others,
            "need_bytes": need, "total_bytes": facts.total_bytes,
        },
    )  # fmt: skip


def unplayed(facts: Facts, *, of_device: bool) -> tuple[Remedy, ...]:
    """Without a configuration: what the log's figures decide, and the rest in general form, not checked."""
    if not of_device:
        return (Remedy(code=f"kind_{facts.kind}", verdict=UNCHECKED, reason="general", label=LIKELY),)
    general = [
        Remedy(code="split_general", verdict=UNCHECKED, reason="no_configuration", label=LIKELY, exact=True,
               paste=("batch_size = batch_size / N", "gradient_accumulation_steps = gradient_accumulation_steps * N")),
        Remedy(code="chunked_general", verdict=UNCHECKED, reason="no_configuration", label=LIKELY, exact=True,
               paste=("tightfit train CONFIG --loss=chunked",)),
        Remedy(code="checkpointing_general", verdict=UNCHECKED, reason="no_configuration", label=LIKELY, exact=True,
               paste=("x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)",)),
    ]  # fmt: skip
    if any(each.function == "estimate_loss" for each in facts.frames):
        general.insert(1, Remedy(
            code="release_logits", verdict=UNCHECKED, reason="no_configuration", label=LIKELY, exact=True,
            paste=("# estimate_loss(): losses[k] = loss.item()", "del logits, loss"),
        ))  # fmt: skip
    return ranked(
        [
            *general,
            _cache_remedy("expandable_segments", facts, paste=(f"export {_ENVIRON}",)),
            _cache_remedy("empty_cache", facts, paste=("torch.cuda.empty_cache()",)),
            _others_remedy(facts),
        ]
    )
