"""Iterations that are not like those before are played, wherever in a loop they come."""

import ast
from pathlib import Path
from typing import cast

import pytest
from plays import findings

from tightfit.vgpu.expressions import Reader
from tightfit.vgpu.reduced_iteration import ReducedIteration

MODEL = """
import itertools, math
from dataclasses import dataclass
import torch

model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())

def step(length):
    model(torch.ones(length, 8, device="cuda")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
"""
LATER = f"""{MODEL}
lengths, kept, tried, read = set(), [], [], []

def size_at(step):
    return min(64, 4 << (step // 1000))

def rounded(step):
    return math.ceil(2 ** (step // 4000)) * 100

for number in range(10_000):
    lengths.add(size_at(number))
    step(size_at(number))
assert lengths == {{4, 8, 16, 32, 64}}, lengths

for number in range(10_000):
    lengths.add(rounded(number))
    step(rounded(number))
assert lengths >= {{100, 200, 400}}, lengths

def maybe_keep(number):
    if (number + 1) % 1000 == 0: kept.append(torch.ones(1 << 19, device="cuda"))

for number in range(5000):
    step(4)
    maybe_keep(number)
assert len(kept) == 5, len(kept)

@dataclass
class Setting:
    rate: float
    width: int = 4

for setting in [*(Setting(rate) for rate in (0.1, 0.2, 0.3, 0.4)), Setting(0.1, 32)]:
    tried.append(setting.width)
    for _ in range(1000):
        step(setting.width)
assert tried[-1] == 32, tried

for number, length in enumerate([4] * 50 + [512] + [4] * 50):
    read.append(length)
    step(length)
assert 512 in read and len(read) < 20, read

last, high = 0, 0
for number in range(1000):
    for part in range(0, 8, 4):
        step(4)
        high = max(high, part + 4)
    if last is None: step(5)
    last = model.weight[0].detach() * last
assert high == 8
"""
COUNTED = f"""{MODEL}
seen = 0
lengths = [4] * 60 + [1 << 27] + [4] * 60 + [1 << 28]
for length in lengths:
    try:
        step(length)
    except torch.OutOfMemoryError:
        seen += 1
assert seen == 2, seen
"""
BEHIND_OPTIONS = f"""{MODEL}
class Run:
    is_main, is_verbose = True, False

    def train(self):
        self.step, kept, evaluated = 0, [], []
        while self.step < 5000:
            step(4)
            self.step += 1
            if self.is_main:
                if self.step % 1000 == 0:
                    kept.append(torch.ones(1 << 19, device="cuda"))
            if self.step % 2500 == 0:
                if self.is_main: evaluated.append(torch.ones(1 << 19, device="cuda"))
                if self.is_verbose:
                    print(model(torch.ones(1, 8, device="cuda")))
        return len(kept), len(evaluated)

assert Run().train() == (5, 2)
"""
COLLECTED = f"""{MODEL}
from tqdm import tqdm, trange
step(4)
data = [torch.randn(8) for _ in range(1003)]

@torch.no_grad()
def encode(starts):
    rows, sums = [], []
    for start in starts:
        found = model(torch.stack(data[start : start + 16]).cuda())
        rows.extend(found.cpu())
        sums.append(found.sum().item())
    assert len([rows[place] for place in range(1003)]) == len(rows)
    assert len(sums) == 63

encode(trange(0, len(data), 16))
encode(trange(0, len(data), 16, disable=True))
encode(tqdm(list(range(0, len(data), 16))))
encode([*range(0, len(data), 16)])
"""

ROLLOUTS = f"""{MODEL}
buffer, returns = [], []
for episode in range(8):
    for number in range(60):
        with torch.no_grad():
            found = model(torch.ones(1, 8, device="cuda"))
        buffer.append(found.cpu())
        if number > 2:
            returns.append(found.sum().item())
    assert len(buffer) <= 60 * (episode + 1) and len(returns) <= len(buffer), (len(buffer), len(returns))
    assert episode or len(buffer) == 60
    step(len(buffer))
"""

WITH_GRADIENTS = f"""{MODEL}
step(4)
model.eval()
for start in range(1000):
    print(model(torch.ones(4, 8, device="cuda")).sum().item())
for start in range(60):
    found = model(torch.ones(4, 8, device="cuda"))
    found.sum().backward()
"""

AHEAD = f"""{MODEL}
from torch.utils.data import DataLoader

class Ahead:
    '''Holds the next batch while one is used, as accelerate's loaders do.'''

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        batches = iter(self.loader)
        now = next(batches)
        while True:
            try:
                after = next(batches)
            except StopIteration:
                yield now
                return
            yield now
            now = after

steps = 0
for epoch in range(3):
    for number, batch in enumerate(Ahead(DataLoader(torch.randn(82, 8), batch_size=4))):
        assert len(batch) == (2 if number == 20 else 4)
        step(len(batch))
        steps += 1
        if steps % 15 == 0:
            torch.save(model.state_dict(), "model.pt")
assert number == 20
"""

