"""Plays of a run on the virtual GPU: what is asked, in which process it happens, and what is remembered on disk."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tightfit.config import PRETRAINED, TrainConfig, to_dict
from tightfit.diagnosis.named_card import Card
from tightfit.models.shape import flops_per_token, parameter_count, vocabulary_of
from tightfit.simulation.cache import Memory

_LOADED = ("n_layer", "n_head", "n_embd", "vocab_size", "bias")
"""What nanoGPT takes from OpenAI's checkpoints (model.py, from_pretrained); it cuts the positions afterwards."""
_LOOP = Path(__file__).parents[1] / "simulation" / "nanogpt_loop.py"
"""What is played; a play is remembered while it stays as it is."""
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
        shape |= {key: PRETRAINED[config.init_from][key] for key in _LOADED}
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
    """Plays variants, two at a time, on one card. To be closed."""

    def __init__(self, card: Card, *, workers: int = 2) -> None:
        self._card, self._workers = card, workers
        self._process: subprocess.Popen[str] | None = None
        self.played = 0
        """Plays that were made, not found on disk."""
        self.failed: dict[str, str] = {}
        """Why a play could not be made, by its name."""

    def __enter__(self) -> "Stage":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if kind is not None and not issubclass(kind, Exception):  # interrupted: nobody waits for the plays
            self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def play(self, variants: Mapping[str, Variant]) -> dict[str, "Outcome"]:
        """What each would do, by its name; the longest should come first.

        One that could not be played is left out, and `failed` says why; another may still be judged.
        """
        requests = {name: self._request(variant) for name, variant in variants.items()}
        memories = {name: Memory(request, "plays", also=(_LOOP,)) for name, request in requests.items()}
        found = {name: memory.read() for name, memory in memories.items()}
        missing = [name for name, each in found.items() if each is None]
        for name, made in zip(missing, self._ask([requests[name] for name in missing]), strict=True):
            if "error" not in made:
                memories[name].write(made)
            found[name] = made
        outcomes = {}
        for name, answer in found.items():
            error = answer.get("error") if answer else "no answer"
            if answer and answer.get("outcome") == "error":
                error = answer["stopped_because"]
            if answer is None or error:
                self.failed[name] = str(error)
            else:
                outcomes[name] = Outcome.of(variants[name], answer, self._card)
        return outcomes

    def _ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not requests:
            return []
        if self._process is None:
            words = [sys.executable, "-m", "tightfit.simulation.stage"]
            environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="tightfit-") as folder:
            with contextlib.suppress(BrokenPipeError):
                batch = {"folder": folder, "workers": self._workers, "plays": requests}
                self._process.stdin.write(json.dumps(batch) + "\n")
                self._process.stdin.flush()
            self._process.stdout.readline()
            self.played += len(requests)
            return [_answer(Path(folder, f"{number}.json")) for number in range(len(requests))]

    def _request(self, variant: Variant) -> dict[str, Any]:
        card = self._card
        environ = {"PYTORCH_CUDA_ALLOC_CONF": variant.alloc_conf} if variant.alloc_conf else {}
        if variant.trainer == "tightfit":
            return {"trace": _trace_request(variant, card, environ)}
        keys = {name: getattr(variant, name) for name in variant.__dataclass_fields__}
        keys |= {
            "passes": min(variant.accumulation, _SEEN_PASSES),
            "steps": _PLAYED_STEPS,
            "gradient_accumulation_steps": variant.accumulation,
            "eval_batch": variant.eval_batch or variant.batch_size,
            "learning_rate": 6e-4,
        }
        request = {
            "gpu": card.name,
            "memory_bytes": card.total_bytes,
            "used_bytes": card.used_bytes if variant.used_bytes is None else variant.used_bytes,
            "context_bytes": card.context_bytes,
        }
        return {"keys": keys, "request": request, "environ": environ}


