"""The recorder against real runs on the host: what PyTorch's profiler saw allocated, to the byte."""

import subprocess
import sys
from pathlib import Path

import pytest
from cpu_oracle import CONFIGURATIONS, Configuration, measured, predicted

RANDOM_STATE = 5056
"""Bytes of the host's random state, which checkpointing with dropout saves for each block without an operator."""
UNSEEN = {
    "tightfit fp32 checkpointed dropout": 3 * RANDOM_STATE,
    "tightfit bf16 checkpointed dropout": 3 * RANDOM_STATE,
    "gpt2 fp32 checkpointed": 2 * RANDOM_STATE,
    "gpt2 bf16 checkpointed": 2 * RANDOM_STATE,
    "llama fp32 checkpointed": 2 * RANDOM_STATE,
    "llama bf16 checkpointed": 2 * RANDOM_STATE,
}


def test_there_are_enough() -> None:
    assert len(CONFIGURATIONS) >= 40
    assert set(QUICK) < {each.name for each in CONFIGURATIONS}


QUICK = (
    "tightfit fp32 fused",
    "tightfit bf16 dropout",
    "tightfit bf16 checkpointed 1",
    "tightfit fp32 chunked accumulated",
    "gpt2 bf16 single",
    "llama bf16 foreach",
)
"""One of each model, optimizer's kind, loss, recomputing, precision. Compiled ones take a minute each, most of it C++;
tests/test_vgpu_dryrun.py holds a compiled step against what a card reported."""


def _is_slow(configuration: Configuration) -> bool:
    return configuration.name not in QUICK


@pytest.mark.parametrize(
    "configuration",
    [pytest.param(each, id=each.name, marks=[pytest.mark.slow] if _is_slow(each) else []) for each in CONFIGURATIONS],
)
def test_a_step_takes_what_was_predicted(configuration: Configuration) -> None:
    expected, seen = both(configuration)
    # Some operators of the host take a few bytes within: at most 1 KiB here, 0.006%.
    assert expected == pytest.approx(seen - UNSEEN.get(configuration.name, 0), abs=1024)


def both(configuration: Configuration) -> tuple[int, int]:
    """Return predicted and measured bytes."""
    if configuration.compiled:
        return _in_a_process_of_its_own(configuration.name)
    return predicted(configuration), measured(configuration)


def _in_a_process_of_its_own(name: str) -> tuple[int, int]:
    """Predicted and measured: the compiler remembers what other tests of a process compiled."""
    program = (
        "import sys; from cpu_oracle import CONFIGURATIONS, measured, predicted\n"
        "found = next(each for each in CONFIGURATIONS if each.name == sys.argv[1])\n"
        "print(predicted(found), measured(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr
    one, other = done.stdout.split()[-2:]
    return int(one), int(other)
