"""Loops whose steps repeat are shortened: what comes after them plays, and what may be missing is listed."""

import os
from pathlib import Path

import pytest
from plays import findings

EPOCHS = """
import torch
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(16 * 60000 + 5, 8))
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.Adam(model.parameters())
sizes = []

def train():
    for (batch,) in DataLoader(data, 16):
        model(batch.cuda()).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        sizes.append(len(batch))

for epoch in range(50):
    train()
    torch.ones(1 << 26, device="cuda")
torch.ones(1 << 27, device="cuda")
assert sizes.count(5) == 2 and len(sizes) < 20, sizes
"""
PACKAGE = """
import torch

def fit(model, optimizer, batches):
    for number in range(batches):
        model(torch.ones(4, 8, device="cuda")).sum().backward()
        optimizer.step()
        if number == 900_000:
            evaluate(model)
    return model

def evaluate(model):
    return torch.ones(1 << 28, device="cuda")
"""
USER = """
import torch
import trainer

model = torch.nn.Linear(8, 8).cuda()
trainer.fit(model, torch.optim.SGD(model.parameters()), 1_000_000)
torch.ones(1 << 27, device="cuda")
"""


ENDLESS_DRAWS = """
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

data = TensorDataset(torch.randn(100, 8))
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.Adam(model.parameters())
sizes, drawn = [], []

class Counted(RandomSampler):
    def __iter__(self):
        for number in super().__iter__():
            drawn.append(number)
            assert len(drawn) < most_drawn
            yield number

def train(most):
    for (batch,) in DataLoader(data, 16, sampler=Counted(data, replacement=True, num_samples=16 * 10**9 + 5)):
        model(batch.cuda()).sum().backward()
        optimizer.step(), optimizer.zero_grad()
        sizes.append(len(batch))
        if len(sizes) >= most:
            break
"""
TO_A_NUMBER = f"most_drawn = 10_000\n{ENDLESS_DRAWS}\ntrain(2000)"
TO_THE_LAST = (
    f"most_drawn = 10 ** 12\n{ENDLESS_DRAWS}\ntrain(10 ** 12)\n"
    "torch.ones(1 << 27, device='cuda')\nassert sizes[-1] == 5 and len(sizes) < 20, sizes"
)


KEPT_SAMPLER = """
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

class Forever(Sampler):
    def __iter__(self):
        while True:
            yield from range(16 * 400)

    def __len__(self):
        return 16 * 400

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
batches = iter(DataLoader(TensorDataset(torch.randn(16 * 400, 8)), 16, sampler=Forever()))
numbers = []
for step in range(100_000):
    (batch,) = next(batches)
    model(batch.cuda()).sum().backward()
    optimizer.step()
    numbers.append(step)
for _ in range(500):
    next(batches)
torch.ones(1 << 27, device="cuda")
assert len(numbers) < 30
"""
ENDLESS = """
import torch
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
step = 0
while True:
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1)
    optimizer.step()
    step += 1
    if step == 1_000_000:
        break
torch.ones(1 << 27, device="cuda")
assert step == 1_000_000
"""
LAST_IN_TRY = """
import torch
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
def train():
    step = 0
    try:
        while True:
            with torch.enable_grad():
                model(torch.ones(4, 8, device="cuda")).sum().backward()
            optimizer.step()
            step += 1
            if step >= 20_000:
                break
    finally:
        torch.ones(1 << 27, device="cuda")
for _ in range(1_000_000):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step()

@torch.no_grad()
def after_the_loop():
    return train()

after_the_loop()
assert torch.ones(3, device="cuda").numel() == 3
"""
SAMPLING = """
import torch

def sample(model, times):
    steps = 0
    for time in range(times):
        with torch.no_grad():
            model(torch.ones(4, 8, device="cuda"))
        steps += 1
    return steps
"""
SAMPLER = """
import torch
import sampler
assert sampler.sample(torch.nn.Linear(8, 8).cuda(), 100_000) < 20
"""