def _trace_request(variant: Variant, card: Card, environ: dict[str, str]) -> dict[str, Any]:
    share = variant.batch_size * min(variant.accumulation, _SEEN_PASSES)
    config = TrainConfig(
        batch_size=share, gradient_accumulation_steps=1, micro_batch=variant.batch_size,
        eval_micro_batch=variant.eval_batch or variant.batch_size, block_size=variant.block_size,
        n_layer=variant.n_layer, n_head=variant.n_head, n_embd=variant.n_embd, vocab_size=variant.vocab_size,
        dropout=variant.dropout, bias=variant.bias, dtype=variant.dtype, compile=variant.compile, loss=variant.loss,
        activation_checkpointing=variant.activation_checkpointing, grad_clip=variant.grad_clip, device="cuda",
        fit="off",
    )  # fmt: skip
    # The steps alone: its evaluation, of as many sequences by the same loss, keeps nothing and so takes less.
    return {
        "whole": False, "config": to_dict(config), "share": share, "gpu": card.name, "capability": None,
        "environ": environ, "host_flops": {}, "host_bandwidth": 0.0,
    }  # fmt: skip


def _answer(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {"error": "it left no answer; if this machine's memory ran out, that is the reason"}
    return found


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
    place: Mapping[str, Any]
    """The part of nanoGPT's loop that it ended in: `what` is eval, pass, update or stepped."""
    categories: Mapping[str, int]
    largest: Sequence[Mapping[str, Any]]
    step_s: float | None
    """Predicted seconds of a step; None if none was played to its end."""
    launch_s: float
    """Part of a pass that does not grow with its size: see `slower_than_one_pass`."""
    not_modelled: tuple[str, ...]

    @classmethod
    def of(cls, variant: Variant, found: Mapping[str, Any], card: Card) -> "Outcome":
        """From a play's findings, or a trace's."""
        if variant.trainer == "tightfit":
            device_bytes = found["peak"]["reserved_bytes"] + card.context_bytes
            return cls(
                variant=variant, fits=device_bytes <= card.total_bytes - card.used_bytes, device_bytes=device_bytes,
                phase=found["peak"]["phase"], failure=None, place={}, categories=found["categories"], largest=(),
                step_s=found["pass_s"] * variant.accumulation + found["update_s"], launch_s=0.0,
                not_modelled=tuple(found["not_modelled"]),
            )  # fmt: skip
        failure = found["failure"]
        step_s, launch_s = _times(found["course"], variant)
        return cls(
            variant=variant,
            fits=failure is None,
            device_bytes=failure["process_bytes"] + failure["requested_bytes"]
            if failure
            else found["peak"]["device_bytes"],
            phase=failure["phase"] if failure else found["peak"]["phase"],
            failure=failure,
            place=found["course"][-1] if found["course"] else {"what": "setup"},
            categories=found["categories"],
            largest=found["largest"],
            step_s=step_s,
            launch_s=launch_s,
            not_modelled=tuple(found["not_modelled"]),
        )

    @property
    def in_evaluation(self) -> bool:
        return self.place.get("what") == "eval"


def _times(course: Sequence[Mapping[str, Any]], variant: Variant) -> tuple[float | None, float]:
    """Seconds of a step of all its passes, and what a pass takes for the launches of its kernels."""
    from tightfit.diagnosis.figures import LAUNCH_S

    last = [each for each in course if each.get("step") == _PLAYED_STEPS - 1]
    passes = [each for each in last if each["what"] == "pass"]
    update = next((each for each in last if each["what"] == "update"), None)
    end = next((each for each in last if each["what"] == "stepped"), None)
    if not passes or update is None or end is None:
        return None, 0.0
    one = (update["seconds"] - passes[0]["seconds"]) / len(passes)
    kernels = (update["kernels"] - passes[0]["kernels"]) / len(passes)
    return one * variant.accumulation + end["seconds"] - update["seconds"], min(one, kernels * LAUNCH_S)
