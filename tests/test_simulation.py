"""The simulation service: it ends with its client however that ends, and its cache does no harm however it is found."""

import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from warm import in_process

from tightfit.config import TrainConfig
from tightfit.questions.asking import detail_request
from tightfit.simulation import cache
from tightfit.simulation.client import Simulator, run_once
from tightfit.simulation.details import Detail
from tightfit.simulation.dry_run import dryrun_script
from tightfit.simulation.requests import Ask, Failed, HostRates, HostRequest, Reply, StepRequest, StepTrace
from tightfit.simulation.wire import Frames, send
from tightfit.vgpu.records import Settings

MODEL = ["--n_layer=2", "--n_embd=128", "--n_head=2", "--vocab_size=8192", "--compile=True"]
ROOT = Path(__file__).parents[1]
TIGHTFIT = ("-m", "tightfit")
PLAN = (*TIGHTFIT, "plan", "--gpu=RTX 3060 12GB", *MODEL)
THREE_STEPS = """
import torch
layer = torch.nn.Linear(4, 4, device="cuda")
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for _ in range(3):
    layer(torch.ones(2, 4, device="cuda")).sum().backward()
    optimizer.step()
"""
STARTS_ANOTHER = """
import subprocess, sys, time
subprocess.Popen(["sleep", "{seconds}"])
time.sleep(100)
"""
RATES = HostRates(flops={"float32": 1e11}, bandwidth=1e10, base_bytes={"resident": 1})
TINY = TrainConfig(
    n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=512, batch_size=2, micro_batch=1, device="cuda",
    gradient_accumulation_steps=1, eval_micro_batch=1, dtype="bfloat16", compile=False, loss="full", fit="off",
)  # fmt: skip


def request(config: TrainConfig = TINY) -> StepRequest:
    return StepRequest(whole=False, config=config, share=2, gpu="GeForce RTX 3060 12GB")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tightfit"


