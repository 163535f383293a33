"""Private pools of CUDA graphs, what a compilation tries and keeps, and memory that several streams use.

Small scripts, their figures worked by hand.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plays import played

from tightfit.vgpu.inductor_wrapper import Wrapper, run_wrapper

MIB = 2**20
HEAD = """
import torch
def held(): return torch.cuda.memory_allocated() // 2**20
def reserved(): return torch.cuda.memory_reserved() // 2**20
function = torch.compile(lambda x: x * 2, mode=MODE)
x = torch.ones(16 * 2**18, device="cuda")          # 16 MiB
found = [held()]
"""
EVALUATION = """
with torch.no_grad():
    for _ in range(3):
        before = function(x)                       # bound until the next result is there
        found.append(held())
    del before
    found.append(held())
    torch.cuda.empty_cache()
    found.append(reserved())
"""
STREAMS = """
import torch
def held(): return torch.cuda.memory_reserved() // 2**20
side = torch.cuda.Stream()
found = []
x = torch.empty(64 * 2**18, device="cuda")         # 64 MiB
if RECORD:
    x.record_stream(side)
del x
y = torch.empty(64 * 2**18, device="cuda")
found.append(held())
"""
FRAMES = """
import gc, torch
def held(): return torch.cuda.memory_allocated() // 2**20
def loss(x, weight): return (x * weight).sum()
@torch.compile
def gradient(x, weight): return torch.func.grad(loss)(x, weight)
found = []
for size in (16, 32, 48):                          # MiB; compiled for one size, then for any
    x, weight = (torch.ones(size * 2**18, device="cuda") for _ in range(2))
    gradient(x, weight)
    del x, weight
    found.append(held())
gc.collect()
found.append(held())
"""
TRIED = """
import torch
def held(): return torch.cuda.max_memory_reserved() // 2**20
double = torch.compile(lambda x: x * 2)
x = torch.ones(16 * 2**18, device="cuda")          # 16 MiB
found = [held()]
for _ in range(2):
    double(x)
    found.append(held())
