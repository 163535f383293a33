"""The version of PyTorch that a report states, where the form of its message does not tell it."""

import re

from msgspec.structs import replace

from tightfit.oomlog.facts import Facts
from tightfit.oomlog.run_facts import RunFacts

_VERSION = re.compile(
    r"(?i)(?<![\w/])(?:py)?torch(?: version)?[\"'`]?\W{1,4}(?:==)?v?([01])\.(\d{1,2})(?:\.\d|\b)(?![\d.]*[x+])"
)
_FORMS = ((3, "T1"), (9, "T2"), (13, "T3"))
"""The last minor version of PyTorch 1 with each form of its message: without a reserve, with one, with advice."""


def with_printed_version(facts: Facts, run: RunFacts) -> Facts:
    """Return a failure on a device with the message's form of the PyTorch 1 that the report names.

    >>> facts = Facts(kind="cuda_out_of_memory")
    >>> with_printed_version(facts, RunFacts(text="pytorch version: 1.3.1")).torch_format
    'T1'
    """
    found = None if facts.torch_format or facts.figures else _VERSION.search(run.text)
    if found is None or not facts.kind.startswith(("cuda", "hip")):
        return facts
    minor = int(found[2]) if found[1] == "1" else 0
    form = next((each for last, each in _FORMS if minor <= last), None)
    return replace(facts, torch_format=form) if form else facts