def marked(mark: str) -> list[psutil.Process]:
    """Processes that carry the mark in their environment: children inherit it, whoever their parent is by then."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TIGHTFIT_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(mark: str, seconds: float = 10) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def wait_for(moment: float | str) -> None:
    if not isinstance(moment, str):
        return time.sleep(moment)
    deadline = time.monotonic() + 60
    while not (begun := is_running(moment)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun, "the script did not begin"


def is_running(command: str) -> bool:
    return any(" ".join(each.info["cmdline"] or ()) == command for each in psutil.process_iter(["cmdline"]))


def killed_after(
    moment: float | str,
    sign: signal.Signals,
    folder: Path,
    mark: str,
    words: tuple[str, ...] = PLAN,
    *,
    group: bool = False,
) -> None:
    """Kill a command after so many seconds, or once it started another; nothing may be left behind."""
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    environ = {**os.environ, "XDG_CACHE_HOME": str(folder / mark), "TMPDIR": str(temporary), "TIGHTFIT_TEST_MARK": mark}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, *words],
        env=environ,
        cwd=ROOT,
        start_new_session=True,
        stdout=quiet,
        stderr=quiet,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    wait_for(moment)
    (os.killpg if group else os.kill)(process.pid, sign)
    process.wait(10)
    assert wait_until_gone(mark) == []
    assert [each.name for each in temporary.iterdir() if not each.name.startswith("torchinductor")] == []


class TestEnd:
    @pytest.mark.parametrize("delay_s", [0.5, *(pytest.param(each, marks=pytest.mark.slow) for each in (4.0, 8.0))])
    def test_a_killed_plan_leaves_nothing_behind(self, delay_s: float, tmp_path: Path) -> None:
        killed_after(delay_s, signal.SIGKILL, tmp_path, f"{os.getpid()}-{delay_s}")

    def test_an_interrupted_one_neither(self, tmp_path: Path) -> None:
        killed_after(5.0, signal.SIGINT, tmp_path, f"{os.getpid()}-interrupted")

    @pytest.mark.parametrize("group", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_an_interrupted_demo_neither(self, group: bool, tmp_path: Path) -> None:
        killed_after(3.0, signal.SIGINT, tmp_path, f"{os.getpid()}-demo", ("benchmarks/demo.py",), group=group)

    @pytest.mark.slow
    def test_an_interrupted_explanation_neither(self, tmp_path: Path) -> None:
        words = ("explain", "benchmarks/story.log", "--config=configs/train_openwebtext.py")
        killed_after(3.0, signal.SIGINT, tmp_path, f"{os.getpid()}-explain", (*TIGHTFIT, *words), group=True)

    def test_an_interrupted_dry_run_takes_along_what_its_script_started(self, tmp_path: Path) -> None:
        script, seconds = tmp_path / "script.py", f"100.{os.getpid()}"
        script.write_text(STARTS_ANOTHER.format(seconds=seconds))
        words = (*TIGHTFIT, "dryrun", "--gpu=RTX 4090", str(script))
        killed_after(f"sleep {seconds}", signal.SIGINT, tmp_path, f"{os.getpid()}-dryrun", words, group=True)

    @pytest.mark.slow
    def test_twenty_random_moments(self, tmp_path: Path) -> None:
        moments = random.Random(15)
        for number in range(20):
            killed_after(moments.uniform(0, 15), signal.SIGKILL, tmp_path, f"{os.getpid()}-random-{number}")

    def test_a_play_that_is_killed_is_reported_and_the_next_one_works(self, home: Path) -> None:
        mark = f"{os.getpid()}-child"
        with pytest.MonkeyPatch.context() as patch, Simulator(workers=1) as simulator:
            patch.setenv("TIGHTFIT_TEST_MARK", mark)
            first = msgspec.structs.replace(request(), share=1)
            assert isinstance(simulator.play([first])[0], StepTrace)  # the server is there
            [server] = marked(mark)
            killer = threading.Thread(target=_kill_next_child, args=(server,))
            killer.start()
            large = request(TrainConfig(**{**vars(TINY), "n_layer": 24}))
            [answer] = simulator.play([large])
            killer.join()
            assert isinstance(answer, Failed)
            assert "ended with code -9 and no answer" in answer.error
            assert isinstance(simulator.play([request()])[0], StepTrace)
        assert wait_until_gone(mark) == []


def _kill_next_child(server: psutil.Process) -> None:
    while not (children := server.children()):
        time.sleep(0.005)
    children[0].kill()


class TestPlays:
    def test_answers_come_in_the_order_of_the_questions_and_are_remembered(self, home: Path) -> None:
        requests = [request(TrainConfig(**{**vars(TINY), "n_layer": layers})) for layers in (3, 1, 2)]
        seen: list[tuple[int, int]] = []
        with Simulator(progress=lambda done, of: seen.append((done, of))) as simulator:
            found = simulator.play(requests)
            assert simulator.played == 3
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
        peaks = [each.allocated_bytes for each in found if isinstance(each, StepTrace)]
        assert peaks[1] < peaks[2] < peaks[0]
        with Simulator() as simulator:
            assert simulator.play(requests) == found
            assert simulator.played == 0

    def test_steps_of_a_script_are_heard_of_while_it_plays(self, tmp_path: Path) -> None:
        script, seen = tmp_path / "script.py", list[int]()
        script.write_text(THREE_STEPS)
        found = dryrun_script(str(script), [], Settings(gpu="RTX 4090"), on_step=seen.append)
        assert (found.outcome, seen) == ("fits", [1, 2, 3])

    def test_steps_of_questions_about_a_script_are_counted_together(self, home: Path, tmp_path: Path) -> None:
        script, seen = tmp_path / "script.py", list[int]()
        script.write_text(THREE_STEPS)
        settings = Settings(gpu="RTX 4090")
        requests = [detail_request([str(script), word], settings) for word in ("one", "two")]
        with Simulator(on_step=seen.append) as simulator:
            answers = simulator.play(requests)
        assert [each.findings.steps for each in answers if isinstance(each, Detail)] == [3, 3]
        assert seen == [0, 1, 2, 3, 4, 5, 6]

    def test_what_cannot_be_played_says_why(self, home: Path) -> None:
        with Simulator() as simulator:
            [answer] = simulator.play([msgspec.structs.replace(request(), gpu="GeForce 9")])
        assert isinstance(answer, Failed)
        assert (answer.error.split(";")[0], answer.exit_code) == ("'GeForce 9' is not in the table of GPUs", 2)
        assert "Traceback" in answer.traceback
        assert not list(home.rglob("*.json")), "a failure is not remembered"

    def test_a_process_of_its_own_is_given_up_in_time(self) -> None:
        assert run_once(HostRequest(processor="x"), timeout_s=0.2) == Failed(error="not done after 0 s")


class TestCache:
    QUESTION = HostRequest(processor="made up")

    def test_it_answers_what_was_asked_before(self, home: Path) -> None:
        assert cache.recall(self.QUESTION) is None
        cache.remember(self.QUESTION, RATES)
        assert cache.recall(self.QUESTION) == RATES
        assert cache.recall(HostRequest(processor="another")) is None

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "7", '"x"', "{}", '{"flops": 1}', "\x00\x01", '{"flops": {}']
    )
    def test_a_file_of_another_shape_counts_as_absent(self, text: str, home: Path) -> None:
        cache.remember(self.QUESTION, RATES)
        [file] = home.rglob("*.json")
        file.write_text(text)
        assert cache.recall(self.QUESTION) is None
        cache.remember(self.QUESTION, RATES)
        assert cache.recall(self.QUESTION) == RATES

    @pytest.mark.parametrize("kind", ["a file in its place", "no home", "a folder that is a loop"])
    def test_where_it_cannot_be_written_nothing_is_remembered(
        self, kind: str, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if kind == "a file in its place":
            home.parent.write_text("")
        elif kind == "a folder that is a loop":
            home.parent.symlink_to(home.parent)
        else:
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.delenv("HOME", raising=False)
            monkeypatch.setattr(pwd, "getpwuid", _no_such_user)
        cache.remember(self.QUESTION, RATES)
        assert cache.recall(self.QUESTION) is None
        with cache.one_at_a_time():
            pass

    def test_writers_at_once_leave_one_whole_answer(self, home: Path) -> None:
        writers = [threading.Thread(target=cache.remember, args=(self.QUESTION, RATES)) for _ in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert cache.recall(self.QUESTION) == RATES
        assert len(list((home / "answers").iterdir())) == 1

    def test_it_forgets_what_was_used_longest_ago(self, tmp_path: Path) -> None:
        for number in range(10):
            (tmp_path / f"{number}.json").write_bytes(bytes(100))
            os.utime(tmp_path / f"{number}.json", (number, number))
        cache.prune(tmp_path, most_bytes=350)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["7.json", "8.json", "9.json"]


def _no_such_user(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


TRACE = """
import msgspec
from tightfit.config import TrainConfig
from tightfit.simulation import step_trace
from tightfit.simulation.requests import StepRequest