OF_A_KIND = f"""{MODEL}
def train(every):
    for number in range(900):
        step(4)
        if isinstance(every, int | float) and not isinstance(every, (str, torch.Tensor)):
            if number % every == 0:
                torch.ones(1 << 20, device="cuda")
        assert number in (*range(20), 899), "all iterations run"
train(None)
"""
UNSET = f"""{MODEL}
best = 0
for epoch in range(3):
    for _ in range(9): step(4)
    with torch.no_grad():
        top = model(torch.ones(4, 8, device="cuda")).topk(2).indices[0].tolist()
    if int(7 in top) > best:
        best, best_epoch = 1, epoch
print(best_epoch)
"""


def played(code: str, folder: Path) -> dict[str, object]:
    (folder / "train.py").write_text(code)
    found: dict[str, object] = findings(["--gpu", "RTX 3060 12GB", "--memory", "2GiB", folder / "train.py"])
    return found


FREED = f"""{MODEL}
MIB = 1 << 20
held = []

def step(size):
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
    torch.empty(size * MIB, dtype=torch.uint8, device="cuda")

def assert_peak(mib):
    assert mib <= torch.cuda.max_memory_allocated() / MIB < mib + 20, torch.cuda.max_memory_allocated() / MIB

def train(epoch, loader):
    for number, batch in enumerate(loader):
        iteration = epoch * len(loader) + number
        held = [200]
        if iteration < 313:
            del held[:]
        step(sum(held) or 1)

for number in range(1000):
    held = [100]
    if number < 700:
        held.clear()
    step(sum(held) or 1)
assert_peak(100)

for epoch in range(60):
    for number in range(6):
        iteration = epoch * 6 + number
        held = [150]
        if iteration != 333:
            held = [0]
        step(sum(held) or 1)
assert_peak(150)

for epoch in range(100):
    train(epoch, torch.utils.data.DataLoader(torch.zeros(6, 8)))
assert_peak(200)
"""
"""Blocks that free memory in early iterations, but not in later ones: in a loop, in one within one, in a function."""


@pytest.mark.slow
def test_iterations_are_played_in_which_a_block_no_longer_frees_memory(tmp_path: Path) -> None:
    found = played(FREED, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert found["peak"]["allocated_bytes"] >= 200 << 20


COUNTED_TO_THE_END = f"""{MODEL}
number = 0
for epoch in range(10):
    for batch in range(300):
        step(4)
        number += 1
        if number >= 2500:
            break
        if number > 2400:
            torch.ones(1 << 20, device="cuda")
    if number >= 2500:
        torch.ones(1 << 25, device="cuda")
        break
"""
"""What comes at the end of training depends on a number that an inner loop counts."""
LONGEST = f"""{MODEL}
samples = [torch.ones(3 if number != 160 else 3000) for number in range(239)]

def padded(batch):
    return torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)

for number, batch in enumerate(torch.utils.data.DataLoader(samples, 4, collate_fn=padded)):
    step(4)
    torch.ones(len(batch), batch.shape[1] << 9, device="cuda")
    torch.ones(2 if number > 56 else 1, 1 << 10, device="cuda")
"""
"""Iterations are passed over up to another size, and the longest sample is among them."""

FROZEN = f"""{MODEL}
wide = torch.nn.Linear(8, 1 << 22, bias=False).cuda()
momentum = torch.optim.SGD(wide.parameters(), momentum=0.9)

def train(epoch):
    for number in range(6):
        iteration = epoch * 6 + number
        wide(torch.ones(1, 8, device="cuda")).sum().backward()
        if iteration < 313:
            for parameter in wide.parameters():
                parameter.grad = None
        momentum.step(), momentum.zero_grad()

for epoch in range(100):
    train(epoch)
"""
"""Weights, gradients and, from iteration 313 on, their momentum: 128 MiB each."""
LONGER = f"""{MODEL}
class Data(torch.utils.data.Dataset):
    length = 8
    def __len__(self):
        return 40
    def __getitem__(self, number):
        return torch.zeros(self.length, 8)

data = Data()
for epoch in range(30):
    if epoch == 12:
        data.length = 1 << 19
    for batch in torch.utils.data.DataLoader(data, 4):
        model(batch.cuda()).sum().backward()
        optimizer.step(), optimizer.zero_grad()
"""
"""A setting for later epochs is changed by a line that allocates nothing: 64 MiB of samples, and as much of results."""
TABLE = f"""{MODEL}
schedule = [(0, 16), (400, 256), (900, 1024)]

def length(number):
    for start, found in reversed(schedule):
        if number >= start:
            return found

for number in range(1500):
    step(4)
    torch.ones(length(number) << 16, device="cuda")
"""


@pytest.mark.parametrize(("code", "least"), [(FROZEN, 384 << 20), (LONGER, 128 << 20), (TABLE, 256 << 20)])
def test_what_turns_later_is_played(code: str, least: int, tmp_path: Path) -> None:
    found = played(code, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])
    assert found["peak"]["allocated_bytes"] >= least


