"""From an error log to what failed, which tensor it was, why, and fixes that were checked."""

from tightfit.explain.causes import Cause
from tightfit.explain.culprit import Culprit
from tightfit.explain.explanation import Explanation, explain
from tightfit.explain.facts import CONSEQUENCES, KINDS, NOTES, Facts, Figure, OtherProcess
from tightfit.explain.guess import Guess, Guesses, guess
from tightfit.explain.log import LogReading, Other, read_log
from tightfit.explain.printed import Printed
from tightfit.explain.remedies import Remedy
from tightfit.explain.render import render
from tightfit.explain.snapshot import facts_of_snapshot, read_snapshot_failure
from tightfit.explain.traceback import TraceFrame

__all__ = [
    "CONSEQUENCES",
    "KINDS",
    "NOTES",
    "Cause",
    "Culprit",
    "Explanation",
    "Facts",
    "Figure",
    "Guess",
    "Guesses",
    "LogReading",
    "Other",
    "OtherProcess",
    "Printed",
    "Remedy",
    "TraceFrame",
    "explain",
    "facts_of_snapshot",
    "guess",
    "read_log",
    "read_snapshot_failure",
    "render",
]
