"""Logs that end within a message, at every position of it."""

import pytest

from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import Explanation
from tightfit.diagnosis.render import render
from tightfit.oomlog.log_reader import LogReading, read_log
from tightfit.wording.diagnosis import words

STACK = (
    "Traceback (most recent call last):",
    '  File "/home/u/train.py", line 31, in <module>',
    "    loss = model(x)",
    '  File "/home/u/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1532, in _call_impl',
    "    return forward_call(*args, **kwargs)",
)
MESSAGES = {
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB "
    "of which 2.68 GiB is free. Including non-PyTorch memory, this process has 7.04 GiB memory in use.": "torch.Ou",
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB (GPU 0; 11.69 GiB total capacity; "
    "6.78 GiB already allocated; 2.68 GiB free; 7.00 GiB reserved in total by PyTorch)": "torch.cuda.Ou",
    "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity": "torch.Ou",
    "torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out of memory)": "torch.Ou",
    "RuntimeError: CUDA out of memory. Tried to allocate 6.14 GiB (GPU 0; 11.69 GiB total": "RuntimeError: CUDA ou",
    "RuntimeError: CUDA error: out of memory": "RuntimeError: CUDA error: out o",
    "torch.AcceleratorError: CUDA error: out of memory": "torch.AcceleratorError: CUDA error: out o",
    "RuntimeError: MPS backend out of memory (MPS allocated: 5.05 GB, other allocations: 2.29 GB, max allowed: 6.80 GB)"
    ". Tried to allocate 1024.00 MB on private pool.": "RuntimeError: MPS backend ou",
    "jaxlib.xla_extension.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345678 bytes": (
        "jaxlib.xla_extension.XlaRuntimeError: RESO"
    ),
    "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 11.50GiB.": (
        "jax.errors.JaxRuntimeError: RESO"
    ),
    "tensorflow.python.framework.errors_impl.ResourceExhaustedError: OOM when allocating tensor with "
    "shape[64,128,56,56] and type float on /job:localhost/replica:0/task:0/device:GPU:0 by allocator GPU_0_bfc": (
        "tensorflow.python.framework.errors_impl.ResourceE"
    ),
    "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 8.00 GiB for an array with shape (1000, 1000) and "
    "data type float64": "numpy.core._exceptions._Arr",
    "RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 25769803776 bytes.": "RuntimeError: [enforce fail at alloc_c",
    "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.": "ray.exceptions.Ou",
    "cupy.cuda.memory.OutOfMemoryError: Out of memory allocating 6,144,000,000 bytes": "cupy.cuda.memory.Ou",
    "ValueError: No available memory for the cache blocks.": "ValueError: No available mem",
}
"""Messages, and the shortest beginning of each that no other message has."""


def _printed(found: Explanation) -> str:
    return " ".join(render(found, words(found.language)).split())


def _cut(message: str, length: int, prefix: str = "", end: str = "") -> LogReading:
    lines = [*STACK, message[:length]] if length else list(STACK)
    return read_log("\n".join(prefix + line for line in lines) + end)


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("prefix", ["", "[rank3]: "])
@pytest.mark.parametrize("end", ["", "...", "\n"])
def test_cut_anywhere_is_a_lack_of_memory_or_incomplete(message: str, prefix: str, end: str) -> None:
    sure = len(MESSAGES[message])
    whole = _cut(message, len(message), prefix)
    assert whole.failure is not None
    every = 6 if prefix or end else 1
    for length in sorted({*range(0, len(message) + 1, every), sure - 1, sure}):
        found = _cut(message, length, prefix, end)
        if length < sure and end and ":" not in message[:length]:
            continue  # a whole line may be the name of any error
        assert found.failure is not None, message[:length]
        if length < sure:
            assert found.status == "incomplete", message[:length]
        else:
            assert found.status == "out_of_memory", message[:length]
            same = {whole.failure.kind, "memory_words", "cuda_out_of_memory", "host_memory_error"}
            assert found.failure.kind in same, message[:length]


@pytest.mark.parametrize("message", MESSAGES)
def test_cut_anywhere_is_explained_without_a_figure_or_a_word_that_is_not_there(message: str) -> None:
    for length in range(0, len(message) + 1, 3):
        text = "\n".join((*STACK, message[:length]))
        found = explain(text)
        printed = _printed(found)
        assert "does not name memory" not in printed
        assert "is not the problem" not in printed
        if found.facts is not None:
            assert found.facts.message in text, message[:length]


def test_a_cut_message_is_told_as_cut() -> None:
    text = "\n".join((*STACK, "torch.OutOfMemoryError: CU"))
    printed = _printed(explain(text, lang="en"))
    assert "Device memory ran out." in printed
    assert "The log ends within this message." in printed
    whole = _printed(explain(text + "DA out of memory. Tried to allocate 6.14 GiB.", lang="en"))
    assert "The log ends within" not in whole


def test_a_beginning_that_several_messages_share_is_left_open() -> None:
    printed = _printed(explain("\n".join((*STACK, "RuntimeError: CUDA ")), lang="en"))
    assert "Messages of memory that ran out begin like this" in printed
    other = _cut("RuntimeError: The size of tensor a (3) must match the size of tensor b (4)", 60)
    assert other.kind_of_nothing == "other_error"


def test_a_cut_line_further_up_is_still_a_lack_of_memory() -> None:
    lines = [*STACK, "torch.OutOfMemoryError: CU", "launcher: stopping the other workers", "done"]
    found = read_log("\n".join(lines))
    assert found.status == "out_of_memory"