"""
PADDED = """
import torch
weight = torch.nn.Parameter(torch.ones(2048, 8191, device="cuda", dtype=torch.bfloat16))
product = torch.compile(lambda x: x @ weight)
x = torch.ones(4096, 2048, device="cuda", dtype=torch.bfloat16)
product(x)
"""

CONVOLUTIONS = """
layers = [torch.nn.Conv2d(3, 64, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2), torch.nn.Conv2d(64, 64, 3)]
torch.compile(torch.nn.Sequential(*layers).cuda())(torch.ones(8, 3, 16, 16, device="cuda")).sum().backward()
"""
OTHERWISE = """
import torch
@torch.library.custom_op("mine::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()
@turned.register_fake
def _(x): return torch.empty_like(x)               # says that rows lie one after the other
torch.compile(lambda x: turned(x) + 1)(torch.ones(8, 4, device="cuda"))
"""


Found = Callable[..., list[int]]


@pytest.fixture
def found(tmp_path: Path) -> Found:
    """Plays a script on an A100 and returns its list `found`; its names are given by keyword."""

    def play(script: str, *, release: str = "2.13", **names: Any) -> list[int]:
        result = tmp_path / "found.txt"
        result.unlink(missing_ok=True)  # a dry run does not write over what was there before
        lines = [f"{name} = {value!r}" for name, value in names.items()]
        end = f"open({str(result)!r}, 'w').write(' '.join(map(str, found)))"
        (tmp_path / "script.py").write_text("\n".join([*lines, script, end]))
        environ = {**os.environ, "TIGHTFIT_DRYRUN_FILES": "patches"}  # a private view would keep the file to itself
        outcome = played(["--gpu", "A100", "--torch", release, tmp_path / "script.py"], environ=environ)
        assert outcome.outcome == "fits"
        return [int(word) for word in result.read_text().split()]

    return play


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # The script's 16 MiB, then two results at most: the next one is made while the last is still bound.
        pytest.param("default", [16, 32, 32, 32, 16, 16], marks=pytest.mark.slow),
        # The last result is taken back when the function is called again, so one is held; the copy of the input, which
        # the graph reads, is only held while it runs, but the pool keeps both of 16 MiB for itself.
        pytest.param("reduce-overhead", [16, 32, 32, 32, 16, 48], marks=pytest.mark.slow),
    ],
)
def test_a_pool_keeps_what_a_graph_used(found: Found, mode: str, expected: list[int]) -> None:
    assert found(HEAD + EVALUATION, MODE=mode) == expected


@pytest.mark.slow
def test_a_result_of_a_graph_does_not_survive_the_next_call(found: Found) -> None:
    keep = "kept = []\nwith torch.no_grad():\n    for _ in range(4): kept.append(function(x)); found.append(held())"
    assert found(HEAD + keep, MODE="default") == [16, 32, 48, 64, 80]
    assert found(HEAD + keep, MODE="reduce-overhead") == [16, 32, 32, 32, 32]


@pytest.mark.parametrize(("record", "expected"), [(False, 64), (True, 128)])
def test_memory_that_another_stream_uses_is_not_reused_at_once(found: Found, record: bool, expected: int) -> None:
    assert found(STREAMS, RECORD=record) == [expected]


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        # Dynamo's cycle keeps both arguments; the second compilation collects those of the first, the script the rest.
        ("2.5", [32, 64, 64, 0]),
        pytest.param("2.6", [0, 0, 0, 0], marks=pytest.mark.slow),
    ],
)
def test_a_compiled_gradient_keeps_its_arguments_up_to_torch_2_5(
    found: Found, release: str, expected: list[int]
) -> None:
    assert found(FRAMES, release=release) == expected


@pytest.mark.parametrize(
    ("release", "buffer"),
    [
        ("2.13", 40),  # an A100's L2 cache
        ("2.6", 256),  # Triton's own benchmark writes as much on every card
    ],
)
def test_a_kernel_is_tried_once_with_a_buffer_that_clears_the_cache(found: Found, release: str, buffer: int) -> None:
    # The buffer's block is cut for the result of the second call, which the first one's block could hold, too.
    assert found(TRIED, release=release) == [16, 32 + buffer, 32 + buffer]


def test_a_trial_of_padding_may_not_fit(tmp_path: Path) -> None:
    """Matrices of 32, 16 and 64 MiB are tried as they are and padded, before the product itself."""
    (tmp_path / "script.py").write_text(PADDED)
    outcome = played(["--gpu", "A100", "--context", "0", "--memory", "150MiB", tmp_path / "script.py"])
    assert (outcome.outcome, outcome.steps) == ("out_of_memory", 0)
    assert outcome.failure is not None
    assert (outcome.failure.phase, outcome.failure.category) == ("compile", "workspace")
    assert outcome.failure.line == PADDED.splitlines().index("product(x)") + 1
    roomy = played(["--gpu", "A100", "--context", "0", "--memory", "300MiB", tmp_path / "script.py"])
    assert roomy.outcome == "fits"


def test_a_setting_to_tune_all_products_is_left_out_and_told(tmp_path: Path) -> None:
    """Inductor would time templates of its own beside cuBLAS's products, on tensors of the card.

    What it lays out "channels last" in the forward pass of a convolution, the backward pass finds so: else it is told.
    """
    setting = "torch._inductor.config.max_autotune = True\n"
    product = PADDED.replace("import torch\n", f"import torch\n{setting}").replace("8191", "8192")
    (tmp_path / "script.py").write_text(f"{product.rstrip()}.sum().backward()\n{CONVOLUTIONS}")
    outcome = played(["--gpu", "A100", tmp_path / "script.py"])
    assert outcome.outcome == "fits"
    assert [each for each in outcome.not_modelled if "compile" in each] == [
        "torch.compile with max-autotune: memory for trying out kernels while compiling"
    ]


@pytest.mark.slow
def test_a_result_that_its_shape_function_describes_wrongly_fails_as_on_a_card(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OTHERWISE)
    outcome = played(["--gpu", "A100", tmp_path / "script.py"])
    assert outcome.outcome == "error"
    assert "expected size 8==8, stride 1==4 at dim=0" in outcome.stopped_because


def test_another_layout_than_inductor_expects_is_told_for_operators_of_torch() -> None:
    told: list[str] = []
    check = "assert_size_stride(args[0], (2, 3), (1, 2), 'torch.ops.{operator}.default')"
    for operator in ("aten.mm", "mine.turned"):
        code = f"def call(args):\n    {check.format(operator=operator)}\n    return args"
        call = run_wrapper(Wrapper(code, {}, ""), SimpleNamespace(note=told.append), None)
        call([torch.ones(3, 2).t()])
        with pytest.raises(AssertionError) if operator == "mine.turned" else contextlib.nullcontext():
            call([torch.ones(2, 3)])
    assert [each.partition("(")[2].partition(")")[0] for each in told] == ["torch.ops.aten.mm.default"]
