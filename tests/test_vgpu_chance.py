"""Numbers that a script draws by chance: the smallest and the largest are played. The truth is arithmetic, in MiB."""

from pathlib import Path

import pytest
from plays import findings

MODEL = """
import random
import numpy as np
import torch

random.seed(0), np.random.seed(0), torch.manual_seed(0)
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters())

def train(mib):
    held = torch.zeros(int(mib * 2**20), dtype=torch.uint8, device="cuda")
    model(torch.ones(4, 8, device="cuda")).sum().backward()
    optimizer.step(), optimizer.zero_grad()
"""
LOOP = """
for step in range(3000):
"""
EACH_STEP = f"""{LOOP}
    train(random.randint(4, 248))
"""
OF_A_TENSOR = f"""{LOOP}
    train(torch.randint(4, 249, (1,)).item())
"""
OF_A_GENERATOR = f"""
rng = np.random.default_rng(0){LOOP}
    train(rng.integers(4, 248, endpoint=True))
"""
OF_PAIRS = f"""
sizes = [(1, 4), (31, 8), (20, 4)]{LOOP}
    height, width = random.choice(sizes)
    train(height * width)
"""
SELDOM = f"""{LOOP}
    if step % 100 == 0:
        size = random.choice([4, 32, 64, 128, 200, 248])
    train(size)
"""
IN_A_BRANCH = f"""{LOOP}
    size = 4
    if random.random() > 0.9995:
        size = 248
    train(size)
"""
IN_A_FUNCTION = f"""
def size(rare=0.0005):
    return 248 if np.random.rand() < rare else 4
{LOOP}
    train(size())
"""
IN_A_MODULE = f"""
class Grows(torch.nn.Module):
    def forward(self, x):
        if self.training and torch.rand(1) < 0.0005:
            held = torch.zeros(248 << 20, dtype=torch.uint8, device="cuda")
        return x
model = torch.nn.Sequential(model, Grows()){LOOP}
    train(0)
"""
FEW_STEPS = 60


@pytest.mark.parametrize(
    "code",
    [EACH_STEP, OF_A_TENSOR, OF_A_GENERATOR, OF_PAIRS, SELDOM, IN_A_BRANCH, IN_A_FUNCTION, IN_A_MODULE],
    ids=["each step", "tensor", "generator", "pairs", "seldom", "branch", "function", "module"],
)
def test_the_largest_number_is_played(code: str, tmp_path: Path) -> None:
    found = played(code, tmp_path)
    assert 248 <= found["peak"]["requested_bytes"] / 2**20 < 265  # 16 of them for cuBLAS
    assert found["steps"] <= FEW_STEPS
    assert not found["not_played"]
    assert any("by chance" in each for each in found["notes"])


def played(code: str, folder: Path) -> dict[str, object]:
    (folder / "train.py").write_text(MODEL + code)
    return findings(["--gpu", "A100", folder / "train.py"])


RANDOM_TEXTS = f"""
lengths = [4] * 100 + [200]{LOOP}
    train(lengths[random.randrange(len(lengths))])
"""
RANDOM_TEXTS_OF_NUMPY = """
lengths = [50, *(random.randint(4, 40) for _ in range(26)), 200, 4, 4, 50]
rng = np.random.default_rng(0)
for step in range(300):
    train(lengths[rng.integers(len(lengths))])
"""
UNTIL_FOUND = """
free = set(range(4, 249))
for step in range(300):
    size = random.randint(4, 248)
    while size not in free:
        size = random.randint(4, 248)
    free = (free - {size}) or set(range(4, 249))
    train(size)
"""


@pytest.mark.parametrize("code", [RANDOM_TEXTS, RANDOM_TEXTS_OF_NUMPY], ids=["random", "numpy"])
def test_an_item_that_chance_chooses_is_no_size(code: str, tmp_path: Path) -> None:
    """The largest index is not that of the largest text: all are drawn as before."""
    assert played(code, tmp_path)["peak"]["requested_bytes"] / 2**20 >= 200


def test_a_number_that_is_drawn_until_it_fits_ends(tmp_path: Path) -> None:
    assert played(UNTIL_FOUND, tmp_path)["peak"]["requested_bytes"] / 2**20 >= 248


AS_THEY_WERE = """
import pickle
for function in (random.random, random.randint, np.random.rand, np.random.randint, random.Random(3).random):
    assert callable(pickle.loads(pickle.dumps(function))), function
rng = np.random.default_rng(1)
assert isinstance(pickle.loads(pickle.dumps(rng)), np.random.Generator), rng
assert repr(rng).startswith("Generator(PCG64)") and np.random.default_rng(rng) is rng, rng
for usual, mine in ((random.random, random._inst), (np.random.random, np.random.mtrand._rand)):
    assert usual.__self__ is mine, usual
train(4)
"""


def test_generators_are_what_they_were(tmp_path: Path) -> None:
    assert played(AS_THEY_WERE, tmp_path)["outcome"] == "fits"
