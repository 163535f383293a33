"""Real torchrun runs on gloo: the same losses with any number of processes, and the same ways to stop and go on."""

import os
import re
import signal
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from runs import arguments, assert_close, ended, here, rows, torchrun
from torch import distributed

from tightfit.errors import ConfigError, DeviceError
from tightfit.trainer.distributed import World, fresh_name, process_group, world_of_environment

KEYS = {"batch_size": 4, "gradient_accumulation_steps": 2, "eval_interval": 6, "eval_iters": 3}
SEVEN = {"batch_size": 7, "eval_interval": 20, "max_iters": 150, "lr_decay_iters": 150, "micro_batch": 3}


def single(out_dir: Path, data_dir: Path, **keys: object) -> Path:
    """The run of one process that the others are compared with."""
    done = here(arguments(out_dir, data_dir, **keys))
    assert (done.code, done.err) == (0, "")
    return out_dir


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return single(tmp_path_factory.mktemp("alone"), data_dir, **KEYS)


class TestTorchrun:
    @pytest.mark.slow
    def test_one_process(self, alone: Path, tmp_path: Path, data_dir: Path) -> None:
        done = ended(torchrun(1, ["-m", "tightfit", *arguments(tmp_path, data_dir, **KEYS)]))
        assert done.code == 0, done.err
        assert rows(tmp_path) == rows(alone)

    @pytest.mark.slow  # what two processes compute is that of one: the suite's test of shards shows it, too
    def test_two_processes_share_training_and_evaluation(self, alone: Path, tmp_path: Path, data_dir: Path) -> None:
        """With a few lines around the command that print how many tokens each process evaluates."""
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            import os, sys
            from tightfit.cli.main import main
            from tightfit.trainer import loop

            usual = loop.evaluation_loss

            def told(state, pairs):
                total, tokens = usual(state, pairs)
                print(f"process {os.environ['RANK']} evaluated {tokens} tokens", flush=True)
                return total, tokens

            loop.evaluation_loss = told
            code = main()
            threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
            print(f"threads of gloo left: {sum('gloo' in name for name in threads)}", flush=True)
            sys.exit(code)
            """)
        )
        done = ended(torchrun(2, [str(program), *arguments(tmp_path / "out", data_dir, **KEYS)]))
        assert done.code == 0, done.err
        assert_close(alone, tmp_path / "out")
        # One that frees a tensor after the interpreter's end aborts the process, now and then.
        assert done.out.count("threads of gloo left: 0") == 2
        assert "as 1 x 4 sequences of 16 on each of 2 processes" in done.out
        for rank in (0, 1):  # three evaluations of two splits, 12 sequences of 16 tokens over two processes
            assert done.out.count(f"process {rank} evaluated 96 tokens") == 6
        assert len(re.findall(r"^iter 0:", done.out, re.M)) == 1

    @pytest.mark.slow
    def test_four_processes(self, alone: Path, tmp_path: Path, data_dir: Path) -> None:
        done = ended(torchrun(4, ["-m", "tightfit", *arguments(tmp_path, data_dir, **KEYS)]))
        assert done.code == 0, done.err
        assert_close(alone, tmp_path)

    @pytest.mark.parametrize(
        "how", ["SIGTERM to torchrun", pytest.param("Ctrl-C in its terminal", marks=pytest.mark.slow)]
    )
    @pytest.mark.slow
    def test_seven_sequences_over_two_processes_stopped_and_resumed(
        self, tmp_path: Path, data_dir: Path, how: str
    ) -> None:
        """3 and 4 sequences, in passes of up to 3; torchrun sends each process the signal that it got itself."""
        expected = single(tmp_path / "alone", data_dir, **SEVEN)
        stopped = tmp_path / "stopped"
        program = ["-m", "tightfit", *arguments(stopped, data_dir, **SEVEN)]
        running = torchrun(2, program)
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("iter 25:"):
                break
        if how.startswith("SIGTERM"):
            running.send_signal(signal.SIGTERM)
        else:
            os.killpg(running.pid, signal.SIGINT)
        done = ended(running)
        assert done.code != 0
        assert re.search(r"^SIG(TERM|INT): saved step \d+ in ", done.out, re.M), done.err
        assert 25 < torch.load(stopped / "last.pt", weights_only=True)["iter_num"] < 150
        done = ended(torchrun(2, [*program, "--init_from=resume"]))
        assert done.code == 0, done.err
        assert_close(expected, stopped)

    @pytest.mark.slow
    def test_fewer_sequences_than_processes_are_refused(self, tmp_path: Path, data_dir: Path) -> None:
        keys = {"batch_size": 1, "gradient_accumulation_steps": 1}
        done = ended(torchrun(2, ["-m", "tightfit", *arguments(tmp_path / "out", data_dir, **keys)]))
        assert done.code != 0
        sentence = (
            "tightfit: batch_size * gradient_accumulation_steps = 1 sequences a step cannot be shared by "
            "2 processes; start at most 1\n"
        )
        assert sentence in done.err
        assert "Traceback" not in done.err.split("torch/distributed")[0]
        assert not (tmp_path / "out").exists()


class TestWorld:
    @pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100, 101])
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
    def test_shares_cover_everything_once_and_evenly(self, size: int, count: int) -> None:
        shares = [World(rank, size).share(count) for rank in range(size)]
        assert [number for share in shares for number in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1

    def test_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK", raising=False)
        assert world_of_environment() == World(0, 1, 0, 1)
        for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", 4)):
            monkeypatch.setenv(name, str(value))
        assert world_of_environment() == World(5, 8, 1, 4)
        assert not world_of_environment().is_main

    @pytest.mark.parametrize("size", ["", "two"])
    def test_a_broken_environment_is_refused(self, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(ConfigError, match="start with torchrun"):
            world_of_environment()

    def test_rank_alone_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with pytest.raises(ConfigError, match="WORLD_SIZE"):
            world_of_environment()

    def test_nccl_on_a_processor_is_refused(self) -> None:
        with (
            pytest.raises(ConfigError, match="backend=nccl needs CUDA"),
            process_group(World(0, 2), "nccl", torch.device("cpu")),
        ):
            pass

    def test_one_process_needs_no_group(self) -> None:
        world, cpu = World(), torch.device("cpu")
        with process_group(world, "auto", cpu):
            assert not torch.distributed.is_initialized()
        assert world.sum([1.5, 2.0], cpu) == [1.5, 2.0]
        assert world.any(True, cpu)
        assert not world.any(False, cpu)
        assert world.from_main("value") == "value"


class TestStart:
    def test_all_agree_on_a_name_whatever_was_left_in_the_store(self) -> None:
        """Also if a process asks long before the first one is there."""
        store, names = distributed.HashStore(), []
        store.set_timeout(timedelta(seconds=20))
        for _ in range(3):
            with ThreadPoolExecutor(3) as pool:
                found = [pool.submit(fresh_name, store, rank, 3) for rank in (2, 1)]
                time.sleep(0.03)
                found.append(pool.submit(fresh_name, store, 0, 3))
                (name,) = {each.result() for each in found}
            names.append(name)
        assert len(set(names)) == 3

    def test_a_process_that_does_not_come_is_named(self) -> None:
        store = distributed.HashStore()
        store.set_timeout(timedelta(milliseconds=50))
        store.set("tightfit/asks/1", "of a start before")
        with pytest.raises(DeviceError, match=r"processes 1, 2 of 3 did not connect"):
            fresh_name(store, 0, 3)