def test_what_an_inner_loop_counts_is_counted_to_its_end(tmp_path: Path) -> None:
    found = played(COUNTED_TO_THE_END, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert found["peak"]["allocated_bytes"] >= 4 << 25


@pytest.mark.parametrize(("counted", "kept"), [(3, True), (None, False)])
def test_a_mean_over_a_loop_that_nobody_can_count_is_not_computed(counted: int | None, kept: bool) -> None:
    """Not followed, the loop would leave a count of 0, by which the iteration would seem to divide."""
    node = ast.parse("total = 0\nfor each in examples:\n    total += 1\nmean = 6 / total\nsteps = 2 + steps")
    names = {"total": 3, "mean": 2.0, "steps": 1}
    reader = Reader(names, {}, frozenset())
    reduced = ReducedIteration(reader, (), (), {} if counted is None else {2: counted})
    followed = ast.unparse(ast.fix_missing_locations(ast.Module(reduced.body(node.body), [])))
    assert ("mean = 6 / total" in followed, "steps = 2 + steps" in followed) == (kept, True)


def test_the_longest_sample_is_not_passed_over(tmp_path: Path) -> None:
    found = played(LONGEST, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert found["peak"]["allocated_bytes"] > 3000 * 4 * 512 * 4


def test_later_sizes_settings_and_kept_copies_are_played(tmp_path: Path) -> None:
    """Sizes by shifts and powers, copies that a loop keeps every so often, settings of a search, the largest number."""
    found = played(LATER, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")


def test_what_options_allow_every_so_often_is_played(tmp_path: Path) -> None:
    """An option around or within `if step % 1000 == 0` does not hide it; what it forbids is not looked for."""
    found = played(BEHIND_OPTIONS, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")


def test_lists_of_an_evaluation_get_all_their_entries(tmp_path: Path) -> None:
    """sentence-transformers puts the entries back into the order of its sentences."""
    found = played(COLLECTED, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert "the iterations of a loop that trains nothing repeat" in str(found["notes"])
    assert "play with all of them" not in str(found["notes"])


def test_lists_that_outlive_their_loop_grow_by_its_entries(tmp_path: Path) -> None:
    """Rollouts of a reinforcement learner keep their steps, in one list for all episodes."""
    found = played(ROLLOUTS, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert "play with all of them" not in str(found["notes"])


def test_an_evaluation_with_gradients_is_shortened(tmp_path: Path) -> None:
    """One without torch.no_grad(), of a model in eval mode; a loop with backward passes is not one."""
    found = played(WITH_GRADIENTS, tmp_path)
    lines = (tmp_path / "train.py").read_text().splitlines()
    left_out = [str(note) for note in cast(list[str], found["notes"]) if "trains nothing" in str(note)]
    assert [lines[int(note.split(":")[1]) - 1].strip()[:6] for note in left_out] == ["print("]


def test_a_batch_that_a_loader_holds_for_later_is_a_real_one(tmp_path: Path) -> None:
    found = played(AHEAD, tmp_path)
    assert (found["outcome"], found["stopped_because"]) == ("fits", "the script ended")
    assert cast(int, found["steps"]) < 50
    assert "played twice" not in str(found["notes"])


def test_a_condition_on_a_kind_of_value_is_known(tmp_path: Path) -> None:
    """`isinstance(checkpointing_steps, int)` of accelerate's examples."""
    found = played(OF_A_KIND, tmp_path)
    assert (found["outcome"], found["not_played"]) == ("fits", [])


def test_a_name_that_a_made_up_answer_leaves_unset_is_no_error_of_the_script(tmp_path: Path) -> None:
    found = played(UNSET, tmp_path)
    line = UNSET.splitlines().index("        best, best_epoch = 1, epoch") + 1
    assert (found["outcome"], [each["line"] for each in cast(list[dict[str, int]], found["not_played"])]) == (
        "fits",
        [line],
    )
    assert "because an answer was made up" in str(found["stopped_because"])
    found = played(UNSET.replace("print(best_epoch)", "print(best_epochs)"), tmp_path)
    assert found["outcome"] == "error"


def test_a_script_that_counts_its_iterations_is_played_with_all_of_them(tmp_path: Path) -> None:
    found = played(COUNTED, tmp_path)
    assert (found["outcome"], found["caught_failures"], found["steps"]) == ("fits", 2, 120)
    assert str(found["notes"]).count("the script was played twice") == 1
