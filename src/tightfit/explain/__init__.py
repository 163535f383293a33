"""From an error log to facts: what failed, with which figures, where in the program."""

from tightfit.explain.facts import CONSEQUENCES, KINDS, NOTES, Facts, Figure, OtherProcess
from tightfit.explain.guess import Guess, Guesses, guess
from tightfit.explain.log import LogReading, Other, read_log
from tightfit.explain.printed import Printed
from tightfit.explain.snapshot import facts_of_snapshot, read_snapshot_failure
from tightfit.explain.traceback import TraceFrame

__all__ = [
    "CONSEQUENCES",
    "KINDS",
    "NOTES",
    "Facts",
    "Figure",
    "Guess",
    "Guesses",
    "LogReading",
    "Other",
    "OtherProcess",
    "Printed",
    "TraceFrame",
    "facts_of_snapshot",
    "guess",
    "read_log",
    "read_snapshot_failure",
]
