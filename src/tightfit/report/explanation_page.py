"""The sections of an explanation's page: problem, memory at the failure, causes, fixes, what is to be expected."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from tightfit.explain.causes import MEASURED, SIMULATED
from tightfit.explain.explanation import Explanation
from tightfit.explain.remedies import DOES_NOT_FIT, FITS, NO_EFFECT, Remedy
from tightfit.explain.render import Sentences, _arithmetic, _expected, _fixes_known, _problem
from tightfit.explain.words import Words as ExplainWords
from tightfit.explain.words import words as explain_words
from tightfit.report.page import Advice, Page, Section, Segment, Table
from tightfit.report.timeline import CATEGORY_COLOURS
from tightfit.report.words import Words
from tightfit.units import format_bytes
