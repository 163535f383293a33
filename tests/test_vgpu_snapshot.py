"""Memory snapshots: PyTorch's own tools read ours, the sums are the allocator's, and reading executes nothing."""

import os
import pickle
import pickletools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.cuda import _memory_viz as viz

from tightfit.allocator.caching import AllocatorSettings, CachingAllocator, OutOfMemory
from tightfit.errors import DataError
from tightfit.oomlog.snapshot_reader import read_snapshot
from tightfit.units import GIB, MIB
from tightfit.vgpu.frames import Frame
from tightfit.vgpu.recorder import Allocation, Recorder
from tightfit.vgpu.snapshot import TraceLog, snapshot_of, write_snapshot

VIEWER_OPCODES = {
    "APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "DICT",
    "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "FRAME", "LIST", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK",
    "MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP", "TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3",
}  # fmt: skip
"""What unpickle() of torch/utils/viz/MemoryViz.js knows; it throws at any other."""


def make(total=GIB, conf="", **kwargs) -> Recorder:
    recorder = Recorder(CachingAllocator(total_bytes=total, settings=AllocatorSettings.parse(conf), **kwargs))
    TraceLog.attach(recorder)
    return recorder


def take(recorder: Recorder, nbytes: int, line: int = 1, **kwargs) -> Allocation:
    fields = {
        "operator": "aten::mm",
        "shape": (2, 3),
        "dtype": "float32",
        "phase": "forward",
        "category": "activations",
    }
    frames = (Frame(f"/home/me/train{line}.py", line, f"step{line}"), Frame("/home/me/main.py", 7, "<module>"))
    allocation = Allocation(number=0, nbytes=nbytes, frames=frames, **{**fields, **kwargs})
    recorder.take(allocation)
    return allocation


def fill(recorder: Recorder) -> None:
    """Small and large blocks, holes, a segment given back, and a request that cannot be met."""
    first = [take(recorder, size * MIB, line) for line, size in enumerate((3, 30, 7, 12), start=1)]
    take(recorder, 1000, 5)
    recorder.give(first[1])
    recorder.give(first[2])
    take(recorder, 5 * MIB, 6)
    recorder.allocator.empty_cache()
    with pytest.raises(OutOfMemory):
        take(recorder, 2 * GIB, 8)


@pytest.fixture
def filled() -> Recorder:
    recorder = make()
    fill(recorder)
    return recorder


def state_after(trace: list[dict]) -> tuple[dict[int, int], int]:
    """What a trace says is held, by address, and reserved."""
    held, reserved = {}, 0
    for entry in trace:
        match entry["action"]:
            case "alloc":
                held[entry["addr"]] = entry["size"]
            case "free_completed":
                del held[entry["addr"]]
            case "segment_alloc" | "segment_map":
                reserved += entry["size"]
            case "segment_free" | "segment_unmap":
                reserved -= entry["size"]
    return held, reserved


@pytest.mark.parametrize("conf", ["", "expandable_segments:True", "max_split_size_mb:20", "roundup_power2_divisions:4"])
def test_the_sums_are_the_allocators_and_the_trace_ends_in_the_segments(conf):
    recorder = make(conf=conf)
    fill(recorder)
    snapshot = snapshot_of(recorder)
    segments, (trace,) = snapshot["segments"], snapshot["device_traces"]
    blocks = [block for segment in segments for block in segment["blocks"]]
    allocator = recorder.allocator
    assert sum(segment["total_size"] for segment in segments) == allocator.reserved_bytes > 0
    assert sum(block["size"] for block in blocks if block["state"] == "active_allocated") == allocator.allocated_bytes
    held, reserved = state_after(trace)
    assert reserved == allocator.reserved_bytes
    assert held == {each["address"]: each["requested_size"] for each in blocks if each["state"] == "active_allocated"}
    assert sum(entry["action"] == "oom" for entry in trace) == 1


def test_entries_have_the_keys_of_pytorch(filled):
    snapshot = snapshot_of(filled)
    assert list(snapshot) == ["segments", "device_traces", "allocator_settings", "external_annotations"]
    keys = {"frames", "action", "size", "stream", "time_us", "compile_context", "user_metadata", "pool_id"}
    for entry in snapshot["device_traces"][0]:
        assert entry.keys() == keys | {"device_free" if entry["action"] == "oom" else "addr"}
        assert all(frame.keys() == {"filename", "line", "name"} for frame in entry["frames"])
    assert snapshot["allocator_settings"]["max_split_size"] == -1
    assert snapshot["allocator_settings"]["roundup_power2_divisions"]["32768"] == 0


