"""Saves in the background: the same files with the same promises, while training goes on."""

import errno
import json
import os
import signal
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Done, arguments, assert_same_end, ended, here, process, torchrun
from test_trainer_shard import SPLIT, UNEVEN, sharded
from test_trainer_shard_parts import assert_same, state

from tightfit.errors import CannotSave
from tightfit.trainer import saving
from tightfit.trainer.distributed import World
from tightfit.trainer.parts import in_memory
from tightfit.trainer.saving import Saver
from tightfit.trainer.staging import BackgroundSaves
from tightfit.trainer.stored import load, load_newest

KEYS = {"max_iters": 12, "lr_decay_iters": 12, "eval_interval": 6, "save_interval": 2, "async_save": True}


class TestStaging:
    @pytest.mark.parametrize("in_parts", [True, False])
    def test_what_is_written_is_what_was_staged(self, tmp_path: Path, in_parts: bool) -> None:
        """Not what the run makes of its tensors afterwards."""
        saves, content, expected = BackgroundSaves(World(), in_parts=in_parts), state(3), state(3)
        staged = saves.staged(content)
        with torch.no_grad():
            for tensor in content.model.values():
                tensor.add_(1.0)
        saves.begin(tmp_path, staged, "ckpt.pt").result()
        assert_same(load_newest(tmp_path, log=print), expected)

    def test_memory_is_kept_and_tied_weights_are_one(self) -> None:
        saves = BackgroundSaves(World(), in_parts=False)
        first, second = saves.staged(state(1)), saves.staged(state(2))
        assert first.model["lm_head.weight"] is first.model["transformer.wte.weight"]
        for name, tensor in first.model.items():
            assert tensor.data_ptr() == second.model[name].data_ptr(), name
            assert torch.equal(tensor, state(2).model[name])

    def test_lack_of_memory_is_a_save_that_failed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_memory(*_: object, **__: object) -> None:
            raise MemoryError("2 GiB")

        monkeypatch.setattr("tightfit.trainer.checkpoint.save", no_memory)
        saves = BackgroundSaves(World(), in_parts=False)
        with pytest.raises(CannotSave, match="memory ran out while it was written"):
            saves.begin(tmp_path, saves.staged(state(1)), "ckpt.pt").result()


class TestSaver:
    def saver(self, log: Callable[[str], object]) -> tuple[Saver, list["Future[None]"]]:
        running: list[Future[None]] = []

        def begin(folder: Path, name: str) -> "Future[None]":
            running.append(Future())
            return running[-1]

        return Saver(Path("out"), lambda *_, **__: None, log, begin=begin), running

    def test_a_state_counts_as_saved_once_it_is_written(self) -> None:
        saver, running = self.saver(print)
        saver.save("ckpt.pt", 4)
        assert (saver.saved_step, saver.poll()) == (0, False)
        running[0].set_result(None)
        assert (saver.poll(), saver.saved_step) == (True, 4)
        assert not saver.poll()

    def test_a_failure_is_told_and_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines: list[str] = []
        saver, running = self.saver(lines.append)
        monkeypatch.setattr(saving, "RETRY_S", 0.0)
        saver.save("ckpt.pt", 4)
        running[0].set_exception(CannotSave("the disk is gone"))
        assert not saver.is_due()
        assert (saver.poll(), saver.saved_step) == (True, 0)
        assert saver.is_due()
        assert "the disk is gone" in lines[0]
        saver.save("last.pt", 5)
        running[1].set_result(None)
        saver.finish()
        assert (saver.saved_step, saver.is_due()) == (5, False)

    def test_one_at_a_time_and_the_last_one_waits(self) -> None:
        saver, running = self.saver(print)
        saver.save("ckpt.pt", 4)
        threading.Timer(0.05, running[0].set_result, [None]).start()
        saver.save("last.pt", 6)
        assert saver.saved_step == 4
        threading.Timer(0.05, running[1].set_result, [None]).start()
        saver.save_last("last.pt", 7)
        assert running[1].done()
        assert saver.saved_step == 7

    def test_a_bug_is_raised(self) -> None:
        saver, running = self.saver(print)
        saver.save("ckpt.pt", 4)
        running[0].set_exception(ValueError("a bug"))
        with pytest.raises(ValueError, match="a bug"):
            saver.poll()


