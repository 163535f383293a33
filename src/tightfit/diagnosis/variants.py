"""Variants of a run, and what each does when the simulation service plays it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import msgspec

from tightfit.config import PRETRAINED, TrainConfig
from tightfit.diagnosis.named_card import Card
from tightfit.gpus import resolve_gpu
from tightfit.models.shape import flops_per_token, parameter_count, vocabulary_of
from tightfit.simulation.client import Simulator
from tightfit.simulation.requests import Failed, LoopPlay, LoopRequest, LoopSettings, Moment, StepRequest, StepTrace
from tightfit.simulation.speed import LAUNCH_S, Work, rates_of

_LOADED = ("n_layer", "n_head", "n_embd", "vocab_size", "bias")
"""What nanoGPT takes from OpenAI's checkpoints (model.py, from_pretrained); it cuts the positions afterwards."""
_SEEN_PASSES = 3
"""More passes of a step than these take no more memory."""
_PLAYED_STEPS = 2
"""The second step is the first with optimizer state."""
_PLAYED_ITERATIONS = 2
"""More iterations of an evaluation allocate the same again."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A run, or the run with something changed; in nanoGPT's loop unless `trainer` is tightfit's."""

    batch_size: int
    block_size: int
    accumulation: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    dropout: float
    bias: bool
    dtype: str
    compile: bool
    mode: str = "default"
    grad_clip: float = 1.0
    eval_iters: int = _PLAYED_ITERATIONS
    evaluate: str = "as_is"
    """as_is, eager (without torch.compile: it takes more) or none."""
    eval_batch: int = 0
    """0: `batch_size`."""
    release: bool = False
    """Whether each iteration of an evaluation ends with `del logits, loss`."""
    used_bytes: int | None = None
    """What other processes use, if it is to differ from the card's."""
    alloc_conf: str = ""
    """PYTORCH_CUDA_ALLOC_CONF."""
    trainer: str = "nanogpt"
    """nanogpt or tightfit."""
    loss: str = "full"
    activation_checkpointing: int = 0

    @property
    def tokens(self) -> int:
        """Of one forward pass."""
        return self.batch_size * self.block_size

    @property
    def parameters(self) -> int:
        """Numbers that are trained, positions among them."""
        return parameter_count(self)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward."""
        return flops_per_token(self, self.block_size)

    def but(self, **changes: Any) -> "Variant":
        """The same with something changed."""
        return replace(self, **changes)


def variant_of(config: TrainConfig, card: Card) -> Variant:
    """What nanoGPT's train.py does with a configuration on a card: what is left open is as its defaults are."""
    shape: dict[str, Any] = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
                             "vocab_size": vocabulary_of(config), "bias": config.bias}  # fmt: skip
    if config.init_from in PRETRAINED:
        shape |= {key: getattr(PRETRAINED[config.init_from], key) for key in _LOADED}
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if card.capability >= (8, 0) else "float16"
    return Variant(
        batch_size=config.batch_size,
        block_size=config.block_size,
        accumulation=config.gradient_accumulation_steps,
        dropout=config.dropout,
        dtype=dtype,
        compile=True if config.compile == "auto" else bool(config.compile),
        mode=config.mode,
        grad_clip=config.grad_clip,
        **shape,
    )


class Stage:
    """Plays variants on one card. To be closed."""

    def __init__(self, card: Card, *, workers: int = 2) -> None:
        self._card, self._simulator = card, Simulator(workers=workers)
        self.failed: dict[str, str] = {}
        """Why a play could not be made, by its name."""

    @property
    def played(self) -> int:
        """Plays that were made, not found on disk."""
        return self._simulator.played

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._simulator.close()

    def play(self, variants: Mapping[str, Variant]) -> dict[str, "Outcome"]:
        """Play each variant; return its outcome by its name. The longest should come first.

        A variant that could not be played is left out, and `failed` holds the reason; another may still be judged.
        """
        answers = self._simulator.play([_request(variant, self._card) for variant in variants.values()])
        outcomes = {}
        for (name, variant), answer in zip(variants.items(), answers, strict=True):
            if isinstance(answer, Failed):
                self.failed[name] = answer.error
            elif isinstance(answer, LoopPlay) and answer.findings.outcome == "error":
                self.failed[name] = answer.findings.stopped_because
            elif isinstance(answer, LoopPlay):
                outcomes[name] = Outcome.of_loop(variant, answer)
            elif isinstance(answer, StepTrace):
                outcomes[name] = Outcome.of_step(variant, answer, self._card)
        return outcomes


