"""Every card of the table for one script, from as few plays as that takes.

A play on one card puts each question of the program to the other cards, too: which attention kernel, how much an
operator takes besides its result, which workspace. Cards that answer all of them alike make the same requests, and
each one's allocator gets these requests. A program that reads the number of multiprocessors (torch's compiler does)
may decide anything by it: then the cards with the fewest and the most of a compute capability are played, and if both
made the same requests, every card between does.
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace as with_fields
from itertools import groupby

import msgspec
from msgspec.structs import asdict, replace

from tightfit.gpus import GPU, all_gpus, context_bytes
from tightfit.questions.asking import Asked
from tightfit.simulation.details import CardOutcome, CardSize, Detail, FailedAt
from tightfit.simulation.requests import DetailRequest
from tightfit.vgpu.records import Findings


class CardRow(CardOutcome, frozen=True, kw_only=True):
    """A script on one card."""

    capability: str
    free_bytes: int
    """Bytes that are left at the peak; negative where the script fails."""
    replayed: bool
    """True if the requests of a play on a card that answers alike were replayed; False for a play of its own."""
    error: str | None = None
    """Why the script ended on this card, if not for memory."""


class Cards(msgspec.Struct, frozen=True, kw_only=True):
    """All cards, as `tightfit dryrun --all-gpus --json` prints them."""

    script: str
    rows: list[CardRow]
    """The smallest card first."""
    plays: int
    """Plays that were made; others were remembered."""
    seconds: float

    @property
    def smallest(self) -> CardRow | None:
        """The first card on which the script fits."""
        return next((row for row in self.rows if row.fits), None)


def every_card(asked: Asked, cards: Sequence[GPU] | None = None) -> Cards:
    """Judge a script on every card of the table, or on `cards`."""
    started, played = time.monotonic(), asked.simulator.played
    cards = all_gpus() if cards is None else cards
    rows = _rows(with_fields(asked, trusts_errors=True), _families(cards))
    if all(row.error for row in rows):  # it may run by now
        rows = _rows(asked, _families(cards))
    return Cards(
        script=asked.script,
        rows=sorted(rows, key=lambda row: (row.total_bytes, row.name)),
        plays=asked.simulator.played - played,
        seconds=round(time.monotonic() - started, 1),
    )


def _families(cards: Sequence[GPU]) -> list[list[GPU]]:
    """Sort cards by capability and by the number of their multiprocessors, a list for each capability."""
    by_capability = sorted(cards, key=lambda gpu: (gpu.capability, gpu.sm_count))
    return [list(family) for _, family in groupby(by_capability, key=lambda gpu: gpu.capability)]


def _rows(asked: Asked, families: list[list[GPU]]) -> list[CardRow]:
    """Play the oldest and the newest capability, then one of each kind that is left, until every card has its row."""
    rows: list[CardRow] = []
    kinds: dict[str, tuple[Hashable, ...]] = {}
    now = families[:1] + families[1:][-1:]
    while families:
        left = [gpu for family in families for gpu in family]
        details = asked.play([_request(asked, family[0], left) for family in now])
        done: set[str] = set()
        for family, detail in zip(now, details, strict=True):
            rest = [gpu for gpu in family if gpu.name not in done]
            if rest and (not detail.tape or detail.is_chip_known):
                new = _rows_of_family(asked, rest, {family[0].name: detail}, left)
            else:
                new = _replayed([gpu for gpu in left if gpu.name not in done], detail)
            rows += new
            done.update(row.name for row in new)
        families = _families([gpu for gpu in left if gpu.name not in done])
        kinds = {gpu.name: (*kinds.get(gpu.name, ()), *_places(gpu, details)) for family in families for gpu in family}
        now = list({kinds[family[0].name]: family for family in reversed(families)}.values())
    return rows


def _places(gpu: GPU, details: Sequence[Detail]) -> Iterator[Hashable]:
    """Yield where a card left each play; plays that hold for no other card tell nothing about it."""
    for detail in details:
        place = next((number for number, group in enumerate(detail.parted) if gpu.name in group), None)
        yield gpu.capability if place is None else place


def _rows_of_family(asked: Asked, family: list[GPU], played: dict[str, Detail], left: list[GPU]) -> list[CardRow]:
    """Play on the first and last of a capability's cards, and halve the range between where the two differ."""
    rows: list[CardRow] = []
    parts = [family]
    while parts:
        new = [gpu for part in parts for gpu in _ends(part) if gpu.name not in played]
        details = asked.play([_request(asked, gpu, left) for gpu in new])
        played.update({gpu.name: detail for gpu, detail in zip(new, details, strict=True)})
        halves: list[list[GPU]] = []
        for part in parts:
            ends = _ends(part)
            first, last = played[ends[0].name], played[ends[-1].name]
            if first.tape and last.tape == (first.tape if len(ends) == 1 else first.tapes.get(ends[-1].name)):
                rows += _replayed(part, first)
            elif not (first.tape and last.tape) or len(ends) == 1:
                rows += _each(asked, part)
            else:
                middle = _middle(part)
                halves += [part[:middle], part[middle:]]
        parts = halves
    return rows


