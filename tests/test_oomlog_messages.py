# ruff: noqa: E501 - messages stand here as they are printed, on one line
"""Every format of message, in every surrounding: kind and figures exact."""

import random
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import oom_messages
import pytest
from oom_messages import FORMS, SURROUNDINGS, write

from tightfit.oomlog.facts import Facts, Figure
from tightfit.oomlog.log_reader import read_log
from tightfit.oomlog.message import filled
from tightfit.oomlog.messages import messages_in

CODES = tomllib.loads(files("tightfit.oomlog").joinpath("codes.toml").read_text())


def failure(text: str) -> Facts:
    found = read_log(text).failure
    assert found is not None, text
    return found


def check(text: str, written: oom_messages.Written) -> None:
    found = failure(text)
    assert found.kind == written.kind, text
    for name, value in written.truth.items():
        if name == "other_processes":
            assert [(each.pid, each.bytes) for each in found.other_processes] == value, text
        elif name == "device_index" and value is None:
            continue
        else:
            assert getattr(found, name) == value, (name, text)
    stated = {name for name, figure in found.figures.items() if figure.stated and name != "cache_bytes"}
    assert stated == {name for name in written.truth if name.endswith("_bytes")}, text
    assert found.kind in CODES["kinds"]
    assert set(found.notes) <= set(CODES["notes"])