@pytest.mark.parametrize("code", [ENDLESS, KEPT_SAMPLER, LAST_IN_TRY], ids=["loop", "sampler", "try"])
def test_endless_ones_are_left(code: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(code)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert found["peak"]["allocated_bytes"] >= 4 << 27
    assert found["steps"] < 30


def test_a_packages_loop_of_forward_passes_is_shortened(tmp_path: Path) -> None:
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "sampler.py").write_text(SAMPLING)
    (tmp_path / "train.py").write_text(SAMPLER)
    found = findings(["--gpu", "A100", tmp_path / "train.py"], environ={**os.environ, "PYTHONPATH": str(package)})
    assert found["outcome"] == "fits", found["stopped_because"]


def test_an_epoch_goes_on_to_its_last_batch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(EPOCHS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["stopped_because"] == "the script ended"
    assert not found["not_played"]
    assert found["peak"]["allocated_bytes"] >= 4 << 27


@pytest.mark.slow  # repeating steps play on for 20 seconds of the processor
def test_a_packages_loop_is_left_and_listed(tmp_path: Path) -> None:
    """Lines of a package that never ran may be an evaluation every so many steps, or nothing at all."""
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "trainer.py").write_text(PACKAGE)
    (tmp_path / "train.py").write_text(USER)
    found = findings(["--gpu", "A100", tmp_path / "train.py"], environ={**os.environ, "PYTHONPATH": str(package)})
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert [(Path(each["file"]).name, each["line"]) for each in found["not_played"]] == [("trainer.py", 5)]
    assert found["peak"]["allocated_bytes"] >= 4 << 27
    assert any("every so many steps" in each for each in found["notes"])


RARE = """
import argparse
import torch
from torch.utils.data import DataLoader, TensorDataset

args = argparse.Namespace(evaluate_every=5000)
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
played = []

def step(batch):
    model(batch.cuda()).sum().backward()
    optimizer.step()

def peaks_at(gib):
    torch.ones(gib << 28, device="cuda")
    played.append(gib)

class Run:
    def __init__(self):
        self.step = 0

    def epochs(self):
        loader = DataLoader(TensorDataset(torch.randn(16 * 500 + 5, 8)), 16)
        sizes = []
        for epoch in range(100):
            for number, (batch,) in enumerate(loader):
                step(batch)
                self.step += 1
                sizes.append(len(batch))
                if self.step % 400 == 0:
                    peaks_at(1)
            if (epoch + 1) % 50 == 0:
                peaks_at(2)
        return sizes

for number in range(100_000):
    step(torch.ones(4, 8))
    if (number + 1) % args.evaluate_every == 0 and number > 0:
        peaks_at(3)
total = 0
while True:
    step(torch.ones(4, 8))
    total += 1
    if total % 3000 == 0:
        peaks_at(4)
    if total > 10_000:
        break
sizes = Run().epochs()
assert len(sizes) < 45 and 5 in sizes, sizes
assert sorted(played) == [1, 2, 3, 4], played
peaks_at(5)
"""
CALLBACKS = """
import torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
played = []

class Callback:
    def on_batch(self, *_):
        pass

    def on_epoch(self, epoch, total):
        pass

class Unfreeze(Callback):
    def on_epoch(self, epoch, total):
        if epoch == 30:
            played.append(epoch)
            torch.ones(1 << 27, device="cuda")

class Trainer:
    callbacks = [Callback(), Unfreeze()]

    def call(self, hook, *args):
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

trainer = Trainer()
rate = 0.1
total = 0
for epoch in range(100):
    for group in optimizer.param_groups:
        group["lr"] = rate
    for batch in DataLoader(torch.randn(80, 8), 16):
        model(batch.cuda()).sum().backward()
        optimizer.step()
        trainer.call("on_batch", batch)
        if total > 0 and total % 400 == 0:
            played.append(total)
            torch.ones(1 << 27, device="cuda")
        total += 1
    trainer.call("on_epoch", epoch, total)
assert played == [30, 400], played
torch.ones(1 << 20, device="cuda")
"""
GUARDED = """
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
average = None

def update(step):
    global average
    if step < 5000:
        return
    if average is None:
        average = torch.ones(1 << 27, device="cuda")
    for parameter in model.parameters():
        parameter.data.lerp_(average[0], 0.1)

for step in range(10_000):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step()
    update(step)
assert average is not None
torch.ones(1 << 20, device="cuda")
"""
SWEEP = """
import torch

model = torch.nn.Linear(256, 256).cuda()
optimizer = torch.optim.SGD(model.parameters())
for batch_size in 1 << 16, 1 << 17, 1 << 18:
    for _ in range(10_000):
        model(torch.ones(batch_size, 256, device="cuda")).sum().backward()
        optimizer.step()
for batch_size in range(1 << 18, 4 << 18, 1 << 18):
    for _ in range(10_000):
        model(torch.ones(batch_size, 256, device="cuda")).sum().backward()
        optimizer.step()
"""


