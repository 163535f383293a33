# ruff: noqa: E501 - messages stand here as they are printed, on one line
"""A log with everything around a failure: which one matters, where it was, what the run printed, and no failure at all."""

import io
import pickle
import random
import subprocess
import sys
import tracemalloc

import oom_messages
import pytest
from oom_messages import FORMS, SURROUNDINGS, write

from tightfit.oomlog.log_reader import LogReading, read_log
from tightfit.oomlog.snapshot_facts import facts_of_snapshot, read_snapshot_failure
from tightfit.oomlog.tracebacks import TraceFrame, phase_of
from tightfit.units import MIB

STORY = """torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.14 GiB. GPU 0 has a total capacity of 11.69 GiB of which 2.68 GiB is free. Including non-PyTorch memory, this process has 7.04 GiB memory in use. Of the allocated memory 6.78 GiB is allocated by PyTorch, and 224.90 MiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."""
NANOGPT = """$ python train.py config/train_openwebtext.py --batch_size=64 --compile=True
Overriding config with config/train_openwebtext.py:
# GPT-2 124M on one card
dataset = 'openwebtext_local'
gradient_accumulation_steps = 5 * 8
block_size = 1024 # tokens
Overriding: batch_size = 64
Overriding: compile = True
tokens per iteration will be: 2,621,440
Initializing a new model from scratch
defaulting to vocab_size of GPT-2 to 50304 (50257 rounded up for efficiency)
number of parameters: 123.59M
/home/me/nanoGPT/train.py:196: FutureWarning: `torch.cuda.amp.GradScaler(args...)` is deprecated. Please use `torch.amp.GradScaler('cuda', args...)` instead.
compiling the model... (takes a ~minute)
[0/0] Not enough SMs to use max_autotune_gemm mode
PyTorch version: 2.8.0+cu126
| NVIDIA-SMI 550.54.14    Driver Version: 550.54.14    CUDA Version: 12.4 |
GPU: NVIDIA GeForce RTX 3060
Traceback (most recent call last):
  File "/home/me/nanoGPT/train.py", line 264, in <module>
    losses = estimate_loss()
             ^^^^^^^^^^^^^^^
  File "/home/me/env/lib/python3.11/site-packages/torch/utils/_contextlib.py", line 120, in decorate_context
    return func(*args, **kwargs)
  File "/home/me/nanoGPT/train.py", line 224, in estimate_loss
    logits, loss = model(X, Y)
  File "/home/me/nanoGPT/model.py", line 187, in forward
    loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
"""
SHORT = "CUDA out of memory. Tried to allocate {} GiB (GPU {}; 12.00 GiB total capacity; 9.00 GiB already allocated; 1.00 GiB free; 9.50 GiB reserved in total by PyTorch)"
PROGRESS = "".join(f"iter {n}: loss 3.0, time 100.00ms, mfu 10.00%\n" for n in range(5))


