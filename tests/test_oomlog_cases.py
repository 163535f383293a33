"""Logs of many programs: how each ended, what is said of it in both languages, and what is never said."""

import functools
import tomllib
from pathlib import Path

import msgspec
import pytest

from tightfit.diagnosis.explaining import explain
from tightfit.diagnosis.explanation import ExplanationJson
from tightfit.diagnosis.render import render
from tightfit.report.html import explanation_report
from tightfit.wording.diagnosis import words

FIGURES = ("requested_bytes", "free_bytes", "total_bytes", "process_bytes", "device_index")


class Case(msgspec.Struct, kw_only=True):
    name: str
    log: str
    status: str
    kind: str | None = None
    phase: str | None = None
    figures: dict[str, int | str] = {}
    first_cause: str | None = None
    first_fix: str | None = None
    never_causes: list[str] = []
    says: list[str] = []
    says_ja: list[str] = []
    says_in_both: list[str] = []
    never: list[str] = []
    never_ja: list[str] = []
    never_in_both: list[str] = []


CASES = msgspec.convert(
    tomllib.loads((Path(__file__).parent / "explain_cases" / "kinds.toml").read_text(encoding="utf-8"))["case"],
    list[Case],
)
DENIALS = {
    "en": ["Nothing failed", "no failure", "not about memory"],
    "ja": ["失敗はありません", "見つかりません。実行が"],
}


@functools.cache
def explained(log: str, language: str) -> tuple[str, ExplanationJson]:
    found = explain(log, lang=language)
    return " ".join(render(found, words(language)).split()), found.to_json()


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_said(case: Case, language: str):
    text, _ = explained(case.log, language)
    squeezed = text.replace(" ", "")
    japanese = language == "ja"
    for words_there in [*(case.says_ja if japanese else case.says), *case.says_in_both]:
        assert words_there.replace(" ", "") in squeezed, text
    denials = [] if case.status == "harmless" else DENIALS[language]
    for words_never in [*(case.never_ja if japanese else case.never), *case.never_in_both, *denials]:
        assert words_never.replace(" ", "").lower() not in squeezed.lower(), text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_status_kind_and_figures(case: Case):
    _, found = explained(case.log, "en")
    assert found.status == case.status
    assert case.kind is None or found.kind == case.kind
    assert case.phase is None or found.phase == case.phase
    for name, value in case.figures.items():
        assert name in FIGURES
        assert getattr(found, name) == (None if value == "none" else value), name
    codes = [cause.code for cause in found.causes]
    assert case.first_cause is None or codes[0] == case.first_cause, codes
    assert not set(codes) & set(case.never_causes)
    assert case.first_fix is None or found.remedies[0].code == case.first_fix


ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b2J\u202e"


@pytest.mark.parametrize(
    "log",
    [
        f"RuntimeError: CUDA OOM: {ESCAPES}<b>lower</b> the batch",
        f"KeyError: '{ESCAPES}<b>x</b>'",
        f"WARNING {ESCAPES}<b>CUDA</b> OutOfMemoryError in TaskAlignedAssigner, using CPU",
        f"mylib.ArenaError: could not allocate {ESCAPES}<b>workspace</b>",
    ],
)
def test_a_logs_own_words_bring_no_control_codes_and_no_tags(log: str):
    found = explain(log)
    text = render(found, words("en"), verbose=True)
    assert not any((ord(each) < 32 and each != "\n") or each in "\x7f\x9b\u202e" for each in text)
    assert "<b>" not in explanation_report(found)


