"""Checkpoints that several processes write: complete or not there, read at any number of processes, never executed."""

import errno
import os
import pickle
import re
import shutil
import socket
import textwrap
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from runs import arguments, ended, here, torchrun
from test_trainer_shard import SPLIT, UNEVEN, alone, assert_close, sharded
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tightfit.errors import CannotSave, CheckpointError, DoesNotFit
from tightfit.models.model import GPT, GPTConfig
from tightfit.models.optimizer import build_optimizer, plain_state
from tightfit.storage import BEST, LAST, MARKER
from tightfit.trainer.checkpoint import Checkpoint, set_aside
from tightfit.trainer.checkpoint import save as save_file
from tightfit.trainer.distributed import World
from tightfit.trainer.parts import Marker, in_memory, save_parts
from tightfit.trainer.stored import load, load_best, load_newest, rename_damaged

SHAPE = GPTConfig(block_size=4, vocab_size=8, n_layer=1, n_head=1, n_embd=4)


def state(step: int) -> Checkpoint:
    torch.manual_seed(step)
    model = GPT(SHAPE)
    optimizer = build_optimizer(model.parameters(), weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95))
    return Checkpoint(
        model_config=SHAPE,
        model=model.state_dict(),
        optimizer=plain_state(optimizer),
        step=step,
        best_val_loss=float("inf"),
        data={"train": "digest"},
    )


def saved(folder: Path, step: int, *, name: str = BEST, is_last: bool = False) -> Checkpoint:
    content = state(step)
    save_parts(folder, content, World(), name=name, is_last=is_last)
    return content


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.step == other.step
    assert one.best_val_loss == other.best_val_loss
    assert one.data == other.data
    for name, tensor in one.model.items():
        assert torch.equal(tensor, other.model[name]), name
    first, second = (each.optimizer or {} for each in (one, other))
    assert first["param_groups"][0]["params"] == second["param_groups"][0]["params"]  # type: ignore[index]
    for number, values in first["state"].items():  # type: ignore[attr-defined]
        for key, value in values.items():
            assert torch.equal(value, second["state"][number][key])  # type: ignore[index]


@pytest.fixture
def log() -> list[str]:
    return []