step_trace._CHUNKS = {chunks}
config = TrainConfig(n_layer=1, n_head=4, n_embd=256, block_size=1024, loss="chunked", compile=False,
                     activation_checkpointing=0, dtype={dtype!r}, micro_batch=4, eval_micro_batch=4)
environ = {{"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:{expandable}"}}
trace = step_trace.trace_step(StepRequest(whole=True, config=config, share=8, gpu={gpu!r}, environ=environ))
print(msgspec.json.encode(trace).decode())
"""


@pytest.mark.parametrize(
    ("gpu", "dtype", "expandable"), [("GeForce RTX 3060 12GB", "bfloat16", False), ("Tesla T4", "float16", True)]
)
def test_a_trace_of_a_few_chunks_of_the_loss_is_that_of_all(gpu: str, dtype: str, expandable: bool) -> None:
    """Memory of every phase and category, and the number of every kernel; the last of 7 chunks is a smaller one."""
    few, every = (
        in_process(TRACE.format(chunks=chunks, gpu=gpu, dtype=dtype, expandable=expandable)) for chunks in (3, 1000)
    )
    assert few == every


def test_messages_are_put_together_from_pieces() -> None:
    replies = [Reply(number=number, failed=Failed(error="x" * number)) for number in (1, 70_000)]
    frames, found = Frames(Reply), []
    sender, receiver = socket.socketpair()
    with sender, receiver:
        for reply in replies:
            send(sender, reply)
        while len(found) < len(replies):
            found += frames.feed(receiver.recv(4099))
    assert [(each.number, each.failed) for each in found] == [(each.number, each.failed) for each in replies]
    assert Frames(Ask).feed(b"\x00\x00") == []
