"""Sizes that grow for many iterations, ends of iterators, and what loops keep: the truth is arithmetic, in MiB."""

from pathlib import Path

import pytest
from plays import findings

MODEL = """
import torch
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())

def train(mib):
    held = torch.zeros(int(mib) << 20, dtype=torch.uint8, device="cuda")
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
"""
COUNTED = """
for step in range(1500):
    train(4 + step // 5)
"""
FROM_A_BAR = """
from tqdm import tqdm
for step in tqdm(range(1500)):
    train(4 + step // 5)
"""
SHRINKING = """
step = 1500
while step > 0:
    step -= 1
    train(310 - step // 5)
"""
OVER_EPOCHS = """
step = 0
def epoch():
    global step
    for _ in range(300):
        train(4 + step // 5)
        step += 1
for _ in range(6):
    epoch()
"""
IN_A_CLASS = """
class Trainer:
    step = 0
    def length(self):
        return 4 + 200 * min(self.step / 700, 1.0)
    def one(self):
        train(self.length())
        self.step += 1
    def fit(self, data):
        for _ in range(5):
            for number, (x,) in enumerate(data):
                self.one()
Trainer().fit(DataLoader(TensorDataset(torch.zeros(800, 8)), batch_size=4, shuffle=True))
"""
INTERPOLATED = """
import numpy
for step in range(1200):
    train(round(float(numpy.interp(step, (0, 200, 900), (4, 4, 100)))))
"""
OF_A_SCHEDULE = """
class Schedule:
    start = 200
    def __call__(self, step):
        return 4 + max(0, step - self.start) * 0.05 * 5
length, step = Schedule(), 0
for epoch in range(12):
    for i in range(100):
        train(round(length(step)))
        step += 1
"""
OF_AN_EPOCH = """
class Trainer:
    def length(self):
        return 8 * 2 ** (self.epoch // 4)
    def one(self):
        for _ in range(80):
            train(self.length())
    def fit(self):
        for self.epoch in range(20):
            self.one()
Trainer().fit()
"""
GRAPHS_BY_EPOCH = """
def passes(epoch):
    return [1, 1, 2, 4, 8, 8][epoch]
weight = torch.ones(5 << 20, device="cuda", requires_grad=True)
descent = torch.optim.SGD([weight])
for epoch in range(6):
    every = passes(epoch)
    total = 0
    for i in range(1, 161):
        total = total + (weight * 2).square().sum()
        if i % every == 0:
            total.backward(), descent.step(), descent.zero_grad()
            total = 0
"""
AT_AN_END = """
data = DataLoader(TensorDataset(torch.zeros(1000, 8)), batch_size=4)
batches = iter(data)
def next_batch():
    global batches
    try:
        return next(batches)
    except StopIteration:
        torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        batches = iter(data)
        return next(batches)
for step in range(3000):
    next_batch()
    train(4)
"""
BY_EPOCH = """
{data}
batches, epoch = iter(data), 0
for step in range(300):
    try:
        x = next(batches)
    except StopIteration:
        epoch += 1
        batches = iter(data)
        x = next(batches)
    train(4 + 4 * epoch)
"""
OWN_BATCHES = """
class Batches:
    def __len__(self):
        return 22
    def __iter__(self):
        yield from range(22)
data = Batches()
"""
UNKNOWN_END = """
def numbers():
    with open("numbers.txt") as file:
        for line in file:
            yield int(line)
with open("numbers.txt", "w") as file:
    file.writelines("1\\n" for _ in range(1500))
for step, number in enumerate(numbers()):
    train(4 + step // 5)
"""

