"""The verdict on every remedy of a run that was played."""

from collections.abc import Iterator

from msgspec.structs import replace

from tightfit.diagnosis.cause_records import LIKELY, MEASURED
from tightfit.diagnosis.outcome import Outcome
from tightfit.diagnosis.plays import Plays
from tightfit.diagnosis.remedies import (
    DOES_NOT_FIT,
    FITS_SLOWLY,
    NO_CHANGE,
    NO_EFFECT,
    NOT_MEMORY,
    Change,
    Evaluation,
    Figures,
    HostRun,
    OtherDtype,
    Recomputation,
    Remedy,
    ShorterBlock,
    SplitBatch,
    close_others,
    empty_cache,
    expandable_segments,
    figures_of,
    judged,
    ranked,
    to_paste,
)

HOST_FLOPS = 5e11
"""FLOP/s of float32 matrix products on a desktop's processor: eight cores with AVX2 at 4 GHz peak at 1.0e12, and
training reaches about half."""


def verdicts(plays: Plays, *, max_iters: int, eval_iters: int) -> tuple[Remedy, ...]:
    """Return every remedy with its verdict, the best first; none if the run itself fits."""
    if plays.base.fits:  # another run failed
        return ()
    return ranked(list(_Verdicts(plays, max_iters, eval_iters).remedies()))