class TestFolder:
    def test_the_state_comes_back_and_the_one_before_is_kept(self, tmp_path: Path) -> None:
        first, second = saved(tmp_path, 1), saved(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.dcp", "ckpt.prev.dcp"]
        assert_same(load(tmp_path / "ckpt.dcp"), second)
        assert_same(in_memory(load(tmp_path / "ckpt.prev.dcp")), first)

    def test_a_checkpoint_replaces_older_resume_points_of_both_kinds(self, tmp_path: Path) -> None:
        save_file(tmp_path, state(1), name=LAST)
        saved(tmp_path, 2, name=LAST)
        saved(tmp_path, 3)
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.dcp"]
        save_file(tmp_path, state(4))
        save_file(tmp_path, state(5))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.prev.pt", "ckpt.pt"]

    def test_the_newest_of_both_kinds_is_read(self, tmp_path: Path, log: list[str]) -> None:
        save_file(tmp_path, state(3))
        saved(tmp_path, 2)
        assert load_newest(tmp_path, log=log.append).step == 3
        saved(tmp_path, 4)
        assert load_newest(tmp_path, log=log.append).step == 4
        assert load_best(tmp_path, log=log.append).step == 4
        assert not log


class TestDamage:
    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", MARKER])
    def test_cut_altered_or_missing_parts_are_found(self, tmp_path: Path, log: list[str], name: str) -> None:
        saved(tmp_path, 1)
        saved(tmp_path, 2)
        path = tmp_path / "ckpt.dcp" / name
        whole = path.read_bytes()
        for number in range(4):
            at = len(whole) * number // 4
            for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], None):
                path.unlink(missing_ok=True)
                if broken is not None:
                    path.write_bytes(broken)
                os.utime(tmp_path / "ckpt.dcp")
                assert load_newest(tmp_path, log=log.append).step == 1
        assert any("ckpt.dcp is incomplete, cut or damaged; using" in line for line in log)

    def test_a_kill_between_the_renames_loses_nothing(self, tmp_path: Path, log: list[str]) -> None:
        saved(tmp_path, 1)
        second = saved(tmp_path, 2)
        (tmp_path / "ckpt.dcp").rename(tmp_path / ".ckpt.dcp.writing")
        assert_same(load_newest(tmp_path, log=log.append), second)
        saved(tmp_path, 3)
        assert load(tmp_path / "ckpt.prev.dcp").step == 2
        assert load(tmp_path / "ckpt.dcp").step == 3

    def test_a_kill_before_the_renames_loses_nothing(
        self, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even if the next save fails at once: the complete folder is put in its place first."""
        saved(tmp_path / "other", 2)
        saved(tmp_path, 1)
        (tmp_path / "other" / "ckpt.dcp").rename(tmp_path / ".ckpt.dcp.writing")
        assert load_newest(tmp_path, log=log.append).step == 2

        def write(*_: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(FileSystemWriter, "write_data", write)
        with pytest.raises(CannotSave):
            saved(tmp_path, 3)
        assert load(tmp_path / "ckpt.dcp").step == 2
        assert load(tmp_path / "ckpt.prev.dcp").step == 1

    def test_a_new_run_puts_all_of_it_aside(self, tmp_path: Path, log: list[str]) -> None:
        saved(tmp_path, 1)
        saved(tmp_path, 2, name=LAST)
        (tmp_path / "last.dcp").rename(tmp_path / ".last.dcp.writing")
        set_aside(tmp_path, log=log.append)
        assert [path.name for path in tmp_path.iterdir()] == ["previous"]
        assert load_newest(tmp_path / "previous", log=log.append).step == 2

    def test_a_kill_while_parts_are_written_leaves_the_one_before(self, tmp_path: Path, log: list[str]) -> None:
        saved(tmp_path, 1)
        shutil.copytree(tmp_path / "ckpt.dcp", tmp_path / ".ckpt.dcp.writing")
        (tmp_path / ".ckpt.dcp.writing" / MARKER).unlink()
        assert load_newest(tmp_path, log=log.append).step == 1
        saved(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.dcp", "ckpt.prev.dcp"]

    def test_nothing_in_an_index_is_executed(self, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "executed"),)

        saved(tmp_path, 1)
        folder = tmp_path / "ckpt.dcp"
        (folder / ".metadata").write_bytes(data := pickle.dumps(Hostile()))
        marker = msgspec.json.decode((folder / MARKER).read_bytes(), type=Marker)
        part = msgspec.structs.replace(marker.parts[".metadata"], size_bytes=len(data), crc32=zlib.crc32(data))
        forged = msgspec.structs.replace(marker, parts={**marker.parts, ".metadata": part})
        (folder / MARKER).write_bytes(msgspec.json.encode(forged.sealed()))
        with pytest.raises(CheckpointError, match=r"ckpt\.dcp is incomplete, cut or damaged"):
            load(folder)
        assert not (tmp_path / "executed").exists()


class TestDisk:
    @pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DoesNotFit), (errno.EIO, CannotSave)])
    def test_a_failed_save_leaves_the_last_good_one_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
    ) -> None:
        first = saved(tmp_path, 1)

        def write(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(FileSystemWriter, "write_data", write)
            with pytest.raises(error, match=r"ckpt\.dcp could not be written"):
                saved(tmp_path, 2)
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.dcp"]
        assert_same(load(tmp_path / "ckpt.dcp"), first)

    def test_a_damaged_one_is_given_up_for_room_and_not_the_one_before(
        self, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = saved(tmp_path, 1)
        saved(tmp_path, 2)
        os.truncate(tmp_path / "ckpt.dcp" / "__0_0.distcp", 100)
        rename_damaged(tmp_path, log=log.append)
        assert log == [f"{tmp_path / 'ckpt.dcp'} is now called ckpt.dcp.damaged"]
        (tmp_path / "last.pt.damaged").write_bytes(b"of the run when it had one process")

        def write(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(FileSystemWriter, "write_data", write)
        with pytest.raises(DoesNotFit):
            saved(tmp_path, 3, is_last=True)
        assert_same(load_newest(tmp_path, log=pytest.fail), first)
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.prev.dcp"]

    def test_the_last_save_gives_up_the_one_before_for_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        saved(tmp_path, 1)
        saved(tmp_path, 2)
        usual = FileSystemWriter.write_data

        def write(*given: Any) -> Any:
            if (tmp_path / "ckpt.prev.dcp").exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return usual(*given)

        monkeypatch.setattr(FileSystemWriter, "write_data", write)
        saved(tmp_path, 3, is_last=True)
        assert load(tmp_path / "ckpt.dcp").step == 3
        assert load(tmp_path / "ckpt.prev.dcp").step == 2


class TestConvert:
    def test_a_checkpoint_file_and_a_hugging_face_folder(self, tmp_path: Path) -> None:
        content = saved(tmp_path, 7)
        for target in ("one/ckpt.pt", "hugging"):
            done = here(["convert", tmp_path / "ckpt.dcp", tmp_path / target])
            assert done.code == 0, done.err
        assert_same(load(tmp_path / "one" / "ckpt.pt"), content)
        done = here(["convert", tmp_path / "hugging", tmp_path / "two.pt"])
        assert done.code == 0, done.err
        assert_same(replace(load(tmp_path / "two.pt"), optimizer=content.optimizer, step=7, data=content.data), content)


@pytest.mark.slow
class TestRuns:
    def test_an_error_within_an_exchange_ends_both(self, tmp_path: Path, data_dir: Path) -> None:
        """The other one already waits for what this one cannot send: going back would hang them."""
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            import os, sys
            from torch import distributed
            from tightfit.cli.main import main
            from tightfit.trainer import parts

            usual = distributed.all_gather_object

            def fails(found, value, **options):
                if os.environ["RANK"] == "1" and isinstance(value, dict) and "__1_0.distcp" in value:
                    raise RuntimeError("CUDA out of memory. Tried to allocate 2 bytes")
                usual(found, value, **options)

            distributed.all_gather_object = fails
            sys.exit(main())
            """)
        )
        keys = UNEVEN | SPLIT | {"shard": "full", "fit": "off"}
        done = ended(torchrun(2, [str(program), *arguments(tmp_path / "out", data_dir, **keys)]))
        assert done.code != 0
        assert "the processes could not save together (CUDA out of memory. Tried to allocate 2 bytes)" in done.err
        assert "step 6: train loss" in done.out

    @pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
    def test_torchrun_restarts_a_run_where_it_was(self, tmp_path: Path, data_dir: Path, how: str) -> None:
        """One process is lost at step 8: the other notices and ends, and torchrun starts both again.

        Of a process that only stops nothing arrives: the watchdog ends the wait, here after 5 s, and names it.
        """
        program = tmp_path / "program.py"
        program.write_text(
            textwrap.dedent("""\
            import os, signal, sys
            from tightfit.cli.main import main
            from tightfit.trainer import loop, watchdog

            watchdog.LEAST_S = watchdog.FIRST_S = 5.0
            usual = loop._Run._train_step

            def step(run):
                if run.step == 8 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                    os.kill(os.getpid(), signal.HOW)
                return usual(run)

            loop._Run._train_step = step
            sys.exit(main())
            """).replace("HOW", how)
        )
        keys = UNEVEN | SPLIT | {"max_iters": 12, "lr_decay_iters": 12}
        out_dir = tmp_path / "out"
        words = ["--max-restarts=1", str(program), *arguments(out_dir, data_dir, **keys, shard="full")]
        done = ended(torchrun(2, words))
        assert done.code == 0, done.err
        assert f"torchrun started this run's processes again: resuming it from {out_dir}" in done.out
        assert f"resuming {out_dir}/ckpt.dcp at step 6" in done.out
        if how == "SIGSTOP":
            assert re.search(r"step 8 has taken \d+ s and hangs", done.out)
            assert f"no sign of life from process 1 on {socket.gethostname()}; all processes end" in done.err
        assert_close(alone(tmp_path / "one", data_dir, **keys), out_dir)

    def test_resumed_by_as_many_bit_for_bit(self, tmp_path: Path, data_dir: Path) -> None:
        keys = UNEVEN | SPLIT | {"max_iters": 12, "lr_decay_iters": 12}
        run, unbroken = tmp_path / "run", tmp_path / "unbroken"
        assert sharded(2, unbroken, data_dir, **keys).code == 0
        assert sharded(2, run, data_dir, **keys | {"max_iters": 6}).code == 0
        done = sharded(2, run, data_dir, **keys, init_from="resume")
        assert done.code == 0, done.err
        assert_same(in_memory(load(run / "ckpt.dcp")), load(unbroken / "ckpt.dcp"))

    def test_resumed_by_other_numbers_of_processes(self, tmp_path: Path, data_dir: Path) -> None:
        """2, then 4, then 1, then 2 processes; one alone writes a file, several a folder."""
        keys = UNEVEN | SPLIT | {"max_iters": 24, "lr_decay_iters": 24}
        expected, run = alone(tmp_path / "one", data_dir, **keys), tmp_path / "run"
        assert sharded(2, run, data_dir, **keys | {"max_iters": 6}).code == 0
        assert sharded(4, run, data_dir, **keys | {"max_iters": 12}, init_from="resume").code == 0
        done = here(arguments(run, data_dir, **keys | {"max_iters": 18}, init_from="resume"))
        assert done.code == 0, done.err
        done = sharded(2, run, data_dir, **keys, init_from="resume")
        assert done.code == 0, done.err
        assert_close(expected, run)