def _middle(family: list[GPU]) -> int:
    """Return the index of the first card with more multiprocessors, as near to the middle as there is one."""
    steps = [place for place in range(1, len(family)) if family[place].sm_count > family[place - 1].sm_count]
    return min(steps, key=lambda place: abs(place - len(family) / 2))


def _ends(family: list[GPU]) -> list[GPU]:
    """Return the cards with the fewest and the most multiprocessors; one if all have as many."""
    return [family[0]] if family[0].sm_count == family[-1].sm_count else [family[0], family[-1]]


def _request(asked: Asked, gpu: GPU, cards: list[GPU]) -> DetailRequest:
    """Ask for a play of `gpu` with the memory of the largest of `cards`, and its replay on all that it holds for."""
    settings = replace(
        asked.settings, gpu=gpu.name, memory_bytes=max(each.planning_bytes for each in cards), capability=None
    )
    return asked.request(settings=settings, cards=[_size(asked, each) for each in cards])


def _size(asked: Asked, gpu: GPU) -> CardSize:
    context = asked.settings.context_bytes
    return CardSize(
        name=gpu.name,
        total_bytes=gpu.planning_bytes,
        context_bytes=context_bytes(gpu)[0] if context is None else context,
        used_bytes=asked.settings.used_bytes,
    )


def _replayed(family: list[GPU], detail: Detail) -> list[CardRow]:
    """Return the rows of cards that make the requests of a play. An error ends the script on all of them alike."""
    capability = {gpu.name: _dotted(gpu) for gpu in family}
    used = detail.findings.gpu.used_by_others_bytes
    error = _error_of(detail.findings)
    return [
        CardRow(
            **asdict(each) | {"fits": each.fits and error is None},
            capability=capability[each.name],
            free_bytes=each.total_bytes - used - each.device_bytes,
            replayed=True,
            error=error if each.fits else None,
        )
        for each in detail.cards
        if each.name in capability
    ]


def _each(asked: Asked, family: list[GPU]) -> list[CardRow]:
    """Play every card by itself: the script looks at the card, or fails for another reason than memory."""
    requests = [
        asked.request(settings=replace(asked.settings, gpu=gpu.name, memory_bytes=None, capability=None))
        for gpu in family
    ]
    details = asked.play(requests)
    return [_own_row(gpu, detail.findings) for gpu, detail in zip(family, details, strict=True)]


def _own_row(gpu: GPU, found: Findings) -> CardRow:
    failure = found.failure
    return CardRow(
        name=gpu.name,
        total_bytes=found.gpu.total_bytes,
        fits=found.outcome == "fits",
        device_bytes=found.needed_bytes,
        failure=msgspec.convert(failure, FailedAt, from_attributes=True) if failure else None,
        capability=_dotted(gpu),
        free_bytes=found.left_bytes,
        replayed=False,
        error=_error_of(found),
    )


def _error_of(found: Findings) -> str | None:
    return found.stopped_because if found.outcome == "error" else None


def _dotted(gpu: GPU) -> str:
    return ".".join(map(str, gpu.capability))
