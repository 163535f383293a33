"""Conditions in functions that a loop's source does not lead to are followed where iterations are passed over."""

from pathlib import Path

import pytest
from plays import findings
from test_vgpu_loops import assert_all_of_it_plays

HEAD = """
import functools, itertools, torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
played = set()

def big(name):
    played.add(name)
    return torch.ones(1 << 20, device="cuda")

def train():
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
"""
FORMS = (
    HEAD
    + """
a_lambda = lambda step: big("lambda") if step == 7001 else None

def of_partial(name, step):
    if step % 9000 == 8000 and step > 100:
        big(name)

a_partial = functools.partial(of_partial, "partial")

def every(number):
    def wrapped(function):
        @functools.wraps(function)
        def inner(step):
            if step % number == number - 1:
                function(step)
        return inner
    return wrapped

@every(6000)
def decorated(step):
    big("decorator")

def closure():
    calls = 0
    def inner():
        nonlocal calls
        calls += 1
        if calls >= 9500 and (calls > 1 << 13 or never_defined):
            big("closure")
    return inner

counted = closure()

class Hooks:
    steps = 0

    @property
    def more(self):
        self.steps += 1
        if (left := 10_000 - self.steps) == 30:
            big("property")

    def after(self):
        state["calls"] += 1
        if state["calls"] == 4321:
            big("super")

class OwnHooks(Hooks):
    def after(self):
        super().after()

state, hooks, history, sizes, size = {"calls": 0}, OwnHooks(), [], {7777: 1 << 21}, 1
for step in range(10_000):
    train()
    for call in {"lambda": a_lambda, "partial": a_partial}.values():
        call(step)
    decorated(step)
    counted()
    hooks.more
    hooks.after()
    assert hooks.steps == state["calls"] == step + 1  # what was counted for iterations that did not run
    history.append(step)
    if len(history) == 5555:
        big("length")
    if step in sizes:
        size = sizes[step]
    if len(torch.ones(size, device="cuda")) > 1:
        played.add("size")
names = {"lambda", "partial", "decorator", "closure", "property", "super", "length", "size"}
assert played == names, names - played
"""
)
NESTED = (
    HEAD
    + """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.calls = torch.nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2000 == 1999 and self.calls > 15_000:
            big("module")
        return self.inner(x)

class Own(torch.optim.SGD):
    def step(self):
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                if state["step"] == 8500:
                    big("optimizer")

class Epochs:
    ended = 0

    def after(self):
        self.ended += 1
        if self.ended == 17:
            big("epoch")

class OwnEpochs(Epochs):
    def after(self):
        super().after()

model, epochs = Net().cuda(), OwnEpochs()
optimizer = Own(model.parameters(), lr=0.1)
for epoch in range(20):
    for step in range(1000):
        train()
    epochs.after()
assert played == {"module", "optimizer", "epoch"}, played
"""
)
UNEVEN = (
    HEAD
    + """
class Hooks:
    steps = 0

    def after(self):
        self.steps += next(uneven)
        if self.steps > 9000:
            big("later")  # nobody can tell when

class OwnHooks(Hooks):
    def after(self):
        super().after()

hooks, uneven = OwnHooks(), itertools.cycle((1, 3, 2, 1, 5))
for step in range(10_000):
    train()
    hooks.after()
"""
)
NEVER = (
    HEAD
    + """
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 40_000

    def __getitem__(self, index):
        if index == -1:
            return big("sample")
        return torch.ones(8)

class Hooks:
    steps = 0

    def after(self):
        self.steps += 1
        if self.steps == 10_001:
            big("after the end")

class OwnHooks(Hooks):
    def after(self):
        super().after()

hooks = OwnHooks()
for batch in DataLoader(Data(), 4, shuffle=True):
    train()
    hooks.after()
assert hooks.steps == 10_000
"""
)

COUNTED = (
    HEAD
    + """
def rarely(step):
    if step not in (5, 7031):
        return
    big("an early return")

state = {"calls": 0}
for step, _ in enumerate(range(10_000)):
    train()
    rarely(step)
    if step in (5, 1400):
        big("the loop itself")  # in an iteration that runs anyway, before what counts behind it
    state["calls"] += 1
    if state["calls"] == 9000:
        big("an item")
big("after the loop")
assert played == {"an early return", "the loop itself", "an item", "after the loop"}, played
"""
)
CHANCE = (
    HEAD
    + """
numbers, done = itertools.count(), False

class Trainer:
    def one(self, step):
        train()
        if next(numbers) == 6810:
            big("by an iterator")  # listed
        if next(numbers) > 5000 and not done:
            big("by half of it")  # listed

    def run(self):
        for step in range(10_000):
            self.one(step)

Trainer().run()
"""
)


