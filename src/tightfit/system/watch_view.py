"""The output of watch: a picture of bars and sparklines, redrawn with each sample, or one plain line."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from rich.cells import cell_len
from rich.text import Text

from tightfit.storage import METRICS
from tightfit.system.checks import Program
from tightfit.system.nvml import Failure, GpuMemory
from tightfit.system.sampling import Sample
from tightfit.system.wrapping import wrap
from tightfit.units import format_bytes, format_duration
from tightfit.wording.system import Words

_BLOCKS = "▁▂▃▄▅▆▇█"
_INDENT = "  "
_HIGH, _FULL = 0.8, 0.95
"""Shares of a memory from which its bar is yellow, and red."""


def frame(history: Sequence[Sample], words: Words, *, interval_s: float, width: int, height: int) -> Text:
    """Draw the last sample; bars alone if the terminal is too low for everything."""
    sample = history[-1]
    header = words("watch", "header", time=sample.time.strftime("%H:%M:%S"), interval=interval_s)
    for detailed in (True, False):
        lines = [Text(header, style="dim"), *_host(history, words, width, detailed)]
        lines += _cards(history, words, width, detailed)
        lines += _run(history, words, width, detailed)
        if len(lines) < height:
            break
    return Text("\n").join(lines)


def plain_line(sample: Sample, words: Words) -> str:
    """One line for a file or a pipe."""
    host = f"{words('watch', 'host')} {_share(sample.host.used_bytes, sample.host.total_bytes)}"
    parts = [sample.time.isoformat(timespec="seconds"), host]
    for card in sample.cards.cards:
        state = "".join(words("words", "separator") + each for each in _card_state(card, words))
        parts.append(f"GPU {card.index} {_share(card.used_bytes, card.total_bytes)}{state}")
    if sample.folder is not None:
        parts.append(words("words", "separator").join(_run_words(sample, words)))
    return "; ".join(parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values from 0 to 1 as blocks; if they do not all fit, the highest of each group.

    >>> sparkline([0, 0.5, 1], 10), sparkline([0, 1, 0, 0], 2)
    ('▁▅█', '█▁')
    """
    if len(values) > width:
        edges = [round(column * len(values) / width) for column in range(width + 1)]
        values = [max(values[start:end]) for start, end in pairwise(edges)]
    return "".join(_BLOCKS[round(min(1.0, max(0.0, value)) * (len(_BLOCKS) - 1) + 1e-9)] for value in values)


def _share(used: int, total: int) -> str:
    return f"{format_bytes(used)} / {format_bytes(total)}"


def _host(history: Sequence[Sample], words: Words, width: int, detailed: bool) -> Iterator[Text]:
    host = history[-1].host
    yield Text(words("watch", "host"), style="bold")
    total = host.total_bytes
    said = words("watch", "host_used", used_bytes=host.used_bytes, total_bytes=total)
    yield _bar(host.used_bytes / total, said, width)
    if detailed:
        yield from _history(history, words, width, lambda sample: sample.host.used_bytes / total)
    if (limit := host.tightest) and detailed:
        said = words("watch", "limit", source=limit.source, left_bytes=limit.left_bytes, limit_bytes=limit.limit_bytes)
        yield from _wrapped(said, width)


def _cards(history: Sequence[Sample], words: Words, width: int, detailed: bool) -> Iterator[Text]:
    sample = history[-1]
    for card in sample.cards.cards:
        yield _title(words("watch", "card", index=card.index, name=card.name), _card_state(card, words), width)
        said = words("watch", "used", used_bytes=card.used_bytes, total_bytes=card.total_bytes)
        yield _bar(card.used_bytes / max(1, card.total_bytes), said, width)
        if not detailed:
            continue
        yield from _history(history, words, width, _use_of(card.index))
        for part in card.instances:
            used = part.total_bytes - part.free_bytes
            yield from _wrapped(
                words("watch", "part_used", name=part.name, used_bytes=used, total_bytes=part.total_bytes), width
            )
        if card.others:
            who = [Program(name=each.name or "?", pid=each.pid, used_bytes=each.used_bytes) for each in card.others]
            yield from _wrapped(words("watch", "others", who=who), width)
        elif card.others is None:
            yield from _wrapped(words("watch", "others_silent"), width)
    for missing in missing_cards(sample, words):
        yield from (Text(line, style="yellow") for line in wrap(missing, width))