GROWING = [
    (COUNTED, 303, 150),
    (FROM_A_BAR, 303, 150),
    (SHRINKING, 310, 150),
    (OVER_EPOCHS, 363, 250),
    (IN_A_CLASS, 204, 250),
    (AT_AN_END, 256, 40),
    (INTERPOLATED, 100, 150),
    (OF_A_SCHEDULE, 253, 150),
    (OF_AN_EPOCH, 128, 150),
    (GRAPHS_BY_EPOCH, 240, 60),
    (BY_EPOCH.format(data="data = [torch.zeros(4) for _ in range(22)]"), 56, 120),
    (BY_EPOCH.format(data=OWN_BATCHES), 56, 120),
]
COUNTING = ["counted", "bar", "shrinking", "epochs", "class", "end"]
NAMES = [*COUNTING, "interpolated", "schedule", "epoch", "graphs", "lists", "batches"]
ACCUMULATED = """
data = DataLoader(TensorDataset(torch.zeros(174, 8)), batch_size=8)
for epoch in range(40):
    for i, (x,) in enumerate(data):
        (model(x.cuda()).sum() / 4).backward()
        if (i + 1) % 4 == 0 or i + 1 == len(data):
            optimizer.step()
            optimizer.zero_grad()
    assert model.weight.grad is None
"""
BEGUN_ANEW = """
data = DataLoader(TensorDataset(torch.zeros(26 * 8, 8)), batch_size=8)
batches, i = iter(data), 0
step = 0
while step < 78:
    try:
        (x,) = next(batches)
    except StopIteration:
        i = 0
        batches = iter(data)
        (x,) = next(batches)
    (model(x.cuda()).sum() / 4).backward()
    if (i + 1) % 4 == 0 or i + 1 == len(data):
        optimizer.step(), optimizer.zero_grad()
    if step > 0 and step % 25 == 0:
        torch.zeros(9, device="cuda")
    step += 1
    i += 1
assert i == len(data) and model.weight.grad is None, i
train(4)
"""
OF_NO_LENGTH = """
def batches(count):
    for _ in range(count):
        yield torch.zeros(4, 8)
for count in (61, 60):
    for i, x in enumerate(batches(count)):
        (model(x.cuda()).sum() / 4).backward()
        if (i + 1) % 4 == 0:
            optimizer.step(), optimizer.zero_grad()
    assert i + 1 == count and (model.weight.grad is None) == (count == 60), (i, count)
train(4)
"""
WITH_A_MADE_UP_BRANCH = """
data = DataLoader(TensorDataset(torch.zeros(26 * 8, 8)), batch_size=8)
batches, step = iter(data), 0
while step < 156:
    try:
        (x,) = next(batches)
    except StopIteration:
        assert model.weight.grad is None, step
        batches = iter(data)
        (x,) = next(batches)
    loss = model(x.cuda()).sum()
    if loss > 1e6:
        torch.cat([loss[None]] * 6)
    (loss / 2).backward()
    if (step + 1) % 2 == 0:
        optimizer.step(), optimizer.zero_grad()
    step += 1
train(4)
"""
OF_A_FUNCTION = """
class Callback:
    best, wait, stop = float("inf"), 0, False
    def at_end(self, value):
        if value < self.best:
            self.best, self.kept = value, torch.zeros(40 << 20, dtype=torch.uint8, device="cuda")
        else:
            self.wait += 1
            self.stop = self.wait >= 3
def fit(callback):
    for epoch in range(8):
        seen, total = 0, 0.0
        for start in range(0, 3010, 32):
            loss = model(torch.ones(4, 8, device="cuda")).sum()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            seen += min(32, 3010 - start)
            total += loss.item()
            print(seen)
        callback.at_end(total / seen)
        if callback.stop:
            break
fit(Callback())
assert torch.cuda.memory_allocated() < 30 << 20
train(4)
"""
KEPT_UNTIL_CLEARED = """
kept, most = [], 0
for step in range(220):
    kept.append(torch.zeros(1 << 20, dtype=torch.uint8, device="cuda"))
    train(200 if step < 44 else 4)
    if (step + 1) % 44 == 0:
        most = max(most, len(kept)) if step > 44 else 0
        kept.clear()
assert most == 44, most
"""
KEPT_EVERY_SO_OFTEN = """
kept = []
for step in range(300):
    train(4)
    if step % 10 == 0:
        kept.append(torch.zeros(2 << 20, dtype=torch.uint8, device="cuda")[:1])
assert len(kept) == 30, len(kept)
"""

