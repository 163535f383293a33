"""Which functions may be called ahead of the script: `tightfit.vgpu.pure_functions`."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tightfit.vgpu.pure_functions import is_pure

SOURCE = """
import math, random

SCHEDULE = [(0, 16), (400, 256)]
calls = []
total = 0

def of_table(step):
    '''The length at a step.'''
    for start, length in reversed(SCHEDULE):
        if step >= start:
            return length

def of_others(step, *, least=1):
    found = max(least, of_table(step))
    count = 0
    for _ in range(3):
        count += 1
    return min(found, math.ceil(count * 100)) if found else [each for each, _ in SCHEDULE][0]

class Table:
    kept = {"small": 4}
    def __init__(self):
        self.sizes = {0: 4, 10: 64}
    def at(self, step):
        return self.sizes.get(step, self.kept["small"])
    @property
    def largest(self):
        calls.append(1)
        return 64
    def of_property(self):
        return self.largest
    def keeps(self, step):
        self.step = step
        return step

def appends(step):
    calls.append(step)
    return step

def counts(step):
    global total
    total += 1
    return total

def draws(step):
    return random.randint(0, step)

def adds_in_place(step, table=None):
    found = table or SCHEDULE
    found += [(step, step)]
    return len(found)

def sets_an_item(step):
    SCHEDULE[0] = (0, step)
    return step

def calls_what_it_is_given(step, function=len):
    return function(SCHEDULE)

def calls_another(step):
    return appends(step)

def yields(step):
    yield step

def prints(step):
    print(step)
    return step

max_of_two = lambda one, two: max(one, two)
"""


@pytest.fixture
def made(tmp_path: Path) -> ModuleType:
    path = tmp_path / "functions.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("functions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_that_only_compute(made: ModuleType) -> None:
    assert is_pure(made.of_table, [500], {})
    assert is_pure(made.of_others, [500], {"least": 2})
    assert is_pure(made.Table.at, [made.Table(), 10], {})


@pytest.mark.parametrize(
    "name",
    [
        *("appends", "counts", "draws", "adds_in_place", "sets_an_item", "calls_what_it_is_given", "calls_another"),
        *("yields", "prints", "max_of_two"),
    ],
)
def test_functions_that_do_more(made: ModuleType, name: str) -> None:
    assert not is_pure(getattr(made, name), [3], {})


def test_methods_that_do_more(made: ModuleType) -> None:
    table = made.Table()
    assert not is_pure(made.Table.of_property, [table], {})
    assert not is_pure(made.Table.keeps, [table, 3], {})


def test_what_is_read_must_be_plain(made: ModuleType) -> None:
    assert not is_pure(made.of_table, [object()], {})
    made.SCHEDULE.append((object(), 1))
    assert not is_pure(made.of_table, [500], {})