ONE_LINERS = {
    "host_killed": [
        "[rank: 2] Child process with PID 811 terminated with code -9. Forcefully terminating all other processes",
        "INFO: [rank: 1] Child process with PID 812 terminated with code -9.",
        "make: *** [Makefile:7: fit] Error 137",
        "zsh: killed     python fit.py",
        "fit.service: Main process exited, code=killed, status=9/KILL",
        "Error: llama runner process has terminated: signal: killed",
        "771.batch  OUT_OF_ME+  0:125",
        "npm ERR! errno 137",
        "Reason: Container from a bad node. Exit status: 137.",
        "mpirun noticed that process rank 1 with PID 90 on node b exited on signal 9 (Killed).",
        "=   KILLED BY SIGNAL: 9 (Killed)",
        "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        "g++: internal compiler error: Killed (program cc1plus)",
        'earlyoom: sending SIGTERM to process 61 uid 7 "python3": badness 820',
    ],
    "job_memory_limit": [
        "The replica chief-0 ran out-of-memory and exited with a non-zero status of 137.",
        "Job has gone over cgroup memory limit of 2048 megabytes. Last measured usage: 2047 megabytes.",
        "Runner terminated: container exceeded memory limit of 512 MiB",
        "0/4 nodes are available: 1 node had untolerated taint, 3 Insufficient memory.",
    ],
    "host_memory_error": [
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "MemoryError: could not allocate 4294967296 bytes",
        "zarr: MemoryError",
        "Error: MemoryError()",
        "Error: vector memory limit of 8.0 Gb reached, see mem.maxVSize()",
        "cc1plus: out of memory allocating 65536 bytes after a total of 99 bytes",
        "OSError: [Errno 12] Memory mapping file failed: Cannot allocate memory",
        "SafetensorError: IoError(Os { code: 12, kind: OutOfMemory })",
        "ggml_aligned_malloc: insufficient memory (attempted to allocate 912.00 MB)",
        "sqlite3.OperationalError: out of memory",
        "Error while decoding stream #0:1: Cannot allocate memory",
        "tcmalloc: large alloc 8589934592 bytes == (nil) @ 0x7f",
        "RuntimeError: Native API returns: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
        "RuntimeError: Memory isn't enough and alloc failed, kernel name: Add, alloc size: 512B.",
    ],
    "program_words": ["RuntimeError: Unsloth: No or negligible GPU memory available for fused cross entropy."],
    "device_library": [
        "RuntimeError: Device(id:3) memory isn't enough and alloc failed, kernel name: Mul-op7, alloc size: 4096B.",
        "vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "[GPU] clFinish, error code: -5 CL_OUT_OF_RESOURCES",
        "RuntimeError: MIOpen Error: miopenStatusAllocFailed",
    ],
    "cuda_driver": [
        "hipErrorOutOfMemory: out of memory",
        "TVMError: Check failed: (e == cudaSuccess) is false: CUDA: out of memory",
        'CUDA error at scan.cu:12 code=2(cudaErrorMemoryAllocation) "cudaMalloc(&p, n)"',
    ],
    "cuda_async": ["!!! Exception during processing!!! Allocation on device"],
    "memory_words": [
        "ValueError: The weights cannot fit into GPU memory",
        "ERROR: This model needs at least 10GB GPU memory",
    ],
    "onnx_out_of_memory": ["Failed to find a free memory block despite calling Extend. rounded_bytes=4194304"],
    "jax_out_of_memory": ["XlaRuntimeError: INTERNAL: Failed to allocate 67108864 bytes for new constant"],
    "paddle_out_of_memory": ["ExternalError: CUDA error(2), out of memory."],
    "npu_out_of_memory": ["RuntimeError: NPU function error: aclrtMallocPhysical, error code is 207001"],
    "xpu_block_limit": [
        "[GPU] Exceeded max size of memory object allocation: requested 8589934592 bytes, "
        "but max alloc size supported by device is 4294959104 bytes."
    ],
    "cuda_library": ["RuntimeError: CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`"],
    "java_heap": ["org.apache.spark.memory.SparkOutOfMemoryError: Unable to acquire 4096 bytes of memory, got 0"],
    "": [
        "RuntimeError: out of bounds memory access",
        "ValueError: not enough values to unpack from memory",
        "INFO no GPU memory leak found",
        "The container memory limit is 16 GiB",
        "Total GPU memory available: 23.6 GB",
        "tcmalloc: large alloc 1073741824 bytes == 0x55d0a4000 @",
        "Child process with PID 11 terminated with code 1.",
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    ],
}


@pytest.mark.parametrize(("kind", "line"), [(kind, line) for kind, lines in ONE_LINERS.items() for line in lines])
def test_one_line_alone(kind, line):
    found = explain(f"{line}\n")
    assert (found.facts.kind if found.facts else "") == kind
    assert (found.to_json().status == "out_of_memory") is bool(kind)