def _request(variant: Variant, card: Card) -> LoopRequest | StepRequest:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": variant.alloc_conf} if variant.alloc_conf else {}
    if variant.trainer == "tightfit":
        return _step_request(variant, card, environ)
    return LoopRequest(
        settings=LoopSettings(
            batch_size=variant.batch_size,
            block_size=variant.block_size,
            gradient_accumulation_steps=variant.accumulation,
            n_layer=variant.n_layer,
            n_head=variant.n_head,
            n_embd=variant.n_embd,
            vocab_size=variant.vocab_size,
            dropout=variant.dropout,
            bias=variant.bias,
            dtype=variant.dtype,
            compile=variant.compile,
            mode=variant.mode,
            grad_clip=variant.grad_clip,
            learning_rate=6e-4,
            passes=min(variant.accumulation, _SEEN_PASSES),
            steps=_PLAYED_STEPS,
            evaluate=variant.evaluate,
            eval_iters=variant.eval_iters,
            eval_batch=variant.eval_batch or variant.batch_size,
            release=variant.release,
        ),
        gpu=card.name,
        memory_bytes=card.total_bytes,
        used_bytes=card.used_bytes if variant.used_bytes is None else variant.used_bytes,
        context_bytes=card.context_bytes,
        environ=environ,
    )


def _step_request(variant: Variant, card: Card, environ: dict[str, str]) -> StepRequest:
    share = variant.batch_size * min(variant.accumulation, _SEEN_PASSES)
    config = TrainConfig(
        batch_size=share,
        gradient_accumulation_steps=1,
        micro_batch=variant.batch_size,
        eval_micro_batch=variant.eval_batch or variant.batch_size,
        block_size=variant.block_size,
        n_layer=variant.n_layer,
        n_head=variant.n_head,
        n_embd=variant.n_embd,
        vocab_size=variant.vocab_size,
        dropout=variant.dropout,
        bias=variant.bias,
        dtype=variant.dtype,
        compile=variant.compile,
        loss=variant.loss,
        activation_checkpointing=variant.activation_checkpointing,
        grad_clip=variant.grad_clip,
        device="cuda",
        fit="off",
    )
    # The steps alone: its evaluation, of as many sequences by the same loss, keeps nothing and so takes less.
    return StepRequest(whole=False, config=config, share=share, gpu=card.name, environ=environ)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a variant did."""

    variant: Variant | None
    """None for somebody's own script."""
    fits: bool
    device_bytes: int
    """Of this process at most, with what is outside PyTorch's allocator; where it failed, with the request."""
    phase: str
    """Of the peak, or of the failure."""
    failure: Mapping[str, Any] | None
    """Of findings; None where it fits, or where tightfit's trainer was traced."""
    place: Moment | None
    """Part of nanoGPT's loop that it ended in; None before the first, and for anything else."""
    categories: Mapping[str, int]
    largest: Sequence[Mapping[str, Any]]
    step_s: float | None
    """Predicted seconds of a step; None if none was played to its end."""
    launch_s: float
    """Part of a pass that does not grow with its size: see `slower_than_one_pass`."""
    not_modelled: tuple[str, ...]

    @classmethod
    def of_step(cls, variant: Variant, trace: StepTrace, card: Card) -> "Outcome":
        """Return the outcome of tightfit's own trainer."""
        device_bytes = trace.reserved_bytes + card.context_bytes
        rates = rates_of(resolve_gpu(card.name)[0], compiled=variant.compile)
        pass_s, update_s = Work.of(trace.pass_kernels).seconds(rates), Work.of(trace.update_kernels).seconds(rates)
        return cls(
            variant=variant,
            fits=device_bytes <= card.total_bytes - card.used_bytes,
            device_bytes=device_bytes,
            phase=trace.phase,
            failure=None,
            place=None,
            categories=trace.categories,
            largest=(),
            step_s=pass_s * variant.accumulation + update_s,
            launch_s=0.0,
            not_modelled=trace.not_modelled,
        )

    @classmethod
    def of_loop(cls, variant: Variant, play: LoopPlay) -> "Outcome":
        """Return the outcome of nanoGPT's loop."""
        found = msgspec.to_builtins(play.findings)
        failure = found["failure"]
        step_s, launch_s = _times(play.course, variant)
        return cls(
            variant=variant,
            fits=failure is None,
            device_bytes=failure["process_bytes"] + failure["requested_bytes"]
            if failure
            else found["peak"]["device_bytes"],
            phase=failure["phase"] if failure else found["peak"]["phase"],
            failure=failure,
            place=play.course[-1] if play.course else None,
            categories=found["categories"],
            largest=found["largest"],
            step_s=step_s,
            launch_s=launch_s,
            not_modelled=tuple(found["not_modelled"]),
        )

    @property
    def iteration(self) -> int:
        """Iteration of the evaluation that it ended in."""
        return self.place.iteration or 0 if self.place else 0

    @property
    def in_evaluation(self) -> bool:
        return self.place is not None and self.place.part == "eval"


def _times(course: Sequence[Moment], variant: Variant) -> tuple[float | None, float]:
    """Seconds of a step of all its passes, and of the launches of a pass's kernels."""
    last = [each for each in course if each.step == _PLAYED_STEPS - 1]
    passes = [each for each in last if each.part == "pass"]
    update = next((each for each in last if each.part == "update"), None)
    end = next((each for each in last if each.part == "stepped"), None)
    if not passes or update is None or end is None:
        return None, 0.0
    one = (update.seconds - passes[0].seconds) / len(passes)
    kernels = (update.kernels - passes[0].kernels) / len(passes)
    return one * variant.accumulation + end.seconds - update.seconds, min(one, kernels * LAUNCH_S)
