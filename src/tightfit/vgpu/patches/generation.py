"""Generation of texts by transformers: a call that takes no more memory than one before is played for a few tokens.

The virtual card computes no token that ends a text, so that every text comes to its greatest length, with the most
memory. A training by reinforcement generates in each step, and the tokens of one step take longer than all the rest.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tightfit.vgpu.assign import assign
from tightfit.vgpu.patches.on_import import after_import
from tightfit.vgpu.recorder import Recorder
from tightfit.wording import say

_FEW = 4
"""Tokens of a call that is shortened: the first comes of the whole prompt, the others of the cache."""
_SLACK = 32 << 20
"""Bytes by which what is held besides may have grown since the call that was played in full."""


class _Call(NamedTuple):
    """What decides about the memory of a call; a larger number never takes less."""

    rows: int
    prompt: int
    """Tokens of the prompt."""
    longest: int
    """Tokens of the longest text, with its prompt."""
    given: int
    """Elements of the other inputs, such as images or an encoder's states."""
    held: int
    """Bytes that the card holds before."""

    def is_covered(self, other: "_Call") -> bool:
        """Return True if `other` takes as much memory at least."""
        return all(own <= theirs for own, theirs in zip(self[:-1], other, strict=False)) and (
            self.held <= other.held + _SLACK
        )


def install(recorder: Recorder, notes: list[str]) -> None:
    """Shorten such calls from now on, and say so in `notes`."""
    after_import("transformers.generation.utils", lambda module: _change(module, recorder, notes))


def _change(module: ModuleType, recorder: Recorder, notes: list[str]) -> None:
    mixin = module.__dict__.get("GenerationMixin")
    usual: Callable[..., Any] | None = getattr(mixin, "_sample", None)
    if usual is None:
        return
    played: WeakKeyDictionary[nn.Module, list[_Call]] = WeakKeyDictionary()

    @functools.wraps(usual)
    def sample(model: Any, input_ids: Tensor, *rest: object, **named: Any) -> object:
        """`Any`: the library's own objects."""
        criteria = named.get("stopping_criteria")
        longest = _longest(criteria, named)
        if rest or longest is None or longest - input_ids.shape[1] <= _FEW:
            return usual(model, input_ids, *rest, **named)
        held = recorder.allocator.allocated_bytes
        call = _Call(input_ids.shape[0], input_ids.shape[1], longest, _elements(named), held)
        calls = played.setdefault(model, [])
        if not any(map(call.is_covered, calls)):
            calls.append(call)
            return usual(model, input_ids, **named)
        note = say("vgpu.generation.shortened", tokens=_FEW)
        if note not in notes:
            notes.append(note)
        texts = usual(model, input_ids, **{**named, "stopping_criteria": _shorter(criteria, call.prompt + _FEW)})
        return torch.cat([texts, texts.new_empty((texts.shape[0], longest - texts.shape[1]))], dim=-1)

    assign(mixin, _sample=sample)


def _longest(criteria: Any, named: Mapping[str, Any]) -> int | None:
    """Return the greatest length of a text; None for a call that returns more than texts, or streams them."""
    returns_more = getattr(named.get("generation_config"), "return_dict_in_generate", True)
    longest = getattr(criteria, "max_length", None)
    return None if returns_more or named.get("streamer") is not None else longest


def _shorter(criteria: Any, length: int) -> Any:
    """Return the same conditions for the end of a text, with another length."""
    copies = [copy.copy(each) for each in criteria]
    for each in copies:
        if hasattr(each, "max_length"):
            each.max_length = length
    return type(criteria)(copies)


def _elements(named: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in _tensors(named))


def _tensors(values: Mapping[str, Any]) -> Iterator[Tensor]:
    """List the tensors among inputs and in the outputs of an encoder."""
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