class _Verdicts:
    """Remedies of one run, by the outcomes of its plays."""

    def __init__(self, plays: Plays, max_iters: int, eval_iters: int) -> None:
        self._plays, self._config = plays, plays.run.config
        self._base, self._train, self._outcomes = plays.base, plays.train, plays.outcomes
        self._max_iters, self._eval_iters = max_iters, eval_iters
        self._room = plays.card.room_bytes

    def remedies(self) -> Iterator[Remedy]:
        yield from self._split()
        yield from self._recomputed()
        yield from self._shorter_block()
        if self._base.in_evaluation:
            yield from self._evaluation()
        else:
            yield from self._not_in_evaluation()
        yield from self._compile()
        yield self._played("expandable_segments") or expandable_segments(self._plays.facts)
        yield empty_cache(self._plays.facts)
        yield self._dtype()
        yield self._others()
        yield Remedy(
            code="grad_scaler", verdict=NOT_MEMORY, reason="grad_scaler", label=LIKELY, paste=to_paste("grad_scaler")
        )
        yield self._host()

    def _played(
        self, name: str, *, exact: bool = True, room_bytes: int = 0, change: Change = NO_CHANGE, **pasted: int | str
    ) -> Remedy | None:
        """Judge a remedy by its own play; None if it was not played. `pasted` fills its lines in."""
        outcome = self._outcomes.get(name)
        if outcome is None:
            return None
        return judged(
            name,
            outcome,
            before=self._base,
            room_bytes=room_bytes or self._room,
            exact=exact,
            paste=to_paste(name, **pasted),
            slowdown=self._slowdown(outcome),
            change=change,
        )

    def _by_train(self, code: str, reason: str, paste: tuple[str, ...], change: Change = NO_CHANGE) -> Remedy:
        """Judge a remedy that helps where the run fails now, while its training step fails, too."""
        train = self._train
        return Remedy(
            code=code,
            verdict=DOES_NOT_FIT,
            reason=reason,
            device_bytes=train.device_bytes,
            saved_bytes=self._base.device_bytes - train.device_bytes,
            paste=paste,
            change=change,
            figures=figures_of(train, self._room, batch_size=self._config.batch_size),
        )

    def _no_effect(
        self, code: str, reason: str, *, exact: bool = True, paste: tuple[str, ...] = (), change: Change = NO_CHANGE
    ) -> Remedy:
        """Judge a remedy that leaves the failing allocation as it is."""
        return Remedy(
            code=code,
            verdict=NO_EFFECT,
            reason=reason,
            exact=exact,
            device_bytes=self._base.device_bytes,
            saved_bytes=0,
            paste=paste,
            change=change,
        )

    def _step_s(self) -> float | None:
        """Seconds of a step as configured: played, or a divided step's without its additional launches."""
        if self._base.step_s is not None or self._train.step_s is not None:
            return self._base.step_s or self._train.step_s
        split = self._outcomes.get("split")
        if split is None or split.step_s is None:
            return None
        passes = self._plays.variants["split"].config.gradient_accumulation_steps
        return split.step_s - (passes - self._config.gradient_accumulation_steps) * split.launch_s

    def _slowdown(self, outcome: Outcome) -> float | None:
        usual = self._step_s()
        return outcome.step_s / usual - 1 if usual and outcome.step_s else None

    def _split(self) -> Iterator[Remedy]:
        outcome = self._outcomes.get("split")
        if outcome is None:
            return
        split = self._plays.variants["split"].config
        size, passes = split.batch_size, split.gradient_accumulation_steps
        change = SplitBatch(size=size, passes=passes, effective=self._config.effective_batch, step_s=outcome.step_s)
        yield from _known(self._played("split", change=change, size=size, passes=passes))

    def _recomputed(self) -> Iterator[Remedy]:
        """Judge tightfit's trainer: the loss in chunks, activation checkpointing, and both."""
        size, blocks = self._config.batch_size, self._config.n_layer
        change = Recomputation(blocks=blocks)
        both = self._played("chunked_and_checkpointing", change=change, batch_size=size, blocks=blocks)
        chunked = self._played("chunked_loss", batch_size=size)
        if chunked is None and self._plays.steps_fail_before_logits:
            chunked = self._by_train("chunked_loss", "chunked_too_late", to_paste("chunked_loss", batch_size=size))
        yield from _known(both, chunked)
        checkpointing = self._played("checkpointing", change=change, batch_size=size, blocks=blocks)
        failure = self._base.failure
        yield checkpointing or Remedy(
            code="checkpointing",
            verdict=DOES_NOT_FIT,
            reason="checkpointing_no_gradients",
            device_bytes=self._base.device_bytes,
            saved_bytes=0,
            paste=to_paste("checkpointing", batch_size=size, blocks=blocks),
            figures=Figures(requested_bytes=failure.requested_bytes if failure else None),
        )

    def _shorter_block(self) -> Iterator[Remedy]:
        half, by_line = self._plays.half.block_size, self._plays.half_bytes
        change = ShorterBlock(half=half, block_size=self._config.block_size)
        played = self._played("shorter_block", exact=False, change=change, half=half)
        if played is not None:
            yield played
        elif by_line is not None:
            yield Remedy(
                code="shorter_block",
                verdict=DOES_NOT_FIT,
                reason="by_line",
                label=LIKELY,
                exact=False,
                device_bytes=by_line,
                saved_bytes=self._base.device_bytes - by_line,
                paste=to_paste("shorter_block", half=half),
                change=change,
                figures=Figures(device_bytes=by_line, room_bytes=self._room),
            )

    def _not_in_evaluation(self) -> Iterator[Remedy]:
        for code in ("release_logits", "eval_micro_batch", "eval_cpu", "eval_iters"):
            yield Remedy(
                code=code,
                verdict=NO_EFFECT,
                reason="not_in_evaluation",
                change=self._change_of_evaluation(),
                figures=Figures(phase=self._base.phase),
            )

    def _evaluation(self) -> Iterator[Remedy]:
        change, first = self._change_of_evaluation(), self._base.iteration == 0
        fewer = replace(change, iteration=self._base.iteration + 1)
        yield self._no_effect("eval_iters", "eval_iters", change=fewer)
        if first:
            release = self._no_effect(
                "release_logits", "first_iteration", paste=to_paste("release_logits"), change=change
            )
            yield replace(release, device_bytes=None)
        if self._train.fits:
            batch = self._plays.eval_batch
            released = None if first else self._played("release_logits", change=change)
            yield from _known(released, self._played("eval_micro_batch", change=change, eval_batch=batch))
            yield judged(
                "eval_cpu",
                self._train,
                before=self._base,
                room_bytes=self._room,
                slowdown=self._slowdown(self._train),
                change=change,
            )
        else:
            yield from self._evaluation_then_step(change, first=first)

    def _evaluation_then_step(self, change: Evaluation, *, first: bool) -> Iterator[Remedy]:
        """Judge a smaller evaluation where the training step fails, too."""
        # Without the logits of the iteration before, each begins like the first, which passed; and a divided step's
        # evaluation has the same few sequences.
        split = self._outcomes.get("split")
        if not first:
            yield self._by_train("release_logits", "eval_then_step", to_paste("release_logits"), change)
        reason = "eval_then_step" if split is not None and split.fits else "step_anyway"
        paste = to_paste("eval_micro_batch", eval_batch=self._plays.eval_batch)
        yield self._by_train("eval_micro_batch", reason, paste, change)
        yield self._by_train("eval_cpu", "eval_cpu_then_step", (), change)

    def _change_of_evaluation(self) -> Evaluation:
        forward_flops = self._plays.run.flops_per_token / 3 * self._plays.run.tokens
        iterations = 2 * self._eval_iters
        return Evaluation(
            eval_batch=self._plays.eval_batch,
            iterations=iterations,
            host_tflops=HOST_FLOPS / 1e12,
            host_eval_s=forward_flops * iterations / HOST_FLOPS,
        )

    def _compile(self) -> Iterator[Remedy]:
        if not self._config.compile:
            yield Remedy(code="compile_off", verdict=NO_EFFECT, reason="compile_is_off", label=MEASURED)
            return
        yield from _known(self._played("compile_off"))
        graphs = self._played("reduce_overhead")
        if graphs is not None:
            yield graphs if graphs.reason == "fits" else replace(graphs, reason="graphs_fail")
        elif self._config.mode != "reduce-overhead" and not self._train.fits:
            yield self._by_train("reduce_overhead", "graphs_never_less", to_paste("reduce_overhead"))

    def _dtype(self) -> Remedy:
        dtype, smaller = self._config.dtype, self._plays.variants.get("smaller_dtype")
        other = smaller.config.dtype if smaller else "float16" if dtype == "bfloat16" else "bfloat16"
        change = OtherDtype(dtype=dtype, other=other)
        return self._played("smaller_dtype", exact=False, change=change, other=other) or self._no_effect(
            "other_dtype", "same_size", exact=False, paste=to_paste("other_dtype", other=other), change=change
        )

    def _others(self) -> Remedy:
        """Judge closing other programs: then the whole card is there."""
        played = self._played("close_others", room_bytes=self._plays.card.total_bytes)
        return played or close_others(self._plays.facts)

    def _host(self) -> Remedy:
        run, usual = self._plays.run, self._step_s()
        step_s = run.flops_per_token * run.tokens * self._config.gradient_accumulation_steps / HOST_FLOPS
        return Remedy(
            code="cpu_run",
            verdict=FITS_SLOWLY,
            reason="cpu_run",
            label=LIKELY,
            slowdown=step_s / usual - 1 if usual else None,
            paste=to_paste("cpu_run"),
            change=HostRun(
                step_s=step_s, all_s=step_s * self._max_iters, max_iters=self._max_iters, host_tflops=HOST_FLOPS / 1e12
            ),
        )


def _known(*remedies: Remedy | None) -> Iterator[Remedy]:
    yield from (each for each in remedies if each is not None)