def assert_all_of_it_plays(tmp_path: Path, code: str, *, steps: int) -> None:
    """Assert that a script comes to its own end, with nothing left out and fewer than so many steps."""
    (tmp_path / "train.py").write_text(code)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert not found["not_played"]
    assert found["steps"] < steps


def test_rare_iterations_are_played(tmp_path: Path) -> None:
    """What a loop does every so many steps comes after a few of them, also once in many epochs."""
    assert_all_of_it_plays(tmp_path, RARE, steps=80)


def test_callbacks_and_counters_of_inner_loops_are_followed(tmp_path: Path) -> None:
    """Epochs are passed over, although what is rare is a callback's, or counts their batches."""
    assert_all_of_it_plays(tmp_path, CALLBACKS, steps=60)


def test_an_iteration_that_has_to_run_runs_to_its_end(tmp_path: Path) -> None:
    """Its step is like those before; what differs in it comes later."""
    assert_all_of_it_plays(tmp_path, GUARDED, steps=40)


def test_each_size_of_a_sweep_is_played(tmp_path: Path) -> None:
    """Iterations of an outer loop are left out only if those before were alike."""
    (tmp_path / "train.py").write_text(SWEEP)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits"
    assert found["peak"]["allocated_bytes"] >= 2 * (3 << 18) * 256 * 4


DIFFERING = """
import os
import torch

model = torch.nn.Linear(512, 512).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(100_000):
    model(torch.ones(1 + int.from_bytes(os.urandom(2)) % 4000, 512, device="cuda")).sum().backward()
    optimizer.step()
torch.ones(1 << 27, device="cuda")
"""