def test_functions_that_the_loop_does_not_lead_to_are_followed(tmp_path: Path) -> None:
    """Each form runs once, late, and finds its counters as if every iteration had run."""
    assert_all_of_it_plays(tmp_path, FORMS, steps=150)


def test_what_counts_in_modules_optimizers_and_epochs_is_followed(tmp_path: Path) -> None:
    assert_all_of_it_plays(tmp_path, NESTED, steps=150)


def test_what_counts_unevenly_is_listed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(UNEVEN)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    line = UNEVEN.split("\n").index('            big("later")  # nobody can tell when') + 1
    assert [each["line"] for each in found["not_played"]] == [line]


def test_what_returns_early_and_what_counts_behind_a_rare_line_is_followed(tmp_path: Path) -> None:
    assert_all_of_it_plays(tmp_path, COUNTED, steps=60)


def test_what_an_iterator_decides_is_listed(tmp_path: Path) -> None:
    """Also where the rest of the condition holds."""
    (tmp_path / "train.py").write_text(CHANCE)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    lines = [number for number, line in enumerate(CHANCE.split("\n"), start=1) if line.endswith("# listed")]
    assert sorted(each["line"] for each in found["not_played"]) == lines


def test_what_never_runs_is_not_listed(tmp_path: Path) -> None:
    """A condition that comes true after the loop's end, and one that decides on samples alone."""
    assert_all_of_it_plays(tmp_path, NEVER, steps=60)


ENDLESS = (
    HEAD
    + """
class Loop:
    def __init__(self, most_steps=0):
        self.most_steps, self.steps, self.halves = most_steps, 0, True

    def run(self):
        while not self.most_steps or self.steps < self.most_steps:
            train()
            self.update()
            self.steps += 1
        big("after a loop that cannot end")

    def update(self):
        if self.halves:
            return model(torch.ones(4, 8, device="cuda"))
        else:
            return big("the other way")

Loop().run()
big("after it")
"""
)
OWN_GENERATOR = (
    HEAD
    + """
def passes(count):
    for _ in range(count):
        yield

class Trainer:
    steps = 0

    def one(self, given=None):
        applies = self.steps > 5000 and self.steps % 32 == 0
        for _ in passes(2):
            train()
            if applies:
                big("in a generator's loop")
        self.open(given)
        self.steps += 1

    def open(self, given=None):
        given = self.steps if given is None else given
        if given is None:
            return
        if given == 7000:
            big("behind an early return")

trainer = Trainer()
while trainer.steps < 10_000:
    trainer.one()
assert len(played) == 2, played
"""
)

POSITIONS = (
    HEAD
    + """
class Batches:
    def __init__(self):
        self.begin()

    def begin(self):
        self.tokens, self.at = torch.arange(2442), 0

    def next_after(self):
        batch = self.tokens[self.at : self.at + 64].view(8, 8)
        self.at += 64
        if self.at + 64 > len(self.tokens):
            self.tokens, self.at = torch.arange(2442), 0
        return batch

    def next_round(self):
        batch = self.tokens[self.at : self.at + 64].view(8, 8)
        if self.at == 64 and len(self.tokens) < 64:
            big("never")
        self.at = (self.at + 64) % 2432
        return batch

training, validation = Batches(), Batches()
take = {take}
for step in range(1000):
    if step % 250 == 0:
        validation.begin()
        for _ in range(20):
            model(take(validation).float().cuda())
    for _ in range(8):
        model(take(training).float().cuda()).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    if step == 999:
        big("the last step")
assert played == {"the last step"}
"""
)


@pytest.mark.parametrize("take", ["Batches.next_after", "Batches.next_round"])
def test_positions_that_begin_anew_do_not_grow_on(take: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(POSITIONS.replace("{take}", take))
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits"
    assert found["steps"] < 30


def test_what_comes_after_an_endless_loop_is_not_listed(tmp_path: Path) -> None:
    """An option that is 0 keeps the loop going; another one, which nothing changes, decides the way of a function."""
    (tmp_path / "train.py").write_text(ENDLESS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["steps"] < 20


def test_the_body_of_a_loop_over_a_generator_is_followed(tmp_path: Path) -> None:
    assert_all_of_it_plays(tmp_path, OWN_GENERATOR, steps=100)
