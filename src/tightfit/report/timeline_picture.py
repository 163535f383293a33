"""Memory over a dry run as a picture."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tightfit.errors import ConfigError, DataError
from tightfit.units import GIB, format_bytes
from tightfit.vgpu.records import FailedRequest, PhaseStart, Timeline
from tightfit.wording import say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The "muted" scheme of Paul Tol, Colour Schemes (SRON/EPS/TN/09-002), made for colour-blind readers; bottom to top,
# what lives longest below.
CATEGORY_COLOURS = {
    "parameters": "#332288",
    "optimizer state": "#44AA99",
    "gradients": "#CC6677",
    "cast copies": "#88CCEE",
    "activations": "#DDCC77",
    "logits": "#882255",
    "inputs": "#117733",
    "workspace": "#AA4499",
    "other": "#BBBBBB",
}
PHASE_COLOURS = {
    "setup": "#E4E4E4",
    "eval": "#D5E8D4",
    "forward": "#CFE2F3",
    "loss": "#F4CCCC",
    "backward": "#FCE5CD",
    "optimizer": "#D9D2E9",
    "save": "#FFF2CC",
    "resume": "#FFF2CC",
    "sample": "#D0E0E3",
    "compile": "#EAD1DC",
}
DARK_CATEGORY_COLOURS = CATEGORY_COLOURS | {
    "parameters": "#7B74D6",
    "logits": "#D0598F",
    "inputs": "#4FA866",
    "workspace": "#C277BF",
    "activations": "#C9BA66",
    "other": "#8A8A8A",
}
"""On a dark page some categories would be too dark, or too bright."""


@dataclass(frozen=True, kw_only=True)
class _Theme:
    """Colours of a picture beside those of phases."""

    paper: str
    ink: str
    grey: str
    grid: str
    alarm: str
    categories: dict[str, str]
    phase_alpha: float


_LIGHT = _Theme(
    paper="#FFFFFF",
    ink="#222222",
    grey="#6B6B6B",
    grid="#DDDDDD",
    alarm="#B00020",
    categories=CATEGORY_COLOURS,
    phase_alpha=1.0,
)
_DARK = _Theme(
    paper="#0D1117",  # GitHub's own
    ink="#E6EDF3",
    grey="#9198A1",
    grid="#2A3038",
    alarm="#FF7B86",
    categories=DARK_CATEGORY_COLOURS,
    phase_alpha=0.25,
)
_SIZE_INCHES = (8.65, 4.7)
"""830 pixels wide as an SVG, the width of a README on GitHub."""
_RESERVED = "reserved by PyTorch"
_LARGEST_HEADROOM = 2.5
"""A capacity above this multiple of the peak is written instead of drawn: the areas would be flat."""
_CHARACTER = 0.0085
"""Width of a phase's letter as a share of the axis."""