KEPT_UNDER_A_NAME = """
samples = None
for step in range(3000):
    train(4)
    if step % 300 == 0:
        samples = torch.zeros(100 << 20, dtype=torch.uint8, device="cuda")
"""
SELDOM_WITH_THE_LARGEST = """
class Due:
    calls = 0
    def __init__(self, every):
        self.every = every
    def __call__(self):
        self.calls += 1
        return self.calls % self.every == 0
due = Due(16)
for step in range(3000):
    mib = 10 * 2 ** (step // 1000)
    train(mib)
    if due():
        train(5 * mib)
"""
WITHOUT_AN_END = """
from torch.utils.data import RandomSampler
class Trainer:
    most, done = None, 0
    def run(self, data):
        batches = iter(data)
        while True:
            try:
                x, = next(batches)
            except StopIteration:
                batches = iter(data)
                x, = next(batches)
            train(4)
            self.done += 1
            if self.done == 700:
                train(100)
            if self.most is not None and self.done >= self.most:
                break
data = TensorDataset(torch.zeros(1000, 8))
sampler = RandomSampler(data, replacement=True, num_samples=10**10)
Trainer().run(DataLoader(data, batch_size=4, sampler=sampler))
"""
CLOSED = """
import time
every = -1
step = 0
while step < 5000:
    train(4)
    time.sleep(1.5)
    if every > 0 and step % every == 0:
        train(100)
    step += 1
"""

EXAMPLES = """
import json, random
with open("examples.jsonl", "w") as file:
    lengths = [random.randint(20, 100) for _ in range(6000)] + [3000]
    file.writelines(json.dumps([1] * length) + "\\n" for length in lengths)
def examples():
    with open("examples.jsonl") as file:
        for line in file:
            yield json.loads(line)
texts = torch.nn.Sequential(torch.nn.Embedding(50, 4096), *[torch.nn.Identity() for _ in range(100)]).cuda()
seen = 0
for step in range(1000):
    if step % 250 == 0:
        for number, example in enumerate(examples()):
            with torch.no_grad():
                texts(torch.tensor(example).cuda()).sum().item()
            seen += 1
    train(4)
assert seen < 12_000, seen
"""


def played(code: str, folder: Path, *options: str) -> dict[str, object]:
    (folder / "train.py").write_text(MODEL + code)
    return findings(["--gpu", "A100", *options, folder / "train.py"])