@pytest.mark.slow  # steps that differ play on for 20 seconds of the processor
def test_a_loop_whose_steps_differ_is_left_and_listed(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(DIFFERING)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert found["peak"]["allocated_bytes"] >= 4 << 27
    assert [each["line"] for each in found["not_played"]] == [7], "a longer sample may come"
    assert any("a longer sample" in each for each in found["notes"])


ON_ONE_LINE = """
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())

def evaluate(step):
    torch.ones(1 << 27, device="cuda")

for step in range(100_000):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step()
    if (step + 1) % 5000 == 0: evaluate(step)
"""


def test_the_body_of_an_if_on_its_line_is_played(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(ON_ONE_LINE + "torch.Tensor([torch.ones(3, device='cuda').sum()])\n")
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert not found["not_played"]
    assert found["peak"]["allocated_bytes"] >= 4 << 27


OWN_EPOCHS = """
import argparse, torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

args = argparse.Namespace(top_k=-1)
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())

def sample():
    top_k = args.top_k if args.top_k != -1 else None
    for _ in range(3):
        torch.zeros(64, 64, device="cuda")
        if top_k is not None:
            torch.zeros(4 << 27, device="cuda")

class Batches:
    def __init__(self, data):
        self.loader = DataLoader(data, 4, sampler=RandomSampler(data, replacement=True, num_samples=10**10))
        self.left = iter(self.loader)

    def next(self):
        try:
            return next(self.left)
        except StopIteration:
            self.left = iter(self.loader)
            return next(self.left)

batches, step = Batches(TensorDataset(torch.zeros(100, 64))), 0
while True:
    (batch,) = batches.next()
    model(batch.cuda()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step > 0 and step % 500 == 0: torch.zeros(1 << 27, device="cuda")
    if step > 0 and step % 200 == 0:
        sample()
    step += 1
    if step >= 2000: break
"""


def test_a_loop_that_draws_its_batches_itself_ends(tmp_path: Path) -> None:
    """Its sampler has more numbers than can be drawn, and a function in it a line that is never run."""
    (tmp_path / "train.py").write_text(OWN_EPOCHS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["steps"] < 100
    assert 4 << 27 <= found["peak"]["allocated_bytes"] < 5 << 27


LOGS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
for epoch in range(3):
    for number in range(1000):
        is_last = number + 1 == 1000
        is_logged = number % 10 == 0 or is_last
        model(torch.zeros(4 if number < 700 else 1 << 18, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if is_logged:
            model.weight.norm().item()
"""


def test_values_that_came_before_stop_no_passing(tmp_path: Path) -> None:
    """Every tenth iteration is another one, and 700 iterations on comes one that needs more."""
    (tmp_path / "train.py").write_text(LOGS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["steps"] < 150
    assert found["peak"]["allocated_bytes"] > 64 * 4 << 18


BOTH_LOOPS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
finished = []

def report(number):
    if number % 2500 == 2499:
        torch.zeros(4, device="cuda")

def finish(epoch):
    if epoch == 6:
        finished.append(torch.zeros(1 << 28, device="cuda"))

def train():
    for number in range(50_000):
        model(torch.zeros(4, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        is_last_but_one = number == 49_998
        report(number)

for epoch in range(8):
    train()
    finish(epoch)
assert finished
"""


@pytest.mark.slow
def test_a_loop_within_one_whose_iterations_are_passed_over_is_passed_over_too(tmp_path: Path) -> None:
    """The inner loop waits for a value of its last steps while the outer one waits for its next iteration."""
    assert_all_of_it_plays(tmp_path, BOTH_LOOPS, steps=60)


NEVER = """
import time, torch
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
every = 500
for epoch in range(4):
    for number, (batch,) in enumerate(DataLoader(TensorDataset(torch.randn(1440, 8)), batch_size=4)):
        model(batch.cuda()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (number + 1) % every == 0:
            torch.zeros(1 << 20, device="cuda")
torch.zeros(1 << 28, device="cuda")
"""


def test_lines_that_no_epoch_is_long_enough_for_keep_no_epoch_playing(tmp_path: Path) -> None:
    """360 batches do not come to the 500th; who finds that in one epoch passes over the others, too."""
    assert_all_of_it_plays(tmp_path, NEVER, steps=60)


BY_CHANCE = """
import random, torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(3000):
    model(torch.zeros(4, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 30:
        torch.zeros(1 << 20, device="cuda")
    if random.random() > 2:
        torch.zeros(1 << 23, device="cuda")
    if step == 40:
        break
"""


def test_a_line_that_chance_decides_on_is_listed_where_iterations_were_passed_over(tmp_path: Path) -> None:
    """The script ends by itself, but some of its iterations did not run."""
    (tmp_path / "train.py").write_text(BY_CHANCE)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["stopped_because"] == "the script ended"
    assert found["steps"] < 41
    assert [each["line"] for each in found["not_played"]] == [12]


OTHER_SIZES = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(1, 20_000):
    model(torch.zeros(4 + step // 7 % 97, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 15_000 == 0:
        torch.zeros(1 << 28, device="cuda")
torch.zeros(1 << 20, device="cuda")
"""


@pytest.mark.slow
def test_a_rare_line_is_found_behind_sizes_that_change_often(tmp_path: Path) -> None:
    """A size changes every seventh step, a line comes in one step of all."""
    (tmp_path / "train.py").write_text(OTHER_SIZES)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits"
    assert found["steps"] < 300
    assert found["peak"]["allocated_bytes"] > 1 << 30


CALLS_IN_PARTS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
steps = []

def rare(step):
    steps.append(step)
    return torch.zeros(1 << 26, device="cuda")

for step in range(1, 1000):
    model(torch.zeros(4, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    step % 100 == 3 or step == 187 and rare(step)
    kept = rare(step) if step == 320 else None
    if step % 400 == 0:
        torch.zeros(4, 64, device="cuda")
assert steps in ([187, 320], [320]), steps
"""


def test_nothing_of_the_script_is_called_while_iterations_are_passed_over(tmp_path: Path) -> None:
    """A call in a part of a condition, which Python evaluates only in some iterations."""
    (tmp_path / "train.py").write_text(CALLS_IN_PARTS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits"
    assert found["steps"] < 100
    assert found["peak"]["allocated_bytes"] < 2 << 28


BEHIND_BLOCKS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
for step in range(1, 2000):
    model(torch.zeros(4, 64, device="cuda")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 500 == 0:
        for _ in range(2):
            pass
        else:
            torch.zeros(1 << 28, device="cuda")
    if step % 300 == 0:
        try:
            pass
        finally:
            torch.zeros(1 << 27, device="cuda")
"""


def test_what_comes_behind_a_loop_or_a_try_is_played(tmp_path: Path) -> None:
    """Lines of `else` and `finally` have no condition of their own: they run with the branch that they are in."""
    (tmp_path / "train.py").write_text(BEHIND_BLOCKS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["peak"]["allocated_bytes"] > 1 << 30


BLOCKS_OF_THE_LOOP = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
def check(step):
    try:
        pass
    finally:
        if step % 700 == 0:
            torch.zeros(1 << 29, device="cuda")
for step in range(1, 2000):
    try:
        model(torch.zeros(4, 64, device="cuda")).sum().backward()
    except ValueError:
        pass
    else:
        optimizer.step()
        optimizer.zero_grad()
        if step % 500 == 0:
            torch.zeros(1 << 28, device="cuda")
    for _ in range(2):
        pass
    else:
        if step % 300 == 0:
            torch.zeros(1 << 27, device="cuda")
    check(step)
"""


def test_the_blocks_behind_a_loop_or_a_try_of_the_loop_itself_are_followed(tmp_path: Path) -> None:
    """Their conditions are met at steps 300, 500 and, in a function, 700."""
    (tmp_path / "train.py").write_text(BLOCKS_OF_THE_LOOP)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["steps"] < 100
    assert found["peak"]["allocated_bytes"] > 2 << 30


FORMS = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters())
played = {}

def play(kind):
    played[kind] = torch.zeros(1 << 24, device="cuda")

class Hook:
    def __init__(self):
        self.calls = 0
    def __call__(self, step):
        self.calls += 1
        if 1000 < self.calls < 1003:
            play("callable")

def within(step):
    for part in range(3):
        if part == 1 and (left := 2000 - step) == 3:
            play("inner loop of a function")

hook = Hook()

class Trainer:
    step = 0
    def one(self):
        model(torch.zeros(4, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        hook(self.step)
        within(self.step)
        700 < self.step < 703 and play("and")
        self.step % 900 or play("or")
        if (self.step & 1023) == 1023 and divmod(self.step, 31)[1] == 0:
            play("arithmetic")
        match self.step:
            case 1200 | 1201:
                play("value")
            case 1300 if model.training:
                play("guard")
            case _ if self.step == 1400:
                play("any")
    def run(self):
        while self.step < 2000:
            self.one()

Trainer().run()
"""


def test_conditions_in_other_forms_are_followed(tmp_path: Path) -> None:
    """`and`, `or`, `match`, `:=`, `&`, callable objects, and loops in functions that the loop calls."""
    (tmp_path / "train.py").write_text(FORMS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["steps"] < 120
    assert found["peak"]["allocated_bytes"] > 8 << 26


LENGTHS = """
import sys, torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

passes, longest = map(int, sys.argv[1:])
data = [torch.randint(0, 100, (3000 if number == longest else 100,)) for number in range(240)]
model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 1024), torch.nn.Linear(1024, 8)).cuda()
optimizer = torch.optim.SGD(model.parameters())
for number, batch in enumerate(DataLoader(data, 4, collate_fn=lambda each: pad_sequence(each, batch_first=True)), 1):
    model(batch.cuda()).sum().backward()
    if number % passes == 0:
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.parametrize(("passes", "longest"), [(1, 160), (8, 176), (15, 40)])
def test_the_longest_sample_is_played(passes: int, longest: int, tmp_path: Path) -> None:
    """Its batch decides the peak, and comes long after the steps or the passes of one have begun to repeat."""
    (tmp_path / "lengths.py").write_text(LENGTHS)
    words = [tmp_path / "lengths.py", passes, longest]
    found = findings(["--gpu", "A100", *words])
    whole = findings(["--gpu", "A100", "--steps", 1000, *words])
    assert found["steps"] <= whole["steps"] == 60 // passes
    assert found["peak"] == whole["peak"]
    assert found["peak"]["allocated_bytes"] > 3000 * 4 * 1024 * 4


TRAINER = """
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers.trainer_callback import ARGUMENTS, Control, DefaultFlowCallback, State

def train(model, data, epochs):
    optimizer, flow = torch.optim.SGD(model.parameters()), DefaultFlowCallback()
    state, control = State(epochs * len(data) // 4), Control()
    for epoch in range(epochs):
        for batch in DataLoader(data, 4, collate_fn=lambda each: pad_sequence(each, batch_first=True)):
            model(batch.cuda()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step += 1
            control = flow.on_step_end(ARGUMENTS, state, control)
            if control.should_training_stop:
                break
        if control.should_training_stop:
            break
"""
CALLBACK = """
from types import SimpleNamespace

ARGUMENTS = SimpleNamespace(eval_strategy="no", save_strategy="no")

class State(SimpleNamespace):
    def __init__(self, steps):
        super().__init__(global_step=0, max_steps=steps, eval_steps=0, save_steps=0)

class Control:
    should_training_stop = False

class DefaultFlowCallback:
    def on_step_end(self, args, state, control):
        control.should_training_stop = state.global_step >= state.max_steps
        return control
"""
OF_LENGTHS = """
import torch
from transformers.trainer import train

data = [torch.randint(0, 100, (3000 if number == 333 else 100 + number % 7,)) for number in range(480)]
model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 1024), torch.nn.Linear(1024, 8)).cuda()
train(model, data, 20)
"""


def test_samples_that_nobody_could_draw_are_not_drawn_before_the_end(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TO_A_NUMBER)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["not_played"]) == ("fits", [])


@pytest.mark.slow  # the time for drawing
def test_the_last_batch_of_more_samples_than_can_be_drawn_is_played(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TO_THE_LAST)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["peak"]["allocated_bytes"] > 4 << 27


def test_a_trainer_with_samples_of_many_lengths_plays_the_longest(tmp_path: Path) -> None:
    """Its steps never repeat: it is left once the peak is calm, and nothing of it counts as not played."""
    package = tmp_path / "site-packages/transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "trainer.py").write_text(TRAINER)
    (package / "trainer_callback.py").write_text(CALLBACK)
    (tmp_path / "train.py").write_text(OF_LENGTHS)
    environ = {**os.environ, "PYTHONPATH": str(package.parent)}
    found = findings(["--gpu", "A100", tmp_path / "train.py"], environ=environ)
    assert found["outcome"] == "fits", found["stopped_because"]
    assert found["steps"] < 60
    assert not found["not_played"]
    assert any("longest sample was played" in each for each in found["notes"]), found["notes"]
    assert found["peak"]["allocated_bytes"] > 3000 * 4 * 1024 * 4


TWO_OPTIMIZERS = """
import torch

class Whitened(torch.optim.SGD):
    def step(self):
        for group in self.param_groups:
            for each in group["params"]:
                each.grad = whiten(each.grad)
        super().step()

whiten = torch.nn.Softmax(0)
layers = [torch.nn.Linear(64, 64, bias=False).cuda() for _ in range(6)]
model = torch.nn.Sequential(*layers)
optimizers = [torch.optim.AdamW(layers[0].parameters()), Whitened([each.weight for each in layers[1:]])]
schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1.0) for each in optimizers]
for step in range(100_000):
    if step % 500 == 0:
        model(torch.ones(4096, 64, device="cuda")).sum()
    model(torch.ones(4, 64, device="cuda")).sum().backward()
    for optimizer, scheduler in zip(optimizers, schedulers):
        optimizer.step()
        scheduler.step()
    model.zero_grad()
torch.ones(1 << 27, device="cuda")
"""


def test_modules_that_an_optimizer_calls_are_no_passes(tmp_path: Path) -> None:
    """As Muon's compiled products: else the loop over optimizers is a training loop, left again and again."""
    (tmp_path / "train.py").write_text(TWO_OPTIMIZERS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert found["outcome"] == "fits", found["stopped_because"]
    assert not found["not_played"]
    assert found["steps"] < 60
    assert found["peak"]["allocated_bytes"] >= 4 << 27


HIDDEN = """
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())
played, lengths, SIZES = set(), set(), {0: 4, 1: 5, 2: 7}

def size_at(step):
    return SIZES[min(step // 4000, 2)]

def train(batch):
    lengths.add(len(batch))
    model(batch.cuda()).sum().backward()
    optimizer.step(), optimizer.zero_grad()

def maybe_evaluate(step, every):
    if step % every or step == 0:
        return
    played.add("function")
    torch.ones(1 << 20, device="cuda")

class Trainer:
    def __init__(self, every):
        self.hooks, self.steps = (every, self.evaluate), 0

    def evaluate(self):
        played.add("method")
        torch.ones(1 << 21, device="cuda")

    def one(self):
        train(torch.ones(4, 8))
        self.steps += 1
        self.after()

    def after(self):
        every, call = self.hooks
        self.steps % every == 0 and call()

    def run(self):
        while self.steps < 10_000:
            self.one()

class Phased:
    def begin(self):
        model.requires_grad_(self.epoch >= 0)
        torch.ones(8 if self.epoch >= 300 else 4, device="cuda")
        if self.epoch >= 300:
            lengths.add("later")

    def run(self):
        for self.epoch in range(400):
            self.begin()
            for step in range(2000):
                train(torch.ones(4, 8))

def batches():
    for length in (4,) * 200 + (11, 4):
        yield torch.ones(length, 8)

for step in range(10_000):
    train(torch.ones(4 if step < 9000 else 6, 8))
    maybe_evaluate(step, every=5000)
for step in range(10_000):
    train(torch.ones(size_at(step), 8))
Trainer(3000).run()
Phased().run()
for batch in batches():
    train(batch)
assert played == {"function", "method"} and lengths == {4, 5, 6, 7, 11, "later"}, (played, lengths)
"""


def test_what_later_iterations_do_in_functions_is_played(tmp_path: Path) -> None:
    """A guard in a function that the loop calls, a size that its counters decide, and a generator's longest batch."""
    assert_all_of_it_plays(tmp_path, HIDDEN, steps=150)


RESULT_OF_LATE_EPOCHS = """
import torch

def run():
    model = torch.nn.Linear(8, 8).cuda()
    optimizer = torch.optim.SGD(model.parameters())
    result = None
    for epoch in range(12):
        for step in range(40):
            model(torch.ones(4, 8, device="cuda")).sum().backward()
            optimizer.step()
        if epoch >= 9:
            result = model(torch.ones(1 << 20, 8, device="cuda")).mean().item()
    return result

results = []
for number in range(200):
    results.append(torch.tensor(run()))
"""


def test_a_name_that_late_iterations_set_is_set(tmp_path: Path) -> None:
    """As in CIFAR speed runs, which repeat whole trainings and keep what their last epochs measure."""
    (tmp_path / "train.py").write_text(RESULT_OF_LATE_EPOCHS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["stopped_because"], found["not_played"]) == ("fits", "the script ended", [])
    assert found["steps"] < 200


TENSOR_OF_SOME_EPOCHS = """
import torch

model = torch.nn.Linear(8, 4).cuda()
optimizer = torch.optim.Adam(model.parameters())
data = [torch.ones(4, 8) for _ in range(12)]
for epoch in range(5):
    for batch in torch.utils.data.DataLoader(data, batch_size=2):
        model(batch.cuda()).sum().backward()
        optimizer.step()
    if (epoch + 1) % 2 == 0:
        shown = None
        for item in data:
            shown = item.cuda()
"""


def test_a_name_may_hold_a_tensor_in_some_iterations(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TENSOR_OF_SOME_EPOCHS)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["steps"] < 30) == ("fits", True)


LINE_BEHIND_AN_EVALUATION = """
import numpy as np, torch
from torch.utils.data import DataLoader

model = torch.nn.Linear(8, 4).cuda()
optimizer = torch.optim.SGD(model.parameters())
loader = DataLoader([torch.ones(8) for _ in range(64)], batch_size=4)
tests = DataLoader([torch.ones(8) for _ in range(50)], batch_size=4, num_workers=1)
for epoch in range(15):
    model.train()
    for batch in loader:
        model(batch.cuda()).sum().backward()
        optimizer.step()
    model.eval()
    losses = []
    for batch in tests:
        losses.append(model(batch.cuda()).detach().cpu().numpy())
    losses = np.concatenate(losses)
"""


def test_a_line_that_a_jump_leads_to_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LINE_BEHIND_AN_EVALUATION)
    found = findings(["--gpu", "A100", tmp_path / "train.py"])
    assert (found["outcome"], found["steps"] < 40) == ("fits", True)