def timeline_picture(
    timeline: Timeline,
    path: str | os.PathLike[str],
    *,
    card: str = "",
    outcome: str = "",
    place: str = "",
    dark: bool = False,
) -> None:
    """Draw a timeline to a .png or .svg file, with the card and the outcome of the dry run in its title.

    `place` is the line of the script that failed; `dark` draws for a dark page. The words are English: a picture has no
    font that is sure to have Japanese. Raises ConfigError for another ending, DataError if the file cannot be written.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ConfigError(say("picture.timeline.ending", path=os.fspath(path)))
    figure = _figure(timeline, card, outcome, place=place, theme=_DARK if dark else _LIGHT)
    try:
        figure.savefig(path, format=kind, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise DataError(say("picture.timeline.not_written", path=os.fspath(path), reason=error.strerror)) from None


def _figure(data: Timeline, card: str, outcome: str, *, place: str = "", theme: _Theme = _LIGHT) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=192, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=(16, 1))
    end = max(data.event_count, 1)
    failure = data.failures[-1] if outcome in ("", "out_of_memory") and data.failures else None
    axes.set_xlim(0, end * 1.01)
    for each in (axes, strip):
        each.set_facecolor(theme.paper)
    _areas(axes, data, theme)
    _limits(axes, data, theme)
    _marks(axes, data, failure, place, theme)
    _phase_strip(strip, data.phases, end, theme)
    axes.set_title(_title(card, outcome), loc="left", fontsize=13, fontweight="bold", color=theme.ink, pad=12)
    _legend(axes, data, failure, theme)
    return figure


def _title(card: str, outcome: str) -> str:
    verdict = {"fits": "fits", "out_of_memory": "does not fit"}.get(outcome, "")
    return ": ".join(filter(None, ("Allocated memory" + (f" on {card}" if card else ""), verdict)))


def _areas(axes: "Axes", data: Timeline, theme: _Theme) -> None:
    """Draw the categories on top of each other, and the reserved line."""
    events, sums = data.events, data.category_bytes
    if not events:
        return
    # Each state lasts until the next event; the last one until the end.
    ends = [*events, data.event_count]
    names = [name for name in CATEGORY_COLOURS if name in sums]
    if names:
        rows = [[nbytes / GIB for nbytes in (*sums[name], sums[name][-1])] for name in names]
        colours = [theme.categories[name] for name in names]
        axes.stackplot(ends, rows, labels=names, colors=colours, step="post", linewidth=0)
        # An outline, so that a peak of one event among thousands can be seen.
        axes.step(
            ends, [sum(column) for column in zip(*rows, strict=True)], where="post", color=theme.grey, linewidth=0.6
        )
    if data.reserved_bytes:
        reserved = [nbytes / GIB for nbytes in (*data.reserved_bytes, data.reserved_bytes[-1])]
        axes.step(ends, reserved, where="post", color=theme.ink, linewidth=1.1, label=_RESERVED)


def _limits(axes: "Axes", data: Timeline, theme: _Theme) -> None:
    """Set the axes' ranges and words, and mark the memory that PyTorch may use."""
    capacity = data.capacity_bytes
    highest = max([data.allocated_bytes(event) for event in data.events], default=0)
    highest = max([highest, *(data.reserved_bytes or ()), *(_asked(data, each) for each in data.failures[-1:])])
    words = f"{format_bytes(capacity)} for PyTorch, of {format_bytes(data.total_bytes)}"
    if data.used_by_others_bytes:
        words += f" ({format_bytes(data.used_by_others_bytes)} used by others)"
    if capacity <= _LARGEST_HEADROOM * highest:
        highest = max(highest, capacity)
        axes.axhline(capacity / GIB, color=theme.alarm, linewidth=1.3, linestyle=(0, (6, 3)))
        _note_capacity(axes, words, (capacity + 0.012 * highest) / GIB, theme, va="bottom")
    else:
        _note_capacity(axes, f"{words}, above this picture ↑", 1.12 * highest / GIB, theme, va="top")
    axes.set_ylim(0, max(1.14 * highest, 1) / GIB)
    axes.set_ylabel("GiB", fontsize=10, color=theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.tick_params(axis="y", length=0, labelsize=10, colors=theme.grey)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.ink)


def _note_capacity(axes: "Axes", words: str, height: float, theme: _Theme, *, va: Literal["top", "bottom"]) -> None:
    box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 1, "alpha": 0.85}
    place = axes.get_yaxis_transform()
    axes.text(0.006, height, words, va=va, fontsize=9.5, color=theme.alarm, transform=place, zorder=5, bbox=box)


def _asked(data: Timeline, failure: FailedRequest) -> int:
    return data.allocated_bytes(failure.event) + failure.requested_bytes