def missing_cards(sample: Sample, words: Words) -> list[str]:
    """Sentences about cards that watch cannot show, with the reason."""
    if sample.cards.cards:
        return []
    said = [words("watch", vendor) for vendor in ("amd", "apple") if vendor in sample.vendors]
    if said:
        return said
    failure = sample.cards.failure or Failure("no_cards")
    return [words("watch", "no_cards", failure=failure.sentence(words.language))]


def _card_state(card: GpuMemory, words: Words) -> list[str]:
    said = []
    if card.temperature_c is not None:
        said.append(words("watch", "temperature", value=card.temperature_c))
    if card.utilisation is not None:
        said.append(words("watch", "busy", value=card.utilisation))
    return said


def _use_of(index: int) -> Callable[[Sample], float]:
    def use(sample: Sample) -> float:
        return next((card.used_bytes / card.total_bytes for card in sample.cards.cards if card.index == index), 0.0)

    return use


def _run(history: Sequence[Sample], words: Words, width: int, detailed: bool) -> Iterator[Text]:
    sample = history[-1]
    if sample.folder is None:
        return
    title, *rest = _run_words(sample, words)
    yield Text(title, style="bold")
    for line in rest:
        yield from _wrapped(line, width)
    if detailed and sample.run and sample.run.peak_bytes:
        top = sample.run.peak_bytes
        yield from _history(history, words, width, lambda each: (each.run.memory_bytes or 0) / top if each.run else 0.0)


def _run_words(sample: Sample, words: Words) -> list[str]:
    assert sample.folder is not None
    title, run = words("watch", "run", folder=sample.folder), sample.run
    if run is None:
        return [title, words("watch", "run_waiting", file=sample.folder / METRICS)]
    said = [title]
    if run.loss is not None and run.tokens_per_s is not None:
        said.append(words("watch", "run_step", step=run.step, loss=run.loss, rate=run.tokens_per_s))
    if run.memory_bytes is not None and run.peak_bytes is not None:
        key = "run_memory" if run.allocated_bytes is None else "run_memory_allocated"
        sizes = {"now_bytes": run.memory_bytes, "peak_bytes": run.peak_bytes, "allocated_bytes": run.allocated_bytes}
        said.append(words("watch", key, **sizes))
    return [*said, words("watch", "run_age", age=format_duration(run.age_s))]


def _title(left: str, right: Sequence[str], width: int) -> Text:
    state = "  ".join(right)
    gap = max(2, width - cell_len(left) - cell_len(state))
    return Text(left, style="bold", no_wrap=True, overflow="ellipsis").append(" " * gap + state, style="not bold")


def _bar(share: float, said: str, width: int) -> Text:
    """A bar and its meaning, in one line of the terminal."""
    share = min(1.0, max(0.0, share))
    columns = max(5, min(40, width - cell_len(said) - len(_INDENT) - 4))
    filled = round(share * columns)
    style = "red" if share >= _FULL else "yellow" if share >= _HIGH else "green"
    text = Text(_INDENT, no_wrap=True, overflow="ellipsis")
    text.append("█" * filled, style=style).append("░" * (columns - filled), style="dim")
    return text.append(f"  {said}")


def _history(history: Sequence[Sample], words: Words, width: int, value: Callable[[Sample], float]) -> Iterator[Text]:
    """A sparkline of `value` over time, from two samples on."""
    if len(history) < 2:
        return
    span = format_duration((history[-1].time - history[0].time).total_seconds())
    said = words("watch", "history", span=span)
    line = sparkline([value(sample) for sample in history], max(5, min(60, width - cell_len(said) - len(_INDENT) - 3)))
    yield Text(f"{_INDENT}{line}", style="cyan").append(f"  {said}", style="dim")


def _wrapped(text: str, width: int) -> Iterator[Text]:
    for line in wrap(text, max(20, width - len(_INDENT))):
        yield Text(_INDENT + line)
