"""The configurations that are measured, the most telling first: a run that is cut short is still useful.

GPT-2 sizes, block 1024 and vocabulary 50,304 throughout. The limits of the last part are what PyTorch may reserve on
smaller cards; their micro-batches lie on both sides of what the virtual card holds for the most that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of workload.py; its fields are that script's options and defaults."""

    size: str = "gpt2"
    micro_batch: int = 4
    accumulation: int = 1
    block: int = 1024
    vocab: int = 50304
    dtype: str = "bfloat16"
    loss: str = "auto"
    checkpointing: int = 0
    compile: bool = False
    optimizer: str = "fused"
    dropout: float = 0.0
    steps: int = 3
    do: tuple[str, ...] = ("train",)
    act_as: str = ""
    """Size of the card that is acted."""
    others: str = "0"

    @cached_property
    def id(self) -> str:
        """Its name in every table: size, micro-batch and whatever is not the default, so that it stays the same."""
        parts = [self.size, f"b{self.micro_batch}"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("size", "micro_batch") and value != field.default:
                parts.append(_part(field.name, value))
        return "-".join(parts)

    @property
    def arguments(self) -> list[str]:
        """For workload.py's command line."""
        words = ["--size", self.size, "--micro-batch", str(self.micro_batch)]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("size", "micro_batch") or value == field.default:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if value is True else list(value) if isinstance(value, tuple) else [str(value)]
        return words

    @property
    def without_limit(self) -> "Case":
        """The same on the whole card."""
        return replace(self, act_as="", others="0")


def _part(name: str, value: object) -> str:
    if value is True:
        return name
    if isinstance(value, tuple):
        return "+".join(value)
    if name in ("dtype", "optimizer"):
        return str(value)
    return f"{name.replace('_', '')}{value}"


EVERYTHING = ("eval", "train", "save")
CARDS = {"8GiB": "0.85GiB", "11.69GiB": "2GiB", "15.57GiB": "1GiB", "23.52GiB": "1GiB"}
"""Sizes of 8, 12, 16 and 24 GB cards, and what others and the context take of them."""


EDGES = {
    "auto": ((12, 14, 15, 17), (19, 22, 23, 26), (33, 37, 38, 42), (55, 61, 62, 68)),
    "full": ((3, 4, 5, 6), (6, 7, 8, 9), (10, 12, 13, 15), (17, 20, 21, 24)),
}
"""Micro-batches by loss and card: the second is the most that fits a virtual H200 with torch 2.11 that acts as it."""


def grid() -> Iterator[Case]:
    """All cases, the most telling first."""
    yield from _first()
    yield from _one_change_at_a_time()
    yield from _smaller_cards()
    yield from _sizes()


def _first() -> Iterator[Case]:
    """One of each kind."""
    yield Case()
    yield Case(micro_batch=16, compile=True)
    yield Case(micro_batch=12, loss="full")
    yield Case(micro_batch=64, loss="full", compile=True, do=("eval",))
    yield Case(micro_batch=64, loss="full", compile=True, do=("eval",), act_as="11.69GiB", others="2GiB")
    yield Case(micro_batch=4, loss="full", act_as="11.69GiB", others="2GiB", do=EVERYTHING)
    yield Case(size="gpt2-xl", micro_batch=2)
    yield Case(size="gpt2-medium", micro_batch=8, checkpointing=24)
    yield Case(micro_batch=8, do=("hf-trainer",))
    yield Case(dtype="float32")
    yield Case(do=EVERYTHING)
    yield Case(do=("resume", "train"))


def _one_change_at_a_time() -> Iterator[Case]:
    for loss in ("full", "chunked", "liger"):
        yield Case(micro_batch=8, loss=loss)
        yield Case(micro_batch=8, loss=loss, compile=True)
    for dtype in ("float32", "float16"):
        yield Case(micro_batch=8, loss="full", dtype=dtype)
        yield Case(micro_batch=8, dtype=dtype)
    for blocks in (1, 6, 12):
        yield Case(micro_batch=16, checkpointing=blocks)
    yield Case(micro_batch=16, checkpointing=12, compile=True)
    yield Case(optimizer="foreach")
    yield Case(optimizer="loop")
    yield Case(dropout=0.1)
    yield Case(dropout=0.1, compile=True)
    yield Case(dropout=0.1, checkpointing=12)
    yield Case(accumulation=4)
    yield Case(accumulation=4, compile=True)
    yield Case(micro_batch=32, do=("eval",))
    yield Case(do=("train", "save"), dtype="float16")
    yield Case(do=("resume", "train"), size="gpt2-medium")
    yield Case(do=("hf-trainer",), dtype="float32")
    yield Case(do=("hf-trainer",), checkpointing=12, micro_batch=16)
    yield Case(do=("hf-trainer",), dropout=0.1, accumulation=2, optimizer="loop")


def _smaller_cards() -> Iterator[Case]:
    """On both sides of each limit, next to it and then further off; two steps, since the first one shows it."""
    for rank in (1, 2, 0, 3):
        for loss, batches in EDGES.items():
            for (act_as, others), sizes in zip(CARDS.items(), batches, strict=True):
                yield Case(micro_batch=sizes[rank], loss=loss, act_as=act_as, others=others, steps=2)
    yield Case(size="gpt2-medium", micro_batch=4, act_as="15.57GiB", others="1GiB", steps=2)
    yield Case(size="gpt2-large", micro_batch=4, checkpointing=36, act_as="23.52GiB", others="1GiB", steps=2)
    yield Case(size="gpt2-xl", micro_batch=1, checkpointing=48, act_as="23.52GiB", others="1GiB", steps=2)


def _sizes() -> Iterator[Case]:
    for micro_batch in (1, 2, 8, 16, 32, 64):
        yield Case(micro_batch=micro_batch)
    for micro_batch in (1, 16, 64):
        yield Case(size="6x384", micro_batch=micro_batch)
    yield Case(size="6x384", micro_batch=64, loss="full", block=256)
    for size, micro_batch in (("gpt2-medium", 4), ("gpt2-medium", 16), ("gpt2-large", 4), ("gpt2-xl", 8)):
        yield Case(size=size, micro_batch=micro_batch)
    yield Case(size="gpt2-large", micro_batch=8, compile=True)
    yield Case(size="gpt2-xl", micro_batch=4, compile=True)
    yield Case(size="gpt2-xl", micro_batch=16, checkpointing=48)