def _marks(axes: "Axes", data: Timeline, failure: FailedRequest | None, place: str, theme: _Theme) -> None:
    """Mark the failure that ended the run, or else the peak; failed requests that were caught are crosses."""
    highest = 0.97 * axes.get_ylim()[1]
    for each in data.failures:
        at, low, top = each.event, data.allocated_bytes(each.event) / GIB, min(_asked(data, each) / GIB, highest)
        axes.plot([at, at], [low, top], color=theme.alarm, linewidth=1.6, linestyle=":")
        axes.plot([at], [top], marker="X", color=theme.alarm, markersize=9, markeredgecolor=theme.paper, clip_on=False)
    if failure is not None:
        words = (
            f"out of memory: asked for {format_bytes(failure.requested_bytes)},\n"
            f"{format_bytes(failure.free_bytes)} free on the device"
        )
        words += f"\nat {place}" if place else ""
        _note(axes, words, failure.event, min(_asked(data, failure) / GIB, highest), theme.alarm, theme)
    elif data.events:
        peak = data.peak
        top = data.allocated_bytes(peak.event) / GIB
        axes.plot([peak.event], [top], marker="o", color=theme.ink, markersize=6, markeredgecolor=theme.paper)
        words = f"peak, in {peak.phase}: {format_bytes(peak.allocated_bytes)} allocated"
        _note(axes, words, peak.event, top, theme.ink, theme)


def _note(axes: "Axes", words: str, event: int, top_gib: float, colour: str, theme: _Theme) -> None:
    """Write words next to a mark, on the side with more room, below the mark if it is near the top."""
    left = event > 0.5 * axes.get_xlim()[1]
    axes.annotate(
        words,
        (event, top_gib),
        xytext=(-12 if left else 12, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top" if top_gib > 0.9 * axes.get_ylim()[1] else "center",
        fontsize=10,
        fontweight="bold",
        color=colour,
        bbox={
            "boxstyle": "round,pad=0.3",
            "facecolor": theme.paper,
            "edgecolor": colour,
            "linewidth": 0.8,
            "alpha": 0.92,
        },
        zorder=10,
    )


def _phase_strip(strip: "Axes", phases: Sequence[PhaseStart], end: int, theme: _Theme) -> None:
    """Draw a band of phases along the x axis, with names in it where they have room, or else in a legend."""
    from matplotlib.patches import Patch

    named, met = set(), []
    spans = [(each.event, each.phase) for each in phases]
    for (start, phase), (stop, _) in pairwise([*spans, (end, "")]):
        met.append(phase)
        strip.axvspan(
            start, stop, facecolor=PHASE_COLOURS[phase], alpha=theme.phase_alpha, edgecolor=theme.paper, linewidth=0.8
        )
        if (stop - start) / end > _CHARACTER * (len(phase) + 1):
            named.add(phase)
            strip.text(
                (start + stop) / 2, 0.5, phase, ha="center", va="center", fontsize=8.5, color=theme.ink, clip_on=True
            )
    missing = [phase for phase in PHASE_COLOURS if phase in {*met} - named]
    narrow = [Patch(color=PHASE_COLOURS[phase], alpha=theme.phase_alpha, label=phase) for phase in missing]
    if narrow:
        beside = strip.legend(
            handles=narrow,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize=8.5,
            ncols=2,
            labelcolor=theme.ink,
        )
        beside.set_in_layout(False)  # the other legend's column has room for it
    strip.set_ylim(0, 1)
    strip.set_yticks([])
    strip.set_xlabel("allocations and releases, in order", fontsize=10, color=theme.ink)
    strip.tick_params(axis="x", length=0, labelsize=9, colors=theme.grey)
    strip.xaxis.set_major_formatter("{x:,.0f}")
    strip.spines[:].set_visible(False)


def _legend(axes: "Axes", data: Timeline, failure: FailedRequest | None, theme: _Theme) -> None:
    """List the categories in the order of the stack, with their bytes at the marked moment."""
    event = (failure or data.peak).event
    when = "when it failed" if failure else "at the peak"
    earlier = data.at(event)
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    rows = {**data.category_bytes, _RESERVED: data.reserved_bytes or []}
    words = [f"{name}   {format_bytes(rows[name][earlier])}" for name in names]
    legend = axes.legend(
        handles[::-1],
        words[::-1],
        title=f"Bytes {when}",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9.5,
        labelcolor=theme.ink,
        labelspacing=0.65,
        alignment="left",
        borderaxespad=0,
    )
    legend.get_title().set(fontweight="bold", color=theme.ink)
