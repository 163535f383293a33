"""Generation of texts by transformers: tokens that take no more memory than others are not played.

The virtual card computes no token that ends a text, so that every text comes to its greatest length, with the most
memory. A training by reinforcement generates in each step, and the tokens of one step take longer than all the rest.
So the first call is played with its first and last tokens, a later one that may take more memory with a few of them,
and one that takes no more than another with its first few alone. In between, the cache of keys and values grows at
once.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tightfit.vgpu.assign import assign
from tightfit.vgpu.on_import import after_import
from tightfit.vgpu.recorder import Recorder
from tightfit.wording import say

_FEW = 4
"""Tokens of a later call: the first comes of the whole prompt, the others of the cache."""
_MANY = 64
"""Tokens at each end of a first call: each makes the cache anew, which decides how fragmented the memory gets."""
_MASK, _POSITIONS = "attention_mask", "position_ids"
"""Inputs with an element for each token."""
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
    _keep_beams_open(mixin)
    played: WeakKeyDictionary[nn.Module, dict[bool, list[_Call]]] = WeakKeyDictionary()

    def full(edge: int, model: Any, input_ids: Tensor, named: dict[str, Any]) -> object:
        """Generate, with `edge` tokens at each end if the cache can grow in between. `Any`: the library's objects."""
        criteria, cache = named["stopping_criteria"], named.get("cache", named.get("past_key_values"))
        length = criteria.max_length - edge
        if length <= input_ids.shape[1] + edge or not _can_grow(cache, named):
            return usual(model, input_ids, **named)
        shorter = {**named, "stopping_criteria": _shorter(criteria, input_ids.shape[1] + edge)}
        texts = _longer(usual(model, input_ids, **shorter), length)
        if named.get("use_cache"):
            _grow(cache, length - 1)
        return usual(model, texts, **{**named, **_of_tokens(named, length)})

    @functools.wraps(usual)
    def sample(model: Any, input_ids: Tensor, *rest: object, **named: Any) -> object:
        """`Any`: the library's own objects."""
        criteria = named.get("stopping_criteria")
        longest = _longest(criteria, named)
        if rest or longest is None or longest - input_ids.shape[1] <= _FEW:
            return usual(model, input_ids, *rest, **named)
        held = recorder.allocator.allocated_bytes
        call = _Call(input_ids.shape[0], input_ids.shape[1], longest, _elements(named), held)
        calls = played.setdefault(model, {}).setdefault(bool(named.get("use_cache")), [])
        is_covered = any(map(call.is_covered, calls))
        note = say("vgpu.generation.shortened")
        if note not in notes and calls:
            notes.append(note)
        if not is_covered:
            calls.append(call)
            return full(_FEW if len(calls) > 1 else _MANY, model, input_ids, named)
        texts = usual(model, input_ids, **{**named, "stopping_criteria": _shorter(criteria, call.prompt + _FEW)})
        return _longer(texts, longest)

    assign(mixin, _sample=sample)


def _keep_beams_open(mixin: Any) -> None:
    """Let a beam search go on to the greatest length: only scores that nobody computed could tell that it is over."""
    usual = getattr(mixin, "_beam_search_has_unfinished_sequences", None)
    if usual is None or len(inspect.signature(usual).parameters) != len(_OF_BEAMS):
        return

    @functools.wraps(usual)
    def has_unfinished(*conditions: Any) -> Tensor:
        usual(*conditions)
        return ~torch.all(conditions[_OF_BEAMS.index("next_token_hits_stopping_criteria")])

    assign(mixin, _beam_search_has_unfinished_sequences=staticmethod(has_unfinished))


_OF_BEAMS = (
    "is_early_stop_heuristic_unsatisfied",
    "is_sent_finished",
    "next_token_hits_stopping_criteria",
    "early_stopping",
)
"""What transformers asks before each token of a beam search."""


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


def _can_grow(cache: Any, named: Mapping[str, Any]) -> bool:
    """Return True for a cache of nothing but keys and values of each token, or none, and a prompt of tokens alone."""
    kinds = {type(each).__name__ for each in (cache, *getattr(cache, "layers", ()))}
    others = {name for name, value in named.items() if isinstance(value, Tensor | Mapping)} - {_MASK, _POSITIONS}
    return not others and (not named.get("use_cache") or kinds <= {"DynamicCache", "DynamicLayer"})


def _grow(cache: Any, length: int) -> None:
    """Let the cache hold so many tokens."""
    for layer in getattr(cache, "layers", ()):
        layer.keys, layer.values = (_longer(each, length, dim=-2) for each in (layer.keys, layer.values))
    for each in (getattr(cache, "key_cache", None), getattr(cache, "value_cache", None)):  # transformers before 4.54
        if isinstance(each, list):
            each[:] = [_longer(tensor, length, dim=-2) for tensor in each]
            cache._seen_tokens = length


def _of_tokens(named: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Return the inputs for so many tokens: all of them count, and each has the next position."""
    found = {name: _longer(named[name], length) for name in (_MASK, _POSITIONS) if named.get(name) is not None}
    if _POSITIONS in found:
        before = named[_POSITIONS].shape[-1]
        found[_POSITIONS][..., before:] = torch.arange(before, length, device=named[_POSITIONS].device)
    return found


def _longer(values: Any, length: int, *, dim: int = -1) -> Any:
    """Return a tensor with ones behind its own elements along `dim`, as a mask has for new tokens."""
    shape = list(values.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([values, values.new_ones(shape)], dim=dim)


def _elements(named: Mapping[str, Any]) -> int:
    return sum(tensor.numel() for tensor in _tensors(named))


def _tensors(values: Mapping[str, Any]) -> Iterator[Tensor]:
    """List the tensors among inputs and in the outputs of an encoder."""
    for value in values.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)