def test_each_entry_has_the_stack_of_its_allocation(filled):
    snapshot = snapshot_of(filled)
    trace = snapshot["device_traces"][0]
    large = [entry for entry in trace if entry["size"] == 30 * MIB]
    assert [entry["action"] for entry in large] == [
        "segment_alloc", "alloc", "free_requested", "free_completed", "segment_free",
    ]  # fmt: skip
    assert {entry["frames"][0]["name"] for entry in large[:-1]} == {"step2"}
    assert large[1]["user_metadata"] == "activations, 2 x 3 float32, aten::mm, in forward"
    # Given back, and refused, while this test's own lines ran.
    assert {large[-1]["frames"][0]["name"], trace[-1]["frames"][0]["name"]} <= {"fill", "take"}
    names = Counter(
        block["frames"][0]["name"] for s in snapshot["segments"] for block in s["blocks"] if block["frames"]
    )
    assert names == {"step1": 1, "step4": 1, "step5": 1, "step6": 1}
    assert {segment["frames"][0]["name"] for segment in snapshot["segments"]} == {"step1", "step4", "step5"}


def test_a_gradient_that_takes_over_a_block_does_not_shift_the_stacks():
    recorder = make()

    def tensor(line):
        made = torch.empty(1000, 1000)
        fields = {"operator": "aten::add", "shape": (), "dtype": "", "phase": "backward", "category": "gradients"}

        def describe(nbytes):
            return Allocation(number=0, nbytes=nbytes, frames=(Frame("a.py", line, f"step{line}"),), **fields)

        return made, describe

    first, describe = tensor(1)
    recorder.track(first, describe)
    total, describe = tensor(2)
    recorder.track_accumulation(total, first, describe)
    del first
    take(recorder, 100, 3)
    snapshot = snapshot_of(recorder)
    names = [entry["frames"][0]["name"] for entry in snapshot["device_traces"][0] if entry["action"] == "alloc"]
    assert names == ["step1", "step3"]
    held = [block for s in snapshot["segments"] for block in s["blocks"] if block["frames"]]
    assert {block["frames"][0]["name"] for block in held} == {"step2", "step3"}


def test_a_block_that_another_stream_uses_is_freed_later():
    recorder = make()
    shared = take(recorder, MIB, 1)
    recorder.allocator.record_stream(shared.block, 5)
    recorder.give(shared)
    pending = [b for s in snapshot_of(recorder)["segments"] for b in s["blocks"] if b["state"] == "active_pending_free"]
    assert [block["frames"][0]["name"] for block in pending] == ["step1"]
    recorder.allocator.synchronize()
    take(recorder, MIB, 2)
    trace = snapshot_of(recorder)["device_traces"][0]
    actions = [(entry["action"], entry["frames"][0]["name"]) for entry in trace[1:]]
    assert actions == [("alloc", "step1"), ("free_requested", "step1"), ("free_completed", "step1"), ("alloc", "step2")]


def test_without_a_log_there_are_segments_and_no_trace():
    recorder = Recorder(CachingAllocator(total_bytes=GIB))
    take(recorder, MIB)
    snapshot = snapshot_of(recorder)
    assert snapshot["device_traces"] == [[]]
    assert len(snapshot["segments"]) == 1


# PyTorch's own tools


def test_pytorchs_tools_name_our_lines(filled):
    snapshot = snapshot_of(filled)
    reserved = filled.allocator.reserved_bytes / MIB
    assert f"total_reserved: {reserved:.1f}MiB" in viz.segsum(snapshot)
    text = viz.trace(snapshot)
    assert "cudaMalloc(" in text
    assert "raise OutOfMemoryError # 2.0GiB requested" in text
    for tool in (viz.segments, viz.memory):
        assert f"active_allocated;main.py:7:<module>;train6.py:6:step6 {5 * MIB}" in tool(snapshot, lambda lines: lines)
    assert "only_after" in viz.compare([], snapshot["segments"], lambda lines: lines)
    for page in (viz.trace_plot(snapshot), viz.trace_plot(snapshot, plot_segments=True), viz.segment_plot(snapshot)):
        assert "add_local_files" in page
    left = viz.filter_alloc_free_pairs(snapshot)["device_traces"][0]
    assert sum(entry["action"] == "alloc" for entry in left) == 4


def test_the_command_of_pytorch_opens_the_file(filled, tmp_path):
    write_snapshot(filled, tmp_path / "run.pickle")
    command = [sys.executable, viz.__file__, "stats", tmp_path / "run.pickle"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "total_allocated: 20.0MiB" in answer.stdout


def test_the_viewer_in_the_browser_knows_each_opcode(filled, tmp_path):
    path = tmp_path / "run.pickle"
    write_snapshot(filled, path)
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(path.read_bytes())]
    assert {name for name, _ in opcodes} <= VIEWER_OPCODES
    assert opcodes[0] == ("PROTO", 4), "it accepts 2 to 4"


# Out and in


