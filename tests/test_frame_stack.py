"""Frames of deep calls: `tightfit.system.frame_stack`."""

import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tightfit.system.frame_stack import with_frame_stack


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def leaf() -> None:
    """Do nothing, in a frame that is larger than its caller's."""


leaf.__code__ = leaf.__code__.replace(co_stacksize=100)


def call_at_each_depth(depth: int) -> None:
    """Call a function often at each depth: where a piece of 16 KiB ends, its frame needs the next one."""
    if depth:
        for _ in range(500):
            leaf()
        call_at_each_depth(depth - 1)


def faults_of(function: Callable[[int], None]) -> int:
    """Count page faults of the second call, in a thread: its frames are its own."""

    def count() -> int:
        function(200)  # what is touched once is no fault the second time
        before = page_faults()
        function(200)
        return page_faults() - before

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(count).result()


def test_calls_that_cross_the_end_of_a_piece_of_frames_map_no_memory() -> None:
    plain = faults_of(call_at_each_depth)
    assert plain >= 400, f"{plain} page faults: this Python keeps frames in another way, and nothing needs mending"
    assert faults_of(with_frame_stack(call_at_each_depth)) <= plain // 10


def test_arguments_answers_and_errors_pass_through() -> None:
    @with_frame_stack
    def divide(a: int, *, by: int) -> float:
        """Divide."""
        return a / by

    assert divide(1, by=2) == 0.5
    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")
    with pytest.raises(ZeroDivisionError):
        divide(1, by=0)
