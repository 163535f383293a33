"""Properties of the card as the program reads them: each reading asks only for as much as the program wants to know.

A library that tests `major >= 7` goes on alike on all cards from Volta on. From a plain number nobody could tell
whether it was compared or printed, so one reading would part the cards of every capability. Code in C that takes the
number (`"%d" % major`) asks nothing; it is taken to decide nothing.
"""

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Self, SupportsIndex

from torch._guards import CompileContext

from tightfit.kernels.card import Card
from tightfit.vgpu.card_answers import CardAnswers

_COMPARISONS = {f"__{name}__": getattr(operator, name) for name in ("lt", "le", "eq", "ne", "gt", "ge")}
_OF_ANY_OBJECT = {*dir(object)} - {"__hash__", "__repr__", "__str__", "__format__"}
_OF_THE_PARTS = ("__iter__", "__getitem__", "__len__")


class AskedNumber(int):
    """A number of the card. A comparison asks for its own result; any other use asks for the number."""

    _answers: CardAnswers
    _of: Callable[[Card], int]

    def __new__(cls, answers: CardAnswers, of: Callable[[Card], int]) -> Self:
        number = super().__new__(cls, of(answers.card))
        number._answers, number._of = answers, of
        return number

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[int], tuple[int]]:
        return int, (self._answers.ask(self._of),)


class AskedCapability(tuple[int, ...]):
    """A compute capability. A comparison with another one asks for its own result; its parts are asked numbers."""

    _answers: CardAnswers

    def __new__(cls, answers: CardAnswers) -> Self:
        capability = super().__new__(cls, (AskedNumber(answers, _major), AskedNumber(answers, _minor)))
        capability._answers = answers
        return capability

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[type[tuple[int, ...]], tuple[tuple[int, ...]]]:
        return tuple, (self._answers.ask(self._of),)

    def _of(self, card: Card) -> tuple[int, int]:
        return card.capability


def watched(properties: SimpleNamespace, answers: CardAnswers) -> SimpleNamespace:
    """Return the properties of a card, and note which of them are read, and of the capability what for."""

    class Properties(SimpleNamespace):
        def __getattribute__(self, name: str) -> object:
            if name in ("major", "minor") and _are_others_asked(answers):
                return AskedNumber(answers, _major if name == "major" else _minor)
            answers.read(name)
            return super().__getattribute__(name)

    return Properties(**vars(properties))


def capability_of(properties: SimpleNamespace, answers: CardAnswers) -> tuple[int, ...]:
    """Return the compute capability of a card with watched properties."""
    return AskedCapability(answers) if _are_others_asked(answers) else (properties.major, properties.minor)


def _are_others_asked(answers: CardAnswers) -> bool:
    """Return True if a reading may part cards. Compilers get plain numbers: they know no other kind."""
    return bool(answers.alike) and CompileContext.try_get() is None


def _major(card: Card) -> int:
    return card.capability[0]


def _minor(card: Card) -> int:
    return card.capability[1]


def _comparison(name: str, kinds: tuple[type, ...]) -> Callable[..., object]:
    def compared(self: AskedNumber | AskedCapability, other: object) -> object:
        if not isinstance(other, kinds):
            return NotImplemented
        return self._answers.ask(lambda card: _COMPARISONS[name](self._of(card), _on(card, other)))

    return compared


def _on(card: Card, value: object) -> object:
    return value._of(card) if isinstance(value, AskedNumber | AskedCapability) else value


def _use(name: str) -> Callable[..., object]:
    def used(self: AskedNumber | AskedCapability, *arguments: object) -> object:
        value: object = self._answers.ask(self._of)
        return getattr(value, name)(*arguments)

    return used


def _ask_when_used(kind: type[AskedNumber | AskedCapability], base: type, kept: tuple[str, ...] = ()) -> None:
    """Let every method of a number or a tuple ask: comparisons for their result, all others for the value."""
    for name in dir(base):
        if name in _COMPARISONS:
            setattr(kind, name, _comparison(name, (base, float)))
        elif name not in _OF_ANY_OBJECT and name not in kept and callable(getattr(base, name)):
            setattr(kind, name, _use(name))


_ask_when_used(AskedNumber, int)
_ask_when_used(AskedCapability, tuple, kept=_OF_THE_PARTS)