def test_written_and_read_again_it_is_the_same(filled, tmp_path):
    path = tmp_path / "run.pickle"
    path.write_text("an older file")
    write_snapshot(filled, path)
    assert read_snapshot(path) == snapshot_of(filled)
    assert [each.name for each in tmp_path.iterdir()] == ["run.pickle"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol, filled, tmp_path):
    path = tmp_path / "run.pickle"
    path.write_bytes(pickle.dumps(snapshot_of(filled), protocol=protocol))
    assert read_snapshot(path) == snapshot_of(filled)


def test_a_stack_is_in_the_file_once(tmp_path):
    recorder = make()
    for _ in range(500):
        recorder.give(take(recorder, MIB))
    write_snapshot(recorder, tmp_path / "run.pickle")
    data = (tmp_path / "run.pickle").read_bytes()
    assert data.count(b"train1.py") == 1
    assert len(data) < 500 * 3 * 60


def test_a_log_is_light():
    recorder = make()
    for _ in range(1000):
        recorder.give(take(recorder, MIB))
    log = TraceLog.of(recorder)
    assert log.entry_count == 1 + 3 * 1000
    assert sys.getsizeof(log._rows) < 64 * log.entry_count


class Payload:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(("call", "met"), [(os.system, "system"), (exec, "exec"), (eval, "eval")])
def test_a_payload_is_refused_and_not_run(call, met, protocol, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "bad.pickle"
    command = f"touch {trap}" if call is os.system else f"__import__('os').mkdir({str(trap)!r})"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [Payload(call, command)]}, protocol=protocol))
    with pytest.raises(DataError, match=rf"bad\.pickle was not read: it asks for \w+\.{met}, and a memory snapshot"):
        read_snapshot(path)
    assert not trap.exists()
    pickle.loads(path.read_bytes())
    assert trap.exists(), "the trap works"


@pytest.mark.parametrize(
    ("data", "met"),
    [
        (b"", "EOFError: Ran out of input"),
        (b"epoch 3, loss 2.31\n", "UnpicklingError"),
        (b"\x80\x04h\x00.", "UnpicklingError"),
        (b"\x80\x04]K\x01K\x02s.", "TypeError|IndexError"),
        (b"\x80\x04)R.", "IndexError|UnpicklingError"),
        (b"\x80\x04X\x02\x00\x00\x00ls)R.", "TypeError: 'str' object is not callable"),
        (b"\x80\x04}}b.", "AttributeError|UnpicklingError|TypeError"),
        (b"P7\n.", "UnpicklingError: .*persistent"),
        (b"\x80\x02\x82\x07.", "ValueError: unregistered extension code 7"),
        (b"\x80\x05\x97.", "UnpicklingError"),
        (b"PK\x03\x04\x00\x00", "UnpicklingError"),
    ],
)
def test_what_is_no_pickle_is_one_sentence(data, met, tmp_path):
    path = tmp_path / "log.pickle"
    path.write_bytes(data)
    with pytest.raises(
        DataError, match=rf"log\.pickle (is not a whole snapshot pickle \(({met})|holds a dict without)"
    ):
        read_snapshot(path)


def colliding_keys() -> bytes:
    """Keys with one hash: a dictionary of them takes hours."""
    keys = (pickle.dumps(number * (2**61 - 1), 2)[2:-1] for number in range(100_000))
    return b"\x80\x02}(" + b"".join(key + b"N" for key in keys) + b"u."


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: b"\x80\x02K\x00r\xff\xff\xff\x7f.", id="a place for 2**31 objects"),
        pytest.param(colliding_keys, id="one hash", marks=pytest.mark.slow),
    ],
)
def test_what_takes_more_than_a_snapshot_is_not_read(content: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "run.pickle").write_bytes(content())
    started = time.monotonic()
    with pytest.raises(DataError, match=r"run\.pickle was not read: its .* take more time or memory than"):
        read_snapshot(tmp_path / "run.pickle")
    assert time.monotonic() - started < 60


def test_a_cut_file_is_refused_wherever_it_is_cut(filled, tmp_path):
    path = tmp_path / "run.pickle"
    write_snapshot(filled, path)
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"run\.pickle is not a whole snapshot pickle"):
            read_snapshot(path)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"segments": 3}, None])
def test_another_pickle_is_no_snapshot(content, tmp_path):
    (tmp_path / "other.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=rf"holds a {type(content).__name__} without a list of segments"):
        read_snapshot(tmp_path / "other.pickle")


def test_files_that_cannot_be(filled, tmp_path):
    with pytest.raises(DataError, match=r"cannot read the snapshot .*No such file"):
        read_snapshot(tmp_path / "absent.pickle")
    with pytest.raises(DataError, match=r"cannot write the snapshot .*No such file"):
        write_snapshot(filled, tmp_path / "absent" / "run.pickle")
