"""Answers of the card to a program: one play holds for all cards that would have answered alike."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tightfit.kernels.blas import Workspace
from tightfit.kernels.card import Card
from tightfit.kernels.temporaries import Hidden

R = TypeVar("R")
_OF_THE_CAPABILITY = frozenset(
    (
        "major",
        "minor",
        "gcnArchName",
        "max_threads_per_multi_processor",
        "shared_memory_per_block_optin",
        "shared_memory_per_multiprocessor",
    )
)
_OF_THE_CHIP = frozenset(("multi_processor_count", "L2_cache_size"))


Sizes = Mapping[Hashable, int]
"""Bytes of one request on cards where they are others than here."""


class HiddenByCard(NamedTuple):
    """Temporaries of one call on this card, and on others that take as many of other sizes."""

    own: Hidden | None
    elsewhere: Mapping[Card, Hidden]

    def sizes(self, number: int) -> Sizes:
        """Return the bytes of the temporary with that number on the other cards."""
        return {card: (hidden.before + hidden.after)[number] for card, hidden in self.elsewhere.items()}


class CardAnswers:
    """Answers of the card that is played, compared with those of other cards where a question needs them."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.alike: list[Card] = []
        """Other cards that have answered every question as this one."""
        self.parted: list[list[Card]] = []
        """Cards that have not: those that left at one question with the same answer are one group."""
        self.is_chip_known = False
        """True once the program has read the number of multiprocessors, by which it may decide anything."""
        self.before_request: Callable[[Sizes], object] = lambda sizes: None
        """Called before a request for memory with its bytes on other cards, where they differ."""
        self._asked: set[Hashable] = set()
        self._hidden: dict[Hashable, dict[Card, Hidden]] = {}
        self._grouped: dict[Hashable, list[Card]] = {}
        self._grouped_from: list[Card] | None = None

    def ask(self, question: Callable[[Card], R], key: Hashable = None) -> R:
        """Return this card's answer. A question with the `key` of one before is not put to the other cards again."""
        answer = question(self.card)
        if self.alike and (key is None or key not in self._asked):
            if key is not None:
                self._asked.add(key)
            self._compare(answer, {other: _answer(question, other) for other in self.alike})
        return answer

    def _compare(self, own: object, theirs: Mapping[Card, object]) -> None:
        """Keep the cards with this card's answer, and group the others by theirs."""
        if all(answer == own for answer in theirs.values()):
            return
        self.alike = [other for other, answer in theirs.items() if answer == own]
        groups: list[tuple[object, list[Card]]] = []
        for other, answer in theirs.items():
            if answer != own:
                group = next((cards for known, cards in groups if known == answer), None)
                if group is None:
                    groups.append((answer, group := []))
                group.append(other)
        self.parted += [cards for _, cards in groups]

    def hidden(self, question: Callable[[Card], Hidden | None], key: Hashable) -> HiddenByCard:
        """Return an operator's temporaries here, and those of alike cards that take as many of other sizes."""
        own = question(self.card)
        if not self.alike:
            return HiddenByCard(own, {})
        elsewhere = self._hidden.get(key) if key is not None else None
        if elsewhere is None:
            theirs = {other: question(other) for other in self.alike}
            self._compare(_form(own), {other: _form(hidden) for other, hidden in theirs.items()})
            elsewhere = {other: hidden for other, hidden in theirs.items() if hidden is not None and hidden != own}
            if key is not None:
                self._hidden[key] = elsewhere
        return HiddenByCard(own, elsewhere)

    def workspaces(self, question: Callable[[Card], Sequence[Workspace]]) -> list[tuple[Workspace, Sizes]]:
        """Return the workspaces that an operator takes here, each with its bytes on alike cards that differ."""
        own = question(self.card)
        if not self.alike:
            return [(each, {}) for each in own]
        theirs = {generation: question(cards[0]) for generation, cards in self._generations().items()}
        keys = [each.key for each in own]
        if any([each.key for each in found] != keys for found in theirs.values()):
            by_card = {other: [each.key for each in theirs[_generation(other)]] for other in self.alike}
            self._compare(keys, by_card)
        return [(each, self._sizes_elsewhere(each.nbytes, n, theirs)) for n, each in enumerate(own)]

    def _sizes_elsewhere(self, nbytes: int, number: int, theirs: Mapping[Hashable, Sequence[Workspace]]) -> Sizes:
        """Return the bytes of the workspace with that number on alike cards where it has others."""
        return {
            card: theirs[generation][number].nbytes
            for generation, cards in self._generations().items()
            if theirs[generation][number].nbytes != nbytes
            for card in cards
        }

    def _generations(self) -> Mapping[Hashable, list[Card]]:
        """Return the alike cards, grouped by what decides about their workspaces."""
        if self._grouped_from is not self.alike:
            self._grouped_from, self._grouped = self.alike, {}
            for card in self.alike:
                self._grouped.setdefault(_generation(card), []).append(card)
        return self._grouped

    def read(self, field: str) -> None:
        """Note that the program has read a field of the card's properties. Its name and its size decide nothing."""
        if field in _OF_THE_CHIP:
            self.is_chip_known = True
        if field in _OF_THE_CHIP or field in _OF_THE_CAPABILITY:
            self.ask(lambda card: card.capability, "capability")


def _generation(card: Card) -> Hashable:
    """Return what decides about a card's workspaces."""
    return card.capability, card.torch_version


def _form(hidden: Hidden | None) -> tuple[int, int, tuple[tuple[int, int], ...]] | None:
    return None if hidden is None else (len(hidden.before), len(hidden.after), hidden.freed_early)


def _answer(question: Callable[[Card], R], other: Card) -> R | None:
    try:
        return question(other)
    except RuntimeError:  # as PyTorch where none of the kernels that are allowed serves this card
        return None