class TestOneProcess:
    def test_the_end_is_the_same(self, tmp_path: Path, data_dir: Path) -> None:
        for name, own in (("with", KEYS), ("without", KEYS | {"async_save": False})):
            done = here(arguments(tmp_path / name, data_dir, **own))
            assert done.code == 0, done.err
        expected = load_newest(tmp_path / "without", log=print)
        assert_same(load_newest(tmp_path / "with", log=print), expected)
        assert {path.name for path in (tmp_path / "with").glob("*.pt")} == {"ckpt.pt", "ckpt.prev.pt"}

    def test_a_disk_that_fails_for_a_while_loses_nothing(
        self, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saving, "RETRY_S", 0.0)
        usual, left = os.fsync, [3]

        def fsync(descriptor: int) -> None:
            if threading.current_thread() is not threading.main_thread() and left[0]:
                left[0] -= 1
                raise OSError(errno.EIO, "Input/output error")
            usual(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        done = here(arguments(tmp_path / "out", data_dir, **KEYS))
        assert done.code == 0, done.err
        assert left == [0]
        assert done.out.count("Input/output error") == 3
        assert load_newest(tmp_path / "out", log=print).step == 12

    @pytest.mark.slow
    def test_a_signal_waits_for_the_save_and_makes_its_own(self, tmp_path: Path, data_dir: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(SLOW_SAVES + STOPPED)
        out_dir = tmp_path / "out"
        done = ended_program(program, out_dir, data_dir, KEYS)
        assert done.code == 128 + signal.SIGTERM, done.err
        newest = load_newest(out_dir, log=print)
        assert newest.step == 6
        assert here(arguments(out_dir, data_dir, **KEYS, init_from="resume")).code == 0
        assert process(arguments(tmp_path / "whole", data_dir, **KEYS)).code == 0
        assert_same_end(tmp_path / "whole", out_dir)


SLOW_SAVES = textwrap.dedent("""\
    import os, signal, sys, time
    from tightfit.cli.main import main
    from tightfit.trainer import loop, staging

    usual_save = staging.BackgroundSaves._save

    def slow(self, folder, content, name):
        sys.stdout.write(f"writing step {content.step}\\n"); sys.stdout.flush()
        time.sleep(1.0)
        usual_save(self, folder, content, name)
        sys.stdout.write(f"written step {content.step}\\n"); sys.stdout.flush()

    staging.BackgroundSaves._save = slow
    """)
STOPPED = textwrap.dedent("""\
    usual = loop._Run._train_step

    def step(run):
        if run.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return usual(run)

    loop._Run._train_step = step
    sys.exit(main())
    """)


def ended_program(program: Path, out_dir: Path, data_dir: Path, keys: dict[str, Any]) -> Done:
    from subprocess import run
    from sys import executable

    from runs import environment

    words = [executable, str(program), *arguments(out_dir, data_dir, **keys)]
    done = run(words, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
class TestShards:
    KILLED = textwrap.dedent("""\
        usual = loop._Run._train_step

        def step(run):
            if run.step == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            return usual(run)

        loop._Run._train_step = step
        sys.exit(main())
        """)

    def test_as_without_it_bit_for_bit(self, tmp_path: Path, data_dir: Path) -> None:
        keys = UNEVEN | SPLIT | KEYS
        for name, own in (("with", keys), ("without", keys | {"async_save": False})):
            done = sharded(2, tmp_path / name, data_dir, **own)
            assert done.code == 0, done.err
        assert_same(in_memory(load(tmp_path / "with" / "ckpt.dcp")), load(tmp_path / "without" / "ckpt.dcp"))

    def test_training_goes_on_while_a_state_is_written(self, tmp_path: Path, data_dir: Path) -> None:
        """Killed while step 6 is written in the background, two steps later: the save before it is still there."""
        program = tmp_path / "program.py"
        program.write_text(SLOW_SAVES.replace("time.sleep(1.0)", "time.sleep(2.0 * (content.step == 6))") + self.KILLED)
        keys = UNEVEN | SPLIT | KEYS | {"save_interval": 3, "eval_interval": 100}
        out_dir = tmp_path / "out"
        words = ["--max-restarts=1", str(program), *arguments(out_dir, data_dir, **keys, shard="full")]
        done = ended(torchrun(2, words))
        assert done.code == 0, done.err
        before_the_kill = done.out.split("started this run's processes again")[0]
        assert before_the_kill.rindex("writing step 6") < before_the_kill.rindex("iter 7:")
        assert "written step 6" not in before_the_kill
        assert f"resuming {out_dir}/last.dcp at step 3" in done.out
        assert sharded(2, tmp_path / "whole", data_dir, **keys).code == 0
        assert_same(in_memory(load(out_dir / "ckpt.dcp")), load(tmp_path / "whole" / "ckpt.dcp"))
        steps = [json.loads(line)["step"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == 12

    def test_signals_wait_for_the_save(self, tmp_path: Path, data_dir: Path) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            SLOW_SAVES + STOPPED.replace("run.step == 5:", 'run.step == 5 and os.environ["RANK"] == "1":')
        )
        keys = UNEVEN | SPLIT | KEYS | {"save_interval": 5, "eval_interval": 100}
        done = ended(torchrun(2, [str(program), *arguments(tmp_path / "out", data_dir, **keys, shard="full")]))
        assert "written step 5" in done.out
        assert load_newest(tmp_path / "out", log=print).step == 6
