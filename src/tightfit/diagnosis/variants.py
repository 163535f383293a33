"""A run with something changed, and the stage on which the simulation service plays it."""

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from tightfit.config import PRETRAINED, TrainConfig
from tightfit.diagnosis.named_card import Card
from tightfit.diagnosis.outcome import PLAYED_STEPS, Outcome
from tightfit.models.shape import flops_per_token, parameter_count, vocabulary_of
from tightfit.simulation.requests import Failed, LoopPlay, LoopRequest, LoopSettings, StepRequest, StepTrace

if TYPE_CHECKING:
    from tightfit.simulation.client import Progress

_SEEN_PASSES = 3
"""Passes of a step that are played; further ones take no more memory."""
_PLAYED_ITERATIONS = 2
"""Iterations of an evaluation that are played; further ones allocate the same again."""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A run, or the run with something changed, and the loop that plays it."""

    config: TrainConfig
    """Keys of the run, with nothing left on "auto"."""
    trainer: str = "nanogpt"
    """nanogpt or tightfit."""
    evaluate: str = "as_is"
    """as_is, eager (without torch.compile: it takes more) or none."""
    eval_iters: int = _PLAYED_ITERATIONS
    """Iterations of the evaluation, for each split."""
    release: bool = False
    """End each iteration of an evaluation with `del logits, loss`."""
    used_bytes: int | None = None
    """Bytes used by other processes; None: as many as on the card."""
    alloc_conf: str = ""
    """PYTORCH_CUDA_ALLOC_CONF."""

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.config.batch_size * self.config.block_size

    @property
    def parameters(self) -> int:
        """Trained numbers, with those of the position embedding."""
        return parameter_count(self.config)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward."""
        return flops_per_token(self.config, self.config.block_size)


def variant_of(config: TrainConfig, card: Card) -> Variant:
    """Return the run that nanoGPT's train.py makes of a configuration on a card; "auto" becomes its default."""
    # Like from_pretrained in nanoGPT's model.py: the shape is the checkpoint's, the positions are cut afterwards.
    shape = PRETRAINED.get(config.init_from, config)
    dtype = ("bfloat16" if card.capability >= (8, 0) else "float16") if config.dtype == "auto" else config.dtype
    keys = TrainConfig(
        batch_size=config.batch_size,
        block_size=config.block_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        vocab_size=vocabulary_of(config) if shape is config else shape.vocab_size,
        bias=shape.bias,
        dropout=config.dropout,
        dtype=dtype,
        compile=True if config.compile == "auto" else bool(config.compile),
        mode=config.mode,
        grad_clip=config.grad_clip,
    )
    return Variant(config=keys)


class Stage:
    """One card on which variants are played; close it after use."""

    def __init__(self, card: Card, *, workers: int = 2, progress: "Progress | None" = None) -> None:
        from tightfit.simulation.client import Simulator  # a log alone needs none, and it takes long to import

        self._card, self._simulator = card, Simulator(workers=workers, progress=progress)
        self.failed: dict[str, str] = {}
        """Reason for each play that could not be made, by its name."""

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._simulator.__exit__(kind, error, trace)

    def play(self, variants: Mapping[str, Variant]) -> dict[str, Outcome]:
        """Play each variant, the longest first; return the outcomes by name.

        A play that could not be made is left out, and `failed` holds its reason.
        """
        answers = self._simulator.play([_request(variant, self._card) for variant in variants.values()])
        outcomes = {}
        for (name, variant), answer in zip(variants.items(), answers, strict=True):
            if isinstance(answer, Failed):
                self.failed[name] = answer.error
            elif isinstance(answer, LoopPlay):
                outcome = Outcome.of_loop(answer, accumulation=variant.config.gradient_accumulation_steps)
                if outcome.error:
                    self.failed[name] = outcome.error
                else:
                    outcomes[name] = outcome
            elif isinstance(answer, StepTrace):
                outcomes[name] = Outcome.of_step(answer, self._card, variant.config)
        return outcomes


def _request(variant: Variant, card: Card) -> LoopRequest | StepRequest:
    environ = {"PYTORCH_CUDA_ALLOC_CONF": variant.alloc_conf} if variant.alloc_conf else {}
    if variant.trainer == "tightfit":
        return _step_request(variant.config, card, environ)
    return LoopRequest(
        settings=LoopSettings(
            config=variant.config,
            passes=min(variant.config.gradient_accumulation_steps, _SEEN_PASSES),
            steps=PLAYED_STEPS,
            evaluate=variant.evaluate,
            eval_iters=variant.eval_iters,
            release=variant.release,
        ),
        gpu=card.name,
        memory_bytes=card.total_bytes,
        used_bytes=card.used_bytes if variant.used_bytes is None else variant.used_bytes,
        context_bytes=card.context_bytes,
        environ=environ,
    )


def _step_request(config: TrainConfig, card: Card, environ: dict[str, str]) -> StepRequest:
    share = config.batch_size * min(config.gradient_accumulation_steps, _SEEN_PASSES)
    step = replace(
        config,
        batch_size=share,
        gradient_accumulation_steps=1,
        micro_batch=config.batch_size,
        eval_micro_batch=config.eval_micro_batch or config.batch_size,
        mode="default",
        device="cuda",
        fit="off",
    )
    # The steps alone: its evaluation, of as many sequences by the same loss, keeps nothing and so takes less.
    return StepRequest(whole=False, config=step, share=share, gpu=card.name, environ=environ)
