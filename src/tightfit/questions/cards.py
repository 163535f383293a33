"""Every card of the table for one script: two plays for each compute capability, replayed on its cards.

Cards of one capability run the same kernels; only the number of multiprocessors changes what some of them need. So the
cards with the fewest and the most are played. If both made the same requests, every card between does. Each card's
allocator then gets these requests.
"""

import time
from collections.abc import Sequence
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
    """True if the requests of a play on another card of the capability were replayed; False for a play of its own."""
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
    by_capability = sorted(all_gpus() if cards is None else cards, key=lambda gpu: (gpu.capability, gpu.sm_count))
    families = [list(family) for _, family in groupby(by_capability, key=lambda gpu: gpu.capability)]
    rows = _rows(asked, families)
    return Cards(
        script=asked.script,
        rows=sorted(rows, key=lambda row: (row.total_bytes, row.name)),
        plays=asked.simulator.played - played,
        seconds=round(time.monotonic() - started, 1),
    )


def _rows(asked: Asked, families: list[list[GPU]]) -> list[CardRow]:
    """Play the ends of each family, and the parts of one whose ends differ, until every card has its row."""
    rows: list[CardRow] = []
    played: dict[str, Detail] = {}
    while families:
        new = [gpu for family in families for gpu in _ends(family) if gpu.name not in played]
        details = asked.play([_request(asked, gpu, _family_of(families, gpu)) for gpu in new])
        played.update({gpu.name: detail for gpu, detail in zip(new, details, strict=True)})
        left: list[list[GPU]] = []
        for family in families:
            ends = _ends(family)
            first, last = played[ends[0].name], played[ends[-1].name]
            if first.tape and first.tape == last.tape:
                rows += _replayed(family, first)
            elif not (first.tape and last.tape) or len(ends) == 1:
                rows += _each(asked, family)
            else:
                middle = _middle(family)
                left += [family[:middle], family[middle:]]
        families = left
    return rows


def _middle(family: list[GPU]) -> int:
    """Return the index of the first card with more multiprocessors, as near to the middle as there is one."""
    steps = [place for place in range(1, len(family)) if family[place].sm_count > family[place - 1].sm_count]
    return min(steps, key=lambda place: abs(place - len(family) / 2))


def _ends(family: list[GPU]) -> list[GPU]:
    """Return the cards with the fewest and the most multiprocessors; one if all have as many."""
    return [family[0]] if family[0].sm_count == family[-1].sm_count else [family[0], family[-1]]


def _family_of(families: list[list[GPU]], gpu: GPU) -> list[GPU]:
    return next(family for family in families if gpu in family)


def _request(asked: Asked, gpu: GPU, family: list[GPU]) -> DetailRequest:
    """Ask for a play of `gpu` with the memory of the family's largest card, and its replay on all of them."""
    settings = replace(
        asked.settings, gpu=gpu.name, memory_bytes=max(each.planning_bytes for each in family), capability=None
    )
    return asked.request(settings=settings, cards=[_size(asked, each) for each in family])


def _size(asked: Asked, gpu: GPU) -> CardSize:
    context = asked.settings.context_bytes
    return CardSize(
        name=gpu.name,
        total_bytes=gpu.planning_bytes,
        context_bytes=context_bytes(gpu)[0] if context is None else context,
        used_bytes=asked.settings.used_bytes,
    )


def _replayed(family: list[GPU], detail: Detail) -> list[CardRow]:
    capability = {gpu.name: _dotted(gpu) for gpu in family}
    used = detail.findings.gpu.used_by_others_bytes
    return [
        CardRow(
            **asdict(each),
            capability=capability[each.name],
            free_bytes=each.total_bytes - used - each.device_bytes,
            replayed=True,
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
        error=found.stopped_because if found.outcome == "error" else None,
    )


def _dotted(gpu: GPU) -> str:
    return ".".join(map(str, gpu.capability))