@pytest.mark.parametrize(("code", "mib", "steps"), GROWING, ids=NAMES)
def test_the_largest_size_is_played(code: str, mib: int, steps: int, tmp_path: Path) -> None:
    found = played(code, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert mib << 20 <= found["peak"]["allocated_bytes"] < (mib + 20) << 20
    assert found["steps"] < steps


def test_lines_whose_sizes_go_on_growing_are_named(tmp_path: Path) -> None:
    """Nobody knows where the script's own generator ends."""
    found = played(UNKNOWN_END, tmp_path)
    reached = found["peak"]["allocated_bytes"] >= 303 << 20
    lines = [place["line"] for place in found["not_played"]]
    assert reached or any("train(4 + step // 5)" in (MODEL + UNKNOWN_END).splitlines()[line - 1] for line in lines)


@pytest.mark.slow
def test_a_long_evaluation_whose_examples_differ_goes_on_to_the_largest(tmp_path: Path) -> None:
    found = played(EXAMPLES, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["peak"]["allocated_bytes"] >= 3000 * 4096 * 4
    assert "differ, but many in a row raised no peak" in str(found["notes"])


COUNTED_ON = [ACCUMULATED, BEGUN_ANEW, OF_NO_LENGTH, WITH_A_MADE_UP_BRANCH]


@pytest.mark.parametrize("code", [*COUNTED_ON, OF_A_FUNCTION, KEPT_UNTIL_CLEARED, KEPT_EVERY_SO_OFTEN])
def test_what_a_loop_leaves_is_there(code: str, tmp_path: Path) -> None:
    found = played(code, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert "play with all of them" not in str(found["notes"])


def test_what_a_name_keeps_is_there_while_its_next_value_is_made(tmp_path: Path) -> None:
    found = played(KEPT_UNDER_A_NAME, tmp_path)
    assert found["outcome"] == "fits"
    assert 200 << 20 <= found["peak"]["allocated_bytes"] < 230 << 20
    assert found["steps"] < 50


@pytest.mark.slow
def test_a_loop_without_an_end_is_left(tmp_path: Path) -> None:
    found = played(WITHOUT_AN_END, tmp_path, "--timeout", "60")
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["peak"]["allocated_bytes"] >= 100 << 20
    assert found["steps"] < 200


@pytest.mark.slow
def test_lines_that_a_setting_keeps_out_are_not_named_at_a_time_limit(tmp_path: Path) -> None:
    found = played(CLOSED, tmp_path, "--timeout", "4")
    code = (MODEL + CLOSED).splitlines()
    assert "train(100)" not in [code[place["line"] - 1].strip() for place in found["not_played"]]


def test_what_runs_seldom_is_played_with_the_largest_size(tmp_path: Path) -> None:
    """A regularisation every 16 steps while pictures grow."""
    found = played(SELDOM_WITH_THE_LARGEST, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert 200 << 20 <= found["peak"]["allocated_bytes"] < 230 << 20
    assert found["steps"] < 60


DOUBLED_IN_A_BRANCH = """
mib = 5
for step in range(3300):
    if step and step % 800 == 0:
        mib = 2 * mib
    train(mib)
"""
STAGES = """
stages = iter([(500, 20), (1000, 40), (1500, 80)])
upcoming, mib = next(stages), 5
for step in range(3000):
    if upcoming is not None and step >= upcoming[0]:
        mib = upcoming[1]
        upcoming = next(stages, None)
    train(mib)
"""
LOOKED_UP = """
import bisect
for step in range(3000):
    train([5, 20, 80][bisect.bisect_right([700, 1400], step)])
"""
GROWN_IN_A_BRANCH = """
for step in range(1, 2001):
    train(5)
    if step % 400 == 0:
        with torch.no_grad():
            torch.zeros(16 * (step // 400) << 20, dtype=torch.uint8, device="cuda")
"""
BEFORE_A_COPY = """
copy = None
for step in range(1000):
    train(5)
    if step == 500:
        copy = torch.zeros(40 << 20, dtype=torch.uint8, device="cuda")
    if step % 100 == 99:
        torch.zeros(40 << 20, dtype=torch.uint8, device="cuda")
"""
IN_EACH_EPOCH = """
kept = []
for epoch in range(6):
    for i in range(40):
        train(5)
        if i == 24:
            torch.zeros(40 << 20, dtype=torch.uint8, device="cuda")
    if epoch == 2:
        kept.append(torch.zeros(40 << 20, dtype=torch.uint8, device="cuda"))
"""
LATER = [DOUBLED_IN_A_BRANCH, STAGES, LOOKED_UP, GROWN_IN_A_BRANCH, BEFORE_A_COPY, IN_EACH_EPOCH]


@pytest.mark.parametrize("code", LATER, ids=["doubled", "stages", "looked up", "grown", "copy", "epochs"])
def test_a_branch_that_ran_is_played_again_where_it_needs_more(code: str, tmp_path: Path) -> None:
    """Eighty MiB at some late iteration, which are more than any of the first ones."""
    found = played(code, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert 80 << 20 <= found["peak"]["allocated_bytes"] < 105 << 20
    assert found["steps"] < 100