@pytest.mark.parametrize("surround", SURROUNDINGS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_every_format_in_every_surrounding(form, surround):
    rng = random.Random(f"{form} {surround.__name__}")
    for _ in range(3):
        written = write(form, rng)
        check(surround(written.text, rng), written)


def test_the_rank_is_the_one_of_the_line():
    rng = random.Random(1)
    written = write("T6", rng)
    assert failure(oom_messages.ranks(written.text, rng)).rank == 1
    assert failure(oom_messages.wrapped_rank(written.text, rng)).rank == 3
    assert failure(written.text).rank is None


@pytest.mark.parametrize("form", oom_messages.ALLOCATOR_FORMS)
def test_a_cut_message_states_what_is_left(form):
    rng = random.Random(form)
    written = write(form, rng)
    start = written.text.find("ried to allocate") + 30 if form not in ("async", "mps") else 90
    for end in range(start, len(written.text), 7):
        found = failure(written.text[:end])
        assert found.kind == written.kind
        for name, figure in found.figures.items():
            if figure.stated and name != "cache_bytes":
                assert figure.bytes == written.truth[name], (end, name)


def test_pytorch_2_3_0_ends_the_message_at_the_index_of_gpu_0():
    found = failure("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 392.00 MiB. GPU \n$ ")
    assert (found.torch_format, found.requested_bytes, found.device_index) == ("T5b", 392 * 2**20, None)
    assert "device_unstated" in found.notes


def test_figures_have_the_interval_that_rounding_leaves():
    figure = Figure.printed("6.14 GiB")
    assert figure is not None
    assert (figure.bytes, figure.low, figure.high) == (6592774799, 6587406091, 6598143508)
    for unit in ("KiB", "MiB", "GiB"):
        for number in ("1.00", "0.50", "1023.99", "224.90"):
            figure = Figure.printed(f"{number} {unit}")
            assert figure is not None
            for count in (figure.low, figure.high):
                assert abs(count / oom_messages.UNITS[unit] - float(number)) <= 0.005000001
            assert figure.bytes == oom_messages.exact(f"{number} {unit}")
    exact = Figure.printed("512 bytes")
    assert exact is not None
    assert exact.low == exact.high == 512
    assert Figure.printed("12 parsecs") is None


ODD = {
    "process_memory_unknown": "GPU 0 has a total capacity of 8.00 GiB of which 0 bytes is free. Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use. Of the allocated memory 7.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
    "process_memory_unstated": "GPU 0 has a total capacity of 8.00 GiB of which 0 bytes is free. Process 12 has 7.00 GiB memory in use. Of the allocated memory 7.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
    "spills_to_host": "GPU 0 has a total capacity of 8.00 GiB of which 0 bytes is free. Including non-PyTorch memory, this process has 17.00 GiB memory in use. Of the allocated memory 16.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
    "more_free_than_requested": "GPU 0 has a total capacity of 8.00 GiB of which 5.00 GiB is free. Including non-PyTorch memory, this process has 1.00 GiB memory in use. Of the allocated memory 0.50 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
    "free_exceeds_total": "GPU 0 has a total capacity of 8.00 GiB of which 9.00 GiB is free. Of the allocated memory 0 bytes is allocated by PyTorch, and 0 bytes is reserved by PyTorch but unallocated.",
    "other_process_memory_unknown": "GPU 0 has a total capacity of 8.00 GiB of which 0 bytes is free. Process 9 has 17179869184.00 GiB memory in use. Of the allocated memory 7.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
    "rounding_clamped": "GPU 0 has a total capacity of 8.00 GiB of which 1.01 GiB is free. Including non-PyTorch memory, this process has 7.00 GiB memory in use. Of the allocated memory 6.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved by PyTorch but unallocated.",
}  # fmt: skip


@pytest.mark.parametrize("note", ODD)
def test_odd_values_are_noted(note):
    found = failure(f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB. {ODD[note]}")
    assert note in found.notes
    assert all(figure.bytes >= 0 and figure.low <= figure.bytes <= figure.high for figure in found.figures.values())
    if note.startswith("process_memory"):
        assert found.others_bytes is None
        assert found.outside_pytorch_bytes is None


def test_whether_the_cache_would_have_been_enough():
    text = "CUDA out of memory. Tried to allocate {} (GPU 0; 8.00 GiB total capacity; 4.00 GiB already allocated; 1.00 GiB free; 6.00 GiB reserved in total by PyTorch)"
    assert failure(text.format("2.50 GiB")).cache_would_do is True
    assert failure(text.format("3.50 GiB")).cache_would_do is False
    assert failure(text.format("3.00 GiB")).cache_would_do is None
    assert failure(text.format("3.00 GiB")).cache_bytes == 2 * 2**30
    assert failure(text.format("3.00 GiB")).short_by_bytes == 2 * 2**30
    assert failure(text.format("3.00 GiB")).unallocated_bytes is None
    assert failure(text.format("2.00 MiB")).notes[-1] == "request_says_little"


CASES = sorted((Path(__file__).parent / "explain_cases").glob("*.toml"))


def examples() -> dict[str, tuple[str, str]]:
    """Return the fullest message of each format that captures anything, with the words that each message has."""
    texts = [case["log"] for file in CASES for case in tomllib.loads(file.read_text())["case"] if "log" in case]
    texts += [write(form, random.Random(form)).text for form in FORMS]
    squeezed = [("".join(text.split()), "".join(text.split()).lower()) for text in texts]
    found = {}
    for each in tomllib.loads(files("tightfit.oomlog").joinpath("formats.toml").read_text())["format"]:
        pattern, anchor = re.compile(filled(each["pattern"]), re.IGNORECASE), each["anchor"].lower()
        matches = [match for text, low in squeezed if anchor in low for match in pattern.finditer(text)]
        if matches and pattern.groups:
            longest = max(matches, key=lambda match: (len([one for one in match.groups() if one]), len(match[0])))
            found[each["pattern"]] = (anchor, longest[0])
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("pattern", EXAMPLES)
def test_words_of_a_format_before_or_behind_a_message_do_not_change_its_figures(pattern):
    anchor, message = EXAMPLES[pattern]

    def read(text):
        return [(each.kind, each.figures, each.details, each.pid) for each in messages_in(text)]

    alone = max(read(f"{'~' * 800}{message}~"), key=lambda each: len(each[1]) + len(each[2]))
    for distance in range(max(500 - len(message), 320), 501, max(len(message) // 20, 1)):
        assert alone in read(f"{anchor}{'~' * distance}{message}~"), distance
        assert alone in read(f"{message}{'~' * distance}{anchor}"), distance


@pytest.mark.parametrize(
    ("text", "requested"),
    [
        ("buffer of size 2830172160\n12 models are loaded", None),
        ("buffer of size 2830172160 12 models are loaded", 2830172160),
        ("buffer of size 2830172160\n\n12 models are loaded", 2830172160),
        ("buffer of size 2830172160\n2024-01-02 12:00:00 INFO 12 models", 2830172160),
        ("buffer of size 283017\n2160" + "\n" + "~" * 93, 2830172160),
        ("buffer of size 283017\n2160", None),
    ],
)  # fmt: skip
def test_digits_behind_a_number_are_joined_to_it_only_where_a_terminal_broke_the_line(text, requested):
    found = failure(f"onnxruntime: [ONNXRuntimeError] Failed to allocate memory for requested {text}")
    assert found.requested_bytes == requested


@pytest.mark.parametrize(
    ("cut", "figures"),
    [
        ("2.88 GiB already allocated; 170.14 MiB fre", {"allocated_bytes": "2.88 GiB", "free_bytes": "170.14 MiB"}),
        ("2.88 GiB already allo", {"allocated_bytes": "2.88 GiB"}),
        ("2.88 GiB already allocated; 170.14 MiB", {"allocated_bytes": "2.88 GiB", "free_bytes": "170.14 MiB"}),
        ("2.88 GiB already allocated; 0 bytes free; 2.97 GiB re", {"allocated_bytes": "2.88 GiB", "reserved_bytes": "2.97 GiB"}),
        ("2.88 GiB already allocated; 0 bytes free; 1.25 GiB cac", {"allocated_bytes": "2.88 GiB", "unallocated_bytes": "1.25 GiB"}),
        ("2.88 GiB already allocated; 170", {"allocated_bytes": "2.88 GiB"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("behind", ["", "`", "\n```\nMy card has 4 GB.\n", "..."])
def test_a_figure_before_a_name_that_was_cut_is_the_one_of_its_place(cut, figures, behind):
    found = failure(f"CUDA out of memory. Tried to allocate 195.25 MiB (GPU 0; 4.00 GiB total capacity; {cut}{behind}")
    for name, size in figures.items():
        assert getattr(found, name) == oom_messages.exact(size), name
    assert found.free_bytes is None or "free_bytes" in figures or "0 bytes free" in cut


def test_the_mark_that_ends_a_quotation_is_no_code():
    found = failure(
        '`  File "run.py", line 276, in main\n    model = model.cuda()`\nRuntimeError: CUDA error: out of memory'
    )
    assert found.frames[-1].source == "model = model.cuda()"


SHORT = {
    "ray.memory_monitor.RayOutOfMemoryError: More than 95% of the memory on node n1 is used (15.1 / 15.6 GB).": "ray_killed",
    "ray.exceptions.PlasmaStoreFull: The object store is full": "ray_object_store",
    "cv2.error: OpenCV(4.1.2) /io/alloc.cpp:55: error: (-215:Assertion failed) u != 0 in function 'create'": "host_memory_error",
    "pyarrow.lib.ArrowMemoryError: realloc of size 4294967296 failed": "host_memory_error",
    "polars.exceptions.ComputeError: out of memory": "host_memory_error",
    "RuntimeError: unable to open shared memory object </torch_12_34> in read-write mode: Cannot allocate memory (12)": "shared_memory",
    "slurmstepd: error: *** JOB 123 ON n1 CANCELLED AT 2024-01-01T00:00:00 DUE TO MEMORY LIMIT ***": "host_killed",
    "[1]    12345 killed     python train.py": "host_killed",
    "run.sh: line 7: 41234 Killed                  python train.py": "host_killed",
    "c++: fatal error: Killed signal terminated program cc1plus": "host_killed",
    "Worker (pid:33) was sent SIGKILL! Perhaps out of memory?": "host_killed",
    "billiard.exceptions.WorkerLostError: Worker exited prematurely: signal 9 (SIGKILL) Job: 3.": "host_killed",
    "Shard process was signaled to shutdown with signal 9": "host_killed",
    "mmap failed: Cannot allocate memory": "host_memory_error",
    "Process finished with exit code -1073741819 (0xC0000005)": "crashed",
    "Bus error (core dumped)": "crashed",
    "Aborted (core dumped)": "aborted",
    "Canceled future for execute_request message before replies were done": "notebook_died",
    "UnknownError: Failed to get convolution algorithm. This is probably because cuDNN failed to initialize": "cudnn",
    "[TRT] [E] 10: Could not find any implementation for node {ForeignNode[a...b]} due to insufficient workspace.": "tensorrt_out_of_memory",
    "RuntimeError: Triton Error [CUDA]: out of memory": "cuda_driver",
    "dgl._ffi.base.DGLError: [10:00:00] /opt/dgl/src/a.cc:88: Check failed: e == cudaSuccess: CUDA: out of memory": "cuda_driver",
    "RuntimeError: CUDA driver error: 2": "cuda_driver",
    "Error: an error was encountered while running the model: CUDA error: out of memory": "cuda_driver",
    "-[MTLDebugDevice newBufferWithLength:options:]:666: failed assertion `Cannot create buffer of size 5000000000'": "metal_limit",
    "ggml_metal_graph_compute: command buffer 0 failed with status 5\nerror: Insufficient Memory": "metal_out_of_memory",
    "ggml_vulkan: Device memory allocation of size 2147483648 failed.": "device_library",
    "numba.cuda.cudadrv.driver.CudaAPIError: [2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY": "device_library",
    "Error out of memory at line 380 in file /home/u/bitsandbytes/csrc/pythonInterface.c": "device_library",
    "RuntimeError: Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)": "xpu_out_of_memory",
    "RuntimeError: GET was unable to find an engine to execute this computation": "cudnn_no_plan",
    "RuntimeError: Caught OutOfMemoryError in replica 1 on device 1.": "device_out_of_memory",
}


@pytest.mark.parametrize("line", SHORT)
def test_message_of_one_line(line: str):
    assert failure(line).kind == SHORT[line]