def request_of(tensor_bytes: int) -> int:
    """Bytes that PyTorch's allocator requests by default when nothing in its cache fits."""
    if tensor_bytes <= MIB:
        return 2 * MIB
    if tensor_bytes < 10 * MIB:
        return 20 * MIB
    return -(-tensor_bytes // (2 * MIB)) * 2 * MIB


def test_the_story():
    failure = read_log(STORY).failure
    assert failure is not None
    assert (failure.kind, failure.torch_format, failure.device_index) == ("cuda_out_of_memory", "T6", 0)
    assert failure.exception == "torch.OutOfMemoryError"
    assert failure.requested_bytes == 6592774799
    assert failure.total_bytes == 12552041923
    assert failure.allocated_bytes == 7279969567
    assert failure.unallocated_bytes == failure.cache_bytes == 235824742
    assert failure.others_bytes == pytest.approx(1.97 * 2**30, rel=1e-6)
    assert failure.outside_pytorch_bytes == pytest.approx(41.34 * 2**20, rel=1e-3)
    outside = failure.figures["outside_pytorch_bytes"]
    assert not outside.stated
    assert outside.low < 40 * 2**20 < outside.high
    assert failure.short_by_bytes == pytest.approx(3.46 * 2**30, rel=1e-6)
    assert failure.cache_would_do is False
    assert (failure.rank, failure.phase, failure.frames, failure.notes) == (None, None, (), ())


def test_what_nanogpt_printed_and_where_it_was():
    reading = read_log(NANOGPT + STORY)
    context, failure = reading.context, reading.failure
    assert failure is not None
    assert context.keys == {
        "batch_size": 64, "compile": True, "dataset": "openwebtext_local", "gradient_accumulation_steps": 40, "block_size": 1024,
    }  # fmt: skip
    assert context.command == "python train.py config/train_openwebtext.py --batch_size=64 --compile=True"
    assert (context.tokens_per_iteration, context.vocab_size, context.parameters) == (2_621_440, 50_304, "123.59M")
    assert (context.torch_version, context.driver_version, context.cuda_version) == ("2.8.0+cu126", "550.54.14", "12.6")
    assert (context.gpu_name, context.dataset) == ("NVIDIA GeForce RTX 3060", "openwebtext_local")
    assert context.hints == ("few_sms", "grad_scaler_deprecated")
    assert failure.phase == "eval"
    assert [(frame.line, frame.function) for frame in failure.frames] == [
        (264, "<module>"), (120, "decorate_context"), (224, "estimate_loss"), (187, "forward"),
    ]  # fmt: skip
    assert failure.frames[0].source == "losses = estimate_loss()"
    assert [frame.is_library for frame in failure.frames] == [False, True, False, False]
    assert failure.line == 1 + NANOGPT.count("\n")
    assert reading.kind_of_nothing is None


@pytest.mark.parametrize(
    ("source", "function", "phase"),
    [
        ("loss.backward()", "<module>", "backward"),
        ("scaler.step(optimizer)", "<module>", "optimizer"),
        ("optimizer.step()", "train", "optimizer"),
        ("torch.save(checkpoint, path)", "<module>", "save"),
        ("model.load_state_dict(state_dict)", "<module>", "resume"),
        ("y = model.generate(x, 500)", "<module>", "sample"),
        ("loss = F.cross_entropy(logits, targets)", "forward", "loss"),
        ("x = self.c_fc(x)", "forward", "forward"),
        ("model.to(device)", "<module>", "setup"),
        ("x = 1", "<module>", None),
    ],
)
def test_phases(source, function, phase):
    frame = TraceFrame(file="/home/me/train.py", line=1, function=function, source=source)
    assert phase_of([frame]) == phase
    above = TraceFrame(file="/home/me/train.py", line=1, function="estimate_loss", source="model(X, Y)")
    if phase in ("forward", "loss", "backward"):
        assert phase_of([above, frame]) == "eval"


def test_ranks_interleaved_have_their_own_stack():
    def stack(rank: int, function: str) -> list[str]:
        text = f'Traceback (most recent call last):\n  File "t.py", line {rank}, in {function}\n    loss.backward()\nRuntimeError: {SHORT.format("2.00", rank)}'
        return [f"[rank{rank}]: {line}" for line in text.split("\n")]

    lines = [line for pair in zip(stack(0, "a"), stack(1, "b"), strict=True) for line in pair]
    reading = read_log("\n".join(lines))
    assert reading.failure is not None
    assert (reading.failure.rank, reading.failure.device_index) == (0, 0)
    assert [frame.function for frame in reading.failure.frames] == ["a"]
    assert [(other.rank, other.device_index) for other in reading.others] == [(1, 1)]
    assert reading.others_count == 1


def chosen(text: str) -> tuple[str, int | None, int]:
    reading = read_log(text)
    assert reading.failure is not None
    return reading.failure.kind, reading.failure.requested_bytes, reading.others_count


def test_the_first_failure_that_was_not_survived_matters():
    first, second = (f"RuntimeError: {SHORT.format(size, 0)}\n" for size in ("2.00", "3.00"))
    assert chosen(first + second) == ("cuda_out_of_memory", 2 * 2**30, 1)
    assert chosen(first + PROGRESS + second) == ("cuda_out_of_memory", 3 * 2**30, 1)
    assert chosen(first + "Decreasing batch size to: 8\n" + second) == ("cuda_out_of_memory", 3 * 2**30, 1)
    # Two runs, one pasted after the other: the first one did end.
    assert chosen(first + "$ python train.py --batch_size=8\n" + PROGRESS + second) == (
        "cuda_out_of_memory",
        2 * 2**30,
        1,
    )
    worker = "RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.\n"
    assert chosen(worker + first) == ("cuda_out_of_memory", 2 * 2**30, 1)
    assert chosen(first + worker + "Killed\n") == ("cuda_out_of_memory", 2 * 2**30, 2)


def test_a_failure_that_is_printed_twice_is_one():
    text = f"2025-01-01 10:00:00 ERROR {SHORT.format('2.00', 0)}\n{oom_messages.TRACEBACK}\nRuntimeError: {SHORT.format('2.00', 0)}\n"
    reading = read_log(text)
    assert reading.failure is not None
    assert (reading.failure.repeats, reading.others_count, reading.failure.phase) == (2, 0, "backward")
    assert reading.failure.line == 1


def test_chained_exceptions_name_the_first():
    text = (
        f'Traceback (most recent call last):\n  File "a.py", line 3, in forward\n    x = f(x)\nRuntimeError: {SHORT.format("2.00", 0)}\n\n'
        "During handling of the above exception, another exception occurred:\n\nTraceback (most recent call last):\n"
        f'  File "a.py", line 9, in main\n    torch.save(x)\nRuntimeError: {SHORT.format("3.00", 0)}\n'
    )
    reading = read_log(text)
    assert reading.failure is not None
    assert (reading.failure.requested_bytes, reading.failure.phase, reading.others_count) == (2 * 2**30, "forward", 1)


def test_ipython_tracebacks():
    text = """---------------------------------------------------------------------------
RuntimeError                              Traceback (most recent call last)
<ipython-input-116-11ebb3420695> in <module>
     29
---> 30         predictions = network(images)
     31
~/anaconda3/lib/python3.7/site-packages/torch/nn/modules/module.py in _call_impl(self, *input, **kwargs)
    721         else:
--> 722             result = self.forward(*input, **kwargs)
File ~/project/model.py:69, in Net.forward(self, data)
---> 69 x = self.layer(data)

""" + SHORT.format("2.00", 0)
    failure = read_log(text).failure
    assert failure is not None
    assert [(frame.line, frame.source) for frame in failure.frames] == [
        (30, "predictions = network(images)"), (722, "result = self.forward(*input, **kwargs)"), (69, "x = self.layer(data)"),
    ]  # fmt: skip
    assert failure.phase == "forward"


NOTHING = {
    "": "empty",
    " \n\n": "empty",
    "iter 0: loss 10.9\niter 1: loss 10.8\n": "nothing",
    "If you run into CUDA out of memory, reduce `batch_size`, or use gradient accumulation. " * 5: "document",
    "# FAQ\n\n## CUDA out of memory\n\nTry a smaller batch.\n" + "Some more advice follows here.\n" * 20: "document",
    "When you see `RuntimeError: CUDA error: out of memory`, another process may use the card.\n": "document",
    "You may get an error like `RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 2.00 GiB total capacity; 1.00 GiB already allocated; 1.00 MiB free; 1.00 GiB reserved in total by PyTorch)`.": "document",
    '    if "CUDA out of memory" in str(e):\n        torch.cuda.empty_cache()\n': "code",
    "    except torch.cuda.OutOfMemoryError as e:\n        pass\n": "code",
    "        # CUDA out of memory happens here\n        return 1\n": "code",
    'raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")\n': "code",
    "WARNING:root:CUDA out of memory. Tried to allocate 1.72 GiB (GPU 0; 10.76 GiB total capacity; 4.01 GiB already allocated; 356.00 MiB free; 5.54 GiB cached)\n" + PROGRESS: "caught",
    "2025-01-01 12:00:00 - INFO - caught OOM: CUDA out of memory. Tried to allocate 1.72 GiB, reducing batch\n" + PROGRESS: "caught",
    "Skipping batch 1 due to error: CUDA out of memory. Tried to allocate 730.00 MiB.\n" + PROGRESS: "caught",
    "/x/y.py:12: UserWarning: CUDA out of memory. Tried to allocate 2.00 GiB\n  warnings.warn(\n": "warning",
    'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\nKeyError: 3\n': "other_error",
}  # fmt: skip


@pytest.mark.parametrize("text", NOTHING)
def test_mentions_are_no_failures(text):
    reading = read_log(text)
    assert reading.failure is None, reading.failure
    assert reading.kind_of_nothing == NOTHING[text]


@pytest.mark.parametrize(
    "text",
    [
        SHORT.format("2.00", 0),
        "Tried to allocate 20.00 MiB (GPU 0; 1.96 GiB total capacity; 1.24 GiB already allocated; 2.88 MiB free; 1.25 GiB reserved in total by PyTorch)",
        "# CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 1.96 GiB total capacity; 1.24 GiB already allocated; 2.88 MiB free; 1.25 GiB reserved in total by PyTorch)",
        "RuntimeError: CUDA out of memory.",
        "Error: CUDA out of memory",
        "I keep getting CUDA out of memory with batch_size=1, what can I do?",
        "23:02:20 [ERROR] Quantization failed: CUDA out of memory. Tried to allocate 320.00 MiB. GPU 0 has a total capacity of 31.37 GiB of which 80.69 MiB is free.",
        "When I start training I got this error: RuntimeError: CUDA out of memory. Tried to allocate 2.00 MiB",
        "(Worker_TP1 pid=549) ERROR 07-29 21:48:54 [multiproc_executor.py:962] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    ],
)  # fmt: skip
def test_a_message_alone_is_a_failure(text):
    failure = read_log(text).failure
    assert failure is not None
    assert failure.kind == "cuda_out_of_memory"


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-16", ""), ("utf-16-le", ""), ("utf-16-be", ""), ("utf-8", "\ufeff"), ("cp932", "")]
)
def test_encodings(encoding, mark):
    raw = (mark + "学習中のエラー\r\n" + STORY + "\r\n").encode(encoding)
    for source in (raw, io.BytesIO(raw)):
        failure = read_log(source).failure
        assert failure is not None
        assert failure.requested_bytes == 6592774799


def strings_of(reading: LogReading) -> str:
    return repr((reading, reading.failure and reading.failure.message))


def test_control_codes_are_not_passed_on():
    evil = "\x1b]0;owned\x07\x1b[31m\x9b1m\u202e\x08"
    text = f'{evil}Traceback (most recent call last):\n  File "{evil}/home/x.py", line 3, in f{evil}\n    g({evil})\n{STORY}'
    reading = read_log(text)
    assert reading.failure is not None
    kept = [reading.failure.message, reading.evidence, str(reading.context.command)]
    kept += [text for frame in reading.failure.frames for text in (frame.file, frame.function, frame.source)]
    assert reading.failure.frames
    assert not any(ord(character) < 32 or character in "\x7f\x9b\u202e" for text in kept for character in text)


@pytest.mark.parametrize("count", [400, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_logs_never_raise(count: int):
    rng = random.Random(count)
    logs = [surround(write(form, rng).text, rng) for form in FORMS for surround in SURROUNDINGS]
    alphabet = "\x00\x1b[]()\n\r\t\\\"'{}<>&;:%0123456789.GiBMKe \u3042\ud800"
    for _ in range(count):
        text = rng.choice(logs)
        for _ in range(rng.randrange(1, 5)):
            at, to = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
            act = rng.randrange(4)
            if act == 0:
                text = text[:at] + text[to:][:3000]
            elif act == 1:
                text = text[:at] + "".join(rng.choices(alphabet, k=rng.randrange(1, 6))) + text[at:]
            elif act == 2:
                other = rng.choice(logs)
                text = text[:at] + other[rng.randrange(len(other)) :][:2000] + text[to:]
            else:
                text = text[at:to] or text
        reading = read_log(text if rng.random() < 0.5 else text.encode("utf-8", "surrogatepass"))
        for figure in reading.failure.figures.values() if reading.failure else ():
            assert 0 <= figure.low <= figure.bytes <= figure.high


def test_noise_never_raises():
    rng = random.Random(8)
    for size in (0, 1, 2, 3, 100, 10_000, 300_000):
        read_log(rng.randbytes(size))
    read_log("CUDA out of memory. Tried to allocate " * 1_000)
    read_log("(GPU 0; 1.00 GiB total capacity;" * 1_000)
    read_log("GPU 0 has a total capacity of " * 1_000 + "9" * 100_000)
    read_log('\\n  File "a", line 1, in f' * 4_000)


class Endless(io.RawIOBase):
    """A log of `size` bytes that is never in memory as a whole."""

    def __init__(self, size: int, end: bytes) -> None:
        self.left, self.end = size, end

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:  # type: ignore[override]
        if self.left <= 0:
            end, self.end = self.end, b""
            return end
        line = b"iter 100: loss 3.1234, time 123.45ms, mfu 12.34%\n"
        block = line * (count // len(line) + 1)
        self.left -= len(block)
        return block


def test_a_long_log_takes_little_memory():
    tracemalloc.start()
    try:
        reading = read_log(Endless(20_000_000, STORY.encode()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reading.failure is not None
    assert reading.failure.line > 400_000
    assert peak < 30_000_000


def test_a_memory_snapshot_states_what_it_has(tmp_path):
    frames = [
        {"filename": "/home/me/model.py", "line": 9, "name": "forward"},
        {"filename": "t.py", "line": 3, "name": "estimate_loss"},
    ]
    snapshot = {
        "segments": [
            {"device": 1, "total_size": 40, "allocated_size": 30, "segment_pool_id": (0, 0)},
            {"device": 1, "total_size": 8, "allocated_size": 8, "segment_pool_id": (0, 1)},
            {"device": 0, "total_size": 99, "allocated_size": 99},
        ],
        "device_traces": [
            [],
            [{"action": "alloc", "size": 5}, {"action": "oom", "size": 100, "device_free": 60, "frames": frames}],
        ],
    }
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    facts = read_snapshot_failure(path)
    assert facts is not None
    assert (facts.requested_bytes, facts.free_bytes, facts.device_index) == (100, 60, 1)
    assert (facts.reserved_bytes, facts.allocated_bytes, facts.private_pool_bytes, facts.cache_bytes) == (48, 38, 8, 10)
    assert (facts.short_by_bytes, facts.cache_would_do, facts.phase) == (40, False, "eval")
    assert [frame.function for frame in facts.frames] == ["estimate_loss", "forward"]
    assert facts_of_snapshot({"segments": [], "device_traces": [[{"action": "alloc"}]]}) is None
    assert (
        facts_of_snapshot(
            {"segments": [3, {"total_size": "x"}], "device_traces": [3, [None, {"action": "oom", "size": "a"}]]}
        )
        is None
    )


def test_nothing_of_torch_is_needed():
    read = "import sys; from tightfit.oomlog.log_reader import read_log; read_log('CUDA out of memory'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_model_that_is_called_within_its_loss_is_in_the_forward_pass():
    call = TraceFrame(file="train.py", line=4, function="<module>", source="loss = criterion(model(images), labels)")
    inner = TraceFrame(file="train.py", line=2, function="forward", source="x = F.relu(self.bn2(self.conv2(x)))")
    loss = TraceFrame(file="torch/nn/modules/loss.py", line=9, function="forward", source="return F.cross_entropy(")
    assert phase_of([call, inner]) == "forward"
    assert phase_of([call]) == phase_of([call, loss]) == "loss"


TRACEBACK = """step 3
Traceback (most recent call last):
  File "train.py", line 9, in step
    loss.backward()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB."""
LIBRARYS = "loading\nterminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc"
REPORTED = "# GPU out of memory\n\nIt happens in the third epoch."


@pytest.mark.parametrize("text", [TRACEBACK, LIBRARYS, REPORTED], ids=["traceback", "library", "report"])
@pytest.mark.parametrize(
    "prefix",
    ["INFO ", "WARNING ", "2024-05-01 12:00:00,123 - INFO - ", "(Worker pid=123) ", "| ", "> "],
)
def test_prefix_of_all_lines_changes_nothing(text: str, prefix: str):
    plain = read_log(text)
    wrapped = read_log("\n".join(prefix + line for line in text.split("\n")))
    assert plain.failure is not None
    assert wrapped.failure is not None
    assert (wrapped.failure.kind, wrapped.failure.figures) == (plain.failure.kind, plain.failure.figures)
    assert wrapped.failure.frames == plain.failure.frames


def test_level_of_a_traceback_in_the_middle_of_a_log_changes_nothing():
    wrapped = "starting\n" + "\n".join(f"INFO {line}" for line in TRACEBACK.split("\n")) + "\ndone"
    assert read_log(wrapped).status == "out_of_memory"
