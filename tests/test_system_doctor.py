"""doctor: host memory under every kind of limit, NVML's answers of several machines, every finding in two languages."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import msgspec
import pytest
from fake_nvml import MIB, Card, FakeMachine, Process
from rich.cells import cell_len
from rich.console import Console
from runs import environment, here, process

import tightfit.system
from tightfit.allocator.settings import VARIABLES, AllocatorSettings
from tightfit.config import TrainConfig
from tightfit.errors import ConfigError
from tightfit.system import nvml
from tightfit.system.checks import Check
from tightfit.system.checks_gpu import table_entry
from tightfit.system.checks_host import ALLOCATOR_KEYS
from tightfit.system.checks_run import known_parameters
from tightfit.system.doctor import diagnose, diagnosis, has_problem, print_table
from tightfit.system.machine import Compilers, Machine, Space, gpu_vendors, read_machine, space
from tightfit.system.memory_limits import HostMemory, Limit, host_memory, own_bytes
from tightfit.system.nvml import Cards, Failure, GpuMemory, NvmlSession, gpu_memory, read_cards
from tightfit.system.torch_build import TorchBuild, TorchDevice, read_torch
from tightfit.system.wrapping import wrap
from tightfit.units import GIB
from tightfit.wording.system import LANGUAGES, words

TREES: dict[str, dict[str, str]] = {
    "v2, the group and the one above it": {
        "proc/self/cgroup": "0::/user.slice/job.scope\n",
        "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/user.slice/memory.max": "8589934592\n",
        "sys/fs/cgroup/user.slice/memory.current": "3221225472\n",
        "sys/fs/cgroup/user.slice/memory.stat": "anon 5\nactive_file 536870912\ninactive_file 536870912\n",
        "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
        "sys/fs/cgroup/user.slice/job.scope/memory.current": "1073741824\n",
    },
    "v1 in a container that sees the machine's path": {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n0::/\n",
        "proc/self/mountinfo": "35 31 0:32 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "8589934592\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3221225472\n",
        "sys/fs/cgroup/memory/memory.stat": "active_file 1\ntotal_active_file 536870912\n"
        "total_inactive_file 536870912\n",
    },
    "v2 in a container with its own root": {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "31 23 0:28 /../../docker/1 /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.high": "8589934592\n",
        "sys/fs/cgroup/memory.current": "2147483648\n",
    },
}


@pytest.fixture
def machine_of_24_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(total=24 * GIB, available=20 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: found)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


class TestHostMemory:
    @pytest.mark.usefixtures("machine_of_24_gib")
    @pytest.mark.parametrize("tree", TREES)
    def test_the_least_that_is_left_is_the_budget(self, tmp_path: Path, tree: str) -> None:
        found = host_memory(plant(tmp_path, TREES[tree]))
        assert (found.total_bytes, found.available_bytes) == (24 * GIB, 20 * GIB)
        assert found.tightest is not None
        assert found.tightest.limit_bytes == 8 * GIB
        assert found.budget_bytes == found.tightest.left_bytes == 6 * GIB  # the file cache counts as free
        assert found.tightest.source.startswith("/sys/fs/cgroup")

    @pytest.mark.usefixtures("machine_of_24_gib")
    def test_no_limit_leaves_what_is_available(self, tmp_path: Path) -> None:
        unlimited = {
            "proc/self/cgroup": "3:memory:/\n",
            "proc/self/mountinfo": "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
        }
        found = host_memory(plant(tmp_path, unlimited))
        assert (found.limits, found.tightest) == ((), None)
        assert found.budget_bytes == 20 * GIB

    def test_this_machine(self) -> None:
        found = host_memory()
        assert 0 < found.used_by_this_process_bytes < found.total_bytes
        assert 0 < found.budget_bytes <= found.available_bytes <= found.total_bytes
        assert own_bytes()["resident"] == pytest.approx(found.used_by_this_process_bytes, rel=0.05)

    @pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
    @pytest.mark.parametrize(("option", "name"), [("-v", "RLIMIT_AS"), ("-d", "RLIMIT_DATA")])
    def test_ulimit_in_a_real_process(self, option: str, name: str) -> None:
        program = (
            "from tightfit.system.memory_limits import host_memory as h; m = h(); "
            "print(m.tightest.source, m.tightest.limit_bytes, m.budget_bytes)"
        )
        shell = f"ulimit {option} 2000000; exec {sys.executable} -c '{program}'"
        done = subprocess.run(["bash", "-c", shell], env=environment(), capture_output=True, text=True, check=True)
        source, limit, budget = done.stdout.split()
        assert (source, int(limit)) == (name, 2_000_000 * 1024)
        assert 0 < int(budget) < int(limit)


def read(monkeypatch: pytest.MonkeyPatch, machine: FakeMachine) -> Cards:
    fake_nvml.install(monkeypatch, machine)
    monkeypatch.setattr(nvml, "spills_to_host", lambda: machine.wsl)
    return read_cards()


class TestNvml:
    def test_a_desktop(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = read(monkeypatch, fake_nvml.rtx3060())
        (card,) = found.cards
        assert (found.driver, found.cuda_version, found.failure) == ("580.95.05", (13, 0), None)
        assert (card.total_bytes, card.reserved_bytes) == (12288 * MIB, 318 * MIB)
        assert card.free_bytes == (12288 - 318 - 600) * MIB
        (xorg,) = card.others or ()
        assert (xorg.name, xorg.pid, xorg.used_bytes, xorg.draws) == ("Xorg", 1432, 600 * MIB, True)
        assert (card.used_by_others_bytes, card.own_bytes) == (600 * MIB, 0)
        assert (card.capability, card.ecc, card.mig, card.spills_to_host) == ((8, 6), None, None, False)
        assert (card.temperature_c, card.utilisation) == (41, 0.03)
        entry = table_entry(card)
        assert entry is not None
        assert (entry.name, entry.sm_count) == ("GeForce RTX 3060 12GB", 28)

    def test_mig(self, monkeypatch: pytest.MonkeyPatch) -> None:
        divided, empty = read(monkeypatch, fake_nvml.two_a100_mig()).cards
        assert [part.free_bytes for part in divided.instances] == [(19968 - 37) * MIB, (19968 - 12000) * MIB]
        assert divided.instances[0].sm_count == 42
        assert (empty.mig, empty.instances) == (True, ())

    def test_an_old_driver_is_asked_in_the_old_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (card,) = read(monkeypatch, fake_nvml.t4()).cards
        assert card.reserved_bytes is None
        assert card.free_bytes == (15109 - 5120) * MIB
        assert [(each.name, each.used_bytes) for each in card.others or ()] == [("python3.11", 5120 * MIB)]

    def test_wsl_keeps_what_processes_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (card,) = read(monkeypatch, fake_nvml.wsl_laptop()).cards
        assert card.spills_to_host
        assert card.used_by_others_bytes == 1300 * MIB
        assert [each.used_bytes for each in card.others or ()] == [None]

    @pytest.mark.parametrize(("make", "kind"), [(fake_nvml.mismatch, "mismatch"), (fake_nvml.no_driver, "no_library")])
    def test_a_failure_is_a_sentence(self, monkeypatch: pytest.MonkeyPatch, make: Any, kind: str) -> None:
        found = read(monkeypatch, make())
        assert found.failure is not None
        assert (found.cards, found.failure.kind) == ((), kind)
        card, why = gpu_memory(0)
        assert card is None
        assert why == found.failure.sentence("en")
        assert found.failure.detail in found.failure.sentence("ja")

    def test_without_the_bindings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        card, why = gpu_memory(0)
        assert card is None
        assert "pip install nvidia-ml-py" in why

    def test_a_card_by_number_and_by_uuid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_nvml.install(monkeypatch, fake_nvml.rtx3060())
        card, why = gpu_memory(0)
        assert card is not None
        assert why == ""
        assert gpu_memory(card.uuid)[0] is not None
        assert gpu_memory(1) == (None, "there is no card 1; NVML has 1")

    def test_this_process_is_no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.rtx3060()
        machine.cards[0].processes.append(Process(os.getpid(), "python", 300))
        (card,) = read(monkeypatch, machine).cards
        assert card.own_bytes == 300 * MIB
        assert card.used_by_others_bytes == 600 * MIB

    def test_a_process_that_computes_and_draws_counts_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.rtx3060()
        both = [Process(7, "blender", 900), Process(7, "blender", 900, graphics=True)]
        machine.cards[0].processes = both
        (card,) = read(monkeypatch, machine).cards
        assert card.used_by_others_bytes == 900 * MIB

    def test_names_cannot_reach_the_terminal_as_control(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.rtx3060()
        machine.cards[0].processes = [Process(7, "/tmp/\x1b[2J[bold]evil", 900)]
        (card,) = read(monkeypatch, machine).cards
        assert [each.name for each in card.others or ()] == ["?[2J[bold]evil"]

    def test_the_fake_answers_what_the_real_library_can_be_asked(self) -> None:
        """By name and by number of arguments; and whatever our reader asks for is in it."""
        import pynvml

        fake = fake_nvml.module(fake_nvml.rtx3060())
        for name, answer in vars(fake).items():
            if callable(answer) and not name.startswith("NVML"):
                asked = list(inspect.signature(getattr(pynvml, name)).parameters.values())
                ours = list(inspect.signature(answer).parameters.values())
                assert len(asked) == len(ours) or ours[-1].kind is ours[-1].VAR_POSITIONAL, name
        tree = ast.parse(Path(nvml.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith(("nvmlDevice", "nvmlSystem", "NVML_")):
                assert hasattr(pynvml, node.attr), node.attr

    def test_a_session_starts_nvml_once_and_again_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = fake_nvml.install(monkeypatch, fake_nvml.rtx3060())
        with NvmlSession() as session:
            assert [len(session.read().cards) for _ in range(3)] == [1, 1, 1]
            assert machine.asked == 1
        machine.init_error = fake_nvml.mismatch().init_error
        with NvmlSession() as session:
            assert session.read().failure
            machine.init_error = None
            assert session.read().cards

    def test_this_machine(self) -> None:
        found = read_cards()
        assert bool(found.cards) != bool(found.failure)


TORCH = TorchBuild(
    version="2.13.0+cu130",
    cuda=(13, 0),
    capabilities=((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)),
    newest_portable=(12, 0),
)
HOST = HostMemory(total_bytes=32 * GIB, available_bytes=24 * GIB, used_by_this_process_bytes=GIB)
COMPILERS = Compilers(c="/usr/bin/gcc", cxx="/usr/bin/g++", triton="3.9.0", python_headers=True)


def sees(card: GpuMemory, sm_count: int = 28) -> TorchDevice:
    return TorchDevice(
        name=card.name, capability=card.capability or (0, 0), sm_count=sm_count, total_bytes=card.total_bytes
    )


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The desktop of the story, everything in order."""
    cards = read(monkeypatch, fake_nvml.rtx3060())
    return Machine(
        cards=cards,
        torch=replace(TORCH, devices=tuple(map(sees, cards.cards))),
        host=HOST,
        compilers=COMPILERS,
        shm=Space(total_bytes=16 * GIB, free_bytes=16 * GIB),
        vendors=frozenset({"nvidia"}),
        environ={},
        platform="linux",
        wsl=False,
    )


def on(monkeypatch: pytest.MonkeyPatch, base: Machine, fake: FakeMachine, torch: TorchBuild = TORCH) -> Machine:
    """Another machine of `fake_nvml`, with a torch that sees its cards."""
    cards = read(monkeypatch, fake)
    devices = tuple(map(sees, cards.cards))
    return replace(base, cards=cards, torch=replace(torch, devices=devices), wsl=fake.wsl)


def outcomes(checks: list[Check]) -> dict[str, str]:
    """`check` or `check card`: outcome and status."""
    return {
        check.name if check.card is None else f"{check.name} {check.card}": f"{check.outcome}: {check.status}"
        for check in checks
    }


def sentence(checks: list[Check], name: str, language: str = "en") -> tuple[str, str]:
    (check,) = [check for check in checks if check.name == name]
    return check.sentence(words(language)), check.next_step(words(language))


class TestMachines:
    def test_a_desktop(self, base: Machine) -> None:
        checks = diagnose(base)
        assert outcomes(checks) == {
            "gpu": "found: ok",
            "driver": "enough: ok",
            "capability": "native: ok",
            "memory": "free_of_usable: ok",
            "processes": "desktop: warning",
            "sms": "few: ok",
            "ecc": "none: ok",
            "spill": "no: ok",
            "torch": "cuda: ok",
            "host": "free: ok",
            "limits": "none: ok",
            "shm": "enough: ok",
            "compile": "ready: ok",
            "allocator": "unset: ok",
            "config": "not_given: unknown",
        }
        assert not has_problem(checks)
        said, step = sentence(checks, "processes")
        assert said == "600.00 MiB in use for the screen: Xorg (pid 1432) 600.00 MiB"
        assert step.startswith("doctor stops nothing")
        assert "Not enough SMs to use max_autotune_gemm mode" in sentence(checks, "sms")[0]
        assert "harmless" in sentence(checks, "sms")[0]

    def test_mig(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = on(monkeypatch, base, fake_nvml.two_a100_mig())
        found = outcomes(diagnose(machine))
        assert found["mig 0"] == "on: warning"
        assert found["mig 1"] == "empty: problem"
        assert found["driver"] == "old: problem"
        assert found["ecc 0"] == "on: ok"
        assert "memory 0" not in found  # no process can use the whole
        (check,) = [check for check in diagnose(machine) if (check.name, check.card) == ("mig", 0)]
        uuid = machine.cards.cards[0].instances[0].uuid
        assert check.next_step(words("en")) == f"choose one: export CUDA_VISIBLE_DEVICES={uuid}"
        chosen = replace(machine, environ={"CUDA_VISIBLE_DEVICES": uuid})
        assert outcomes(diagnose(chosen))["mig 0"] == "chosen: ok"

    def test_a_cloud_t4_with_an_old_driver(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = on(monkeypatch, base, fake_nvml.t4())
        checks = diagnose(machine, TrainConfig(dtype="bfloat16"), prepares_itself=("openwebtext",))
        found = outcomes(checks)
        assert found["driver"] == "too_old: problem"
        assert "580.65.06" in sentence(checks, "driver")[1]
        assert found["capability"] == "emulated: warning"
        assert "--dtype=float16" in sentence(checks, "capability")[1]
        assert outcomes(diagnose(machine, TrainConfig(dtype="auto")))["capability"] == "half: ok"
        assert sentence(checks, "processes") == (
            "5.00 GiB in use: python3.11 (pid 4242) 5.00 GiB",
            "doctor stops nothing; if they are yours and not needed: kill 4242",
        )

    def test_v100_and_a_torch_without_code_for_it(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        v100 = FakeMachine(cards=[Card("Tesla V100-SXM2-16GB", 16384, 225, (7, 0), ecc=True)])
        machine = on(monkeypatch, base, v100)
        assert outcomes(diagnose(machine))["capability"] == "no_code: problem"
        with_code = on(monkeypatch, base, v100, replace(TORCH, capabilities=((7, 0), (8, 0))))
        assert outcomes(diagnose(with_code, TrainConfig(dtype="bfloat16")))["capability"] == "emulated: warning"

    def test_a_laptop_under_wsl(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        checks = diagnose(on(monkeypatch, base, fake_nvml.wsl_laptop()))
        found = outcomes(checks)
        assert found["spill"] == "wsl: warning"
        assert found["processes"] == "some_unmeasured: unknown"
        assert sentence(checks, "processes")[0] == "? (pid 31), memory unknown"

    def test_a_driver_of_another_version_than_its_library(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = replace(base, cards=read(monkeypatch, fake_nvml.mismatch()), torch=TORCH)
        checks = diagnose(machine)
        assert outcomes(checks)["gpu"] == "broken: problem"
        assert "RM has detected an NVML/RM version mismatch" in sentence(checks, "gpu")[0]
        assert "restart the machine" in sentence(checks, "gpu")[1]

    def test_no_gpu_is_a_problem_only_where_one_is_asked_for(self, base: Machine) -> None:
        cpu = TorchBuild(version="2.13.0+cpu")
        missing = Cards(failure=Failure("no_library", "NVML Shared Library Not Found"))
        machine = replace(base, cards=missing, torch=cpu, vendors=frozenset())
        assert outcomes(diagnose(machine))["gpu"] == "none: warning"
        assert outcomes(diagnose(machine, TrainConfig(device="cuda")))["gpu"] == "none_but_asked: problem"

    def test_two_cards_have_their_numbers(self, base: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = fake_nvml.rtx3060()
        fake.cards *= 2
        checks = diagnose(on(monkeypatch, base, fake))
        assert {check.card for check in checks if check.name == "memory"} == {0, 1}
        assert sentence(checks, "gpu")[0] == "2 x NVIDIA GeForce RTX 3060"

    def test_this_machine(self) -> None:
        checks = diagnose(read_machine())
        names = {check.name for check in checks}
        assert {"gpu", "torch", "host", "limits", "shm", "compile", "allocator", "config"} <= names
        found = read_torch()
        assert found is not None
        assert not [check for check in checks if (check.name, check.status) == ("torch", "problem")]

    def test_a_torch_that_uses_no_gpu_is_read_without_its_import(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError")
        written = "__version__ = '2.12.1+cpu'\ndebug = False\ncuda: Optional[str] = None\nhip = None\n"
        (tmp_path / "torch" / "version.py").write_text(written)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        assert read_torch() == TorchBuild(version="2.12.1+cpu")


class TestAllocatorVariables:
    def found(self, base: Machine, **environ: str) -> list[str]:
        checks = diagnose(replace(base, environ=environ))
        return [f"{check.outcome}: {check.status}" for check in checks if check.name == "allocator"]

    @pytest.mark.parametrize("variable", VARIABLES)
    def test_old_and_new_names(self, base: Machine, variable: str) -> None:
        assert self.found(base, **{variable: "expandable_segments:True"}) == ["set: ok"]

    def test_misspelt_key_with_the_nearest(self, base: Machine) -> None:
        environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segment:True"}
        checks = diagnose(replace(base, environ=environ))
        assert sentence(checks, "allocator") == (
            "PYTORCH_CUDA_ALLOC_CONF: PyTorch does not know the key 'expandable_segment' and fails when it first uses "
            "the card",
            "did you mean expandable_segments?",
        )
        assert has_problem(checks)

    @pytest.mark.parametrize(
        ("environ", "expected"),
        [
            ({"PYTORCH_ALLOC_CONF": "zzz:1"}, ["unknown_key: problem"]),
            ({"PYTORCH_CUDA_ALOC_CONF": "a:1"}, ["misspelt_variable: warning", "unset: ok"]),
            ({"PYTORCH_ALLOC_CONFIG": "a:1"}, ["misspelt_variable: warning", "unset: ok"]),
            ({"PYTORCH_ALLOC_CONF": "expandable_segments:yes"}, ["refused: problem"]),
            ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, ["async: warning"]),
            (
                {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync,max_split_size_mb:128"},
                ["async_with_native: warning"],
            ),
            ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}, ["threshold_alone: warning"]),
            (
                {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128,max_split_size_mb:256"},
                ["twice: warning"],
            ),
            (
                {
                    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128",
                    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
                },
                ["contradiction: warning", "set: ok"],
            ),
            ({"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2,>:4]"}, ["set: ok"]),
        ],
    )
    def test_others(self, base: Machine, environ: dict[str, str], expected: list[str]) -> None:
        assert self.found(base, **environ) == expected

    def test_a_wrong_key_cannot_fail_where_there_is_no_card(self, base: Machine) -> None:
        machine = replace(base, cards=Cards(), torch=TorchBuild(version="2.13.0+cpu"))
        assert self.found(machine, PYTORCH_ALLOC_CONF="zzz:1") == ["unknown_key: warning"]

    def test_the_first_of_two_counts_as_in_pytorch(self, base: Machine) -> None:
        environ = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
        checks = diagnose(replace(base, environ=environ))
        contradiction = next(check for check in checks if check.outcome == "contradiction")
        used = AllocatorSettings.from_environment(environ).max_split_size // MIB
        assert f"max_split_size_mb:{used} is used" in contradiction.sentence(words("en"))

    def test_its_keys_are_those_of_the_virtual_gpu(self) -> None:
        for key in ALLOCATOR_KEYS:
            try:
                AllocatorSettings.parse(f"{key}:zzz")
            except ConfigError as error:
                assert "is not a key of PyTorch" not in str(error), key  # noqa: PT017
        with pytest.raises(ConfigError, match="is not a key") as refused:
            AllocatorSettings.parse("zzz:1")
        known = str(refused.value).partition("known: ")[2].split(", ")
        assert set(known) <= ALLOCATOR_KEYS


@pytest.fixture
def tiny(data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """Keys of a run that is in order."""
    return {
        "data_dir": str(data_dir), "dataset": "tiny", "out_dir": str(tmp_path / "out"), "block_size": 16,
        "n_layer": 2, "n_head": 2, "n_embd": 32, "max_iters": 100, "warmup_iters": 10, "lr_decay_iters": 100,
    }  # fmt: skip


class TestRun:
    def found(self, machine: Machine, **keys: Any) -> list[str]:
        """Outcomes of the checks of a run."""
        checks = diagnose(machine, TrainConfig(**keys), prepares_itself=("stdlib",))
        return [f"{c.name} {c.outcome}: {c.status}" for c in checks if c.name in ("dataset", "disk", "config")]

    def test_in_order(self, base: Machine, tiny: dict[str, Any]) -> None:
        assert self.found(base, **tiny) == ["dataset good: ok", "disk enough: ok", "config sane: ok"]
        checks = diagnose(base, TrainConfig(**tiny))
        said = sentence(checks, "dataset")[0]
        passes = 12 * 40 * 16 * 100 / 4000
        assert "4,000 training tokens, 600 validation tokens, vocabulary 64" in said
        assert f"the run reads it {passes:.2f} times" in said

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"dataset": "nowhere"}, "dataset broken: problem"),
            ({"dataset": "stdlib"}, "dataset made_by_train: ok"),
            ({"block_size": 600}, "dataset broken: problem"),
            ({"vocab_size": 10}, "dataset broken: problem"),
            ({"device": "cuda:3"}, "config no_such_card: problem"),
            ({"device": "mps"}, "config no_mps: problem"),
            ({"n_embd": 36, "n_head": 3}, "config narrow_heads: warning"),
            ({"warmup_iters": 2000}, "config only_warmup: warning"),
            ({"min_lr": 1.0}, "config rising_rate: warning"),
            ({"init_from": "resume"}, "config sane_size_unknown: ok"),
            ({"init_from": "resume"}, "disk size_unknown: unknown"),
            ({"n_embd": 4096, "n_layer": 6, "n_head": 32, "fit": "off"}, "config too_large: problem"),
            ({"n_embd": 4096, "n_layer": 7, "n_head": 32, "optimizer": "adamw_8bit"}, "config too_large: problem"),
            ({"n_embd": 4096, "n_layer": 12, "n_head": 32, "device": "cpu"}, "config too_large_for_host: problem"),
        ],
    )
    def test_mistakes(self, base: Machine, tiny: dict[str, Any], keys: dict[str, Any], expected: str) -> None:
        assert expected in self.found(base, **tiny | keys)

    @pytest.mark.parametrize(("gib", "outcome"), [(64, "offloads: warning"), (12, "too_large: problem")])
    def test_a_model_for_which_the_host_has_room(
        self, base: Machine, tiny: dict[str, Any], gib: int, outcome: str
    ) -> None:
        """1.2 billion parameters, 18 GiB with their state, on a card of 12 GiB."""
        host = replace(base.host, available_bytes=gib << 30, limits=())
        large = {"n_embd": 4096, "n_layer": 6, "n_head": 32}
        assert f"config {outcome}" in self.found(replace(base, host=host), **tiny | large)

    def test_a_card_that_others_fill(
        self, base: Machine, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = fake_nvml.rtx3060()
        fake.cards[0].processes.append(Process(9, "python", 11000))
        machine = on(monkeypatch, base, fake)
        wide = {"n_embd": 1024, "n_head": 16, "vocab_size": 50304}  # 77M parameters, 1.2 GB with their state
        assert "config too_large_now: problem" in self.found(machine, **tiny | wide)
        assert "config sane: ok" in self.found(base, **tiny | wide)

    def test_a_disk_that_holds_less_than_its_checkpoints(
        self, base: Machine, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        each = 12 * (known_parameters(TrainConfig(**tiny), 64) or 0)
        for free, expected in ((each - 1, "full: problem"), (3 * each - 1, "tight: warning"), (3 * each, "enough: ok")):
            there = Space(total_bytes=GIB, free_bytes=free)
            monkeypatch.setattr("tightfit.system.checks_run.space", lambda _folder, there=there: there)
            assert f"disk {expected}" in self.found(base, **tiny)

    def test_a_folder_that_is_a_file(self, base: Machine, tiny: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "disk not_writable: problem" in self.found(base, **tiny | {"out_dir": str(tmp_path / "file" / "out")})

    @pytest.mark.parametrize("bias", [False, True])
    def test_parameters_are_counted_as_the_model_has_them(self, bias: bool) -> None:
        import torch

        from tightfit.models.model import GPT, GPTConfig

        config = TrainConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=100, bias=bias)
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=100, bias=bias))
        assert known_parameters(config) == sum(p.numel() for p in model.parameters())
        assert known_parameters(TrainConfig(init_from="gpt2")) == 124_439_808


def every_finding(base: Machine, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]) -> Iterator[Check]:
    """Checks of many machines, one fact changed at a time."""
    (card,) = base.cards.cards
    (xorg,) = card.others or ()
    cpu = TorchBuild(version="2.13.0+cpu")
    none = Cards(failure=Failure("no_library", "NVML Shared Library Not Found"))
    rocm = replace(TORCH, cuda=None, hip="6.4", devices=(sees(card),))
    run = TrainConfig(**tiny)

    def cards(**changes: Any) -> Machine:
        return replace(base, cards=replace(base.cards, cards=(replace(card, **changes),)))

    def torch(**changes: Any) -> Machine:
        return replace(base, torch=replace(TORCH, devices=(sees(card),), **changes))

    def driver(version: tuple[int, int] | None, **changes: Any) -> Machine:
        return replace(base, cards=replace(base.cards, cuda_version=version), **changes)

    def host(**changes: Any) -> Machine:
        return replace(base, host=replace(HOST, **changes))

    small = Space(total_bytes=64 * MIB, free_bytes=64 * MIB)
    two = replace(base, cards=replace(base.cards, cards=(card, replace(card, index=1))))
    space_limit = (Limit(source="RLIMIT_AS", limit_bytes=64 * GIB, used_bytes=GIB),)
    tight_limit = (Limit(source="RLIMIT_DATA", limit_bytes=2 * GIB, used_bytes=GIB),)
    python = replace(xorg, name="python", draws=False)
    machines = [
        base,
        replace(base, environ={"CUDA_VISIBLE_DEVICES": "-1"}),
        replace(base, torch=TORCH),
        replace(base, torch=replace(TORCH, complaint="the driver is too old")),
        replace(base, torch=None),
        replace(base, cards=none),
        replace(base, cards=none, torch=TORCH),
        replace(base, cards=none, torch=cpu, vendors=frozenset()),
        replace(base, cards=Cards(), torch=cpu, vendors=frozenset()),
        replace(base, cards=none, torch=cpu, vendors=frozenset({"amd"})),
        replace(base, cards=none, torch=cpu, vendors=frozenset({"apple"})),
        replace(base, cards=none, torch=rocm, vendors=frozenset({"amd"})),
        replace(base, cards=none, torch=cpu, vendors=frozenset(), compilers=replace(COMPILERS, cxx=None)),
        *(
            replace(base, cards=Cards(failure=Failure(kind, "detail")), torch=TORCH)
            for kind in ("no_bindings", "no_library", "no_driver", "mismatch", "not_allowed", "lost", "other")
        ),
        torch(version="2.10.1"),
        torch(version="2.16.0"),
        torch(cuda=None),
        torch(capabilities=((9, 0),), newest_portable=None),
        *(driver(version) for version in (None, (12, 8), (11, 4), (13, 0))),
        *(driver(version, platform="win32") for version in ((12, 8), (11, 4))),
        torch(cuda=(13, 1)),
        driver((13, 0), torch=cpu),
        cards(capability=None),
        cards(capability=(7, 5)),
        replace(cards(capability=(6, 1)), torch=replace(TORCH, capabilities=((6, 0),), devices=(sees(card),))),
        cards(reserved_bytes=None, others=None),
        cards(others=(), free_bytes=card.total_bytes - (card.reserved_bytes or 0)),
        cards(others=()),
        cards(others=(replace(xorg, used_bytes=100 * MIB),), free_bytes=card.free_bytes + 500 * MIB),
        cards(others=(python, xorg)),
        cards(others=(replace(xorg, used_bytes=None), python)),
        cards(spills_to_host=True),
        cards(name="A card of tomorrow", ecc=False),
        replace(cards(spills_to_host=True), wsl=True),
        cards(ecc=True, ecc_errors=2),
        cards(ecc=True),
        replace(base, torch=replace(TORCH, devices=(sees(card, 132),))),
        on(monkeypatch, base, fake_nvml.two_a100_mig()),
        replace(on(monkeypatch, base, fake_nvml.two_a100_mig()), environ={"CUDA_VISIBLE_DEVICES": "MIG-1"}),
        host(available_bytes=GIB),
        host(limits=space_limit),
        host(limits=tight_limit),
        replace(base, platform="win32"),
        replace(base, shm=None),
        replace(two, shm=small),
        *(
            replace(base, compilers=replace(COMPILERS, **{field: value}))
            for field, value in (("triton", None), ("c", None), ("python_headers", False))
        ),
        *(
            replace(base, environ={"PYTORCH_ALLOC_CONF": value})
            for value in (
                "max_split_size_mb:128", "zzz:1", "max_split_size:128", "backend:cudaMallocAsync", "backend:zzz",
                "backend:cudaMallocAsync,max_split_size_mb:64", "garbage_collection_threshold:0.8",
                "max_split_size_mb:64,max_split_size_mb:128",
            )
        ),
        replace(base, environ={"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, platform="win32"),
        replace(base, environ={"PYTORCH_CUDA_ALOC_CONF": "1"}),
        replace(base, environ=dict.fromkeys(VARIABLES, "a:1") | {VARIABLES[0]: "backend:native"}),
    ]  # fmt: skip
    for machine in machines:
        yield from diagnose(machine)
    for changes in (
        {}, {"dataset": "nowhere"}, {"dataset": "stdlib"}, {"device": "cuda:3"}, {"device": "mps"}, {"compile": False},
        {"n_embd": 36, "n_head": 3}, {"warmup_iters": 2000}, {"min_lr": 1.0}, {"init_from": "resume"},
        {"dtype": "bfloat16"}, {"n_embd": 4096, "n_layer": 12, "n_head": 32, "device": "cpu"},
        {"n_embd": 4096, "n_layer": 12, "n_head": 32}, {"n_embd": 32768, "n_layer": 48}, {"vocab_size": 10},
    ):  # fmt: skip
        for machine in (
            base,
            cards(capability=(7, 5), free_bytes=MIB),
            host(available_bytes=MIB),
            host(available_bytes=64 * GIB),
        ):
            yield from diagnose(machine, replace(run, **changes), prepares_itself=("stdlib",))
    checkpoint = 12 * (known_parameters(run, 64) or 0)
    for free in (1, 2 * checkpoint, 10 * GIB):
        there = Space(total_bytes=GIB, free_bytes=free)
        monkeypatch.setattr("tightfit.system.checks_run.space", lambda _folder, there=there: there)
        yield from diagnose(base, run)
    yield from diagnose(base, replace(run, out_dir="/dev/null/out"))
    yield from diagnose(replace(base, cards=none, torch=cpu, vendors=frozenset()), replace(run, device="cuda"))
    monkeypatch.setattr("tightfit.data.tokenfile.read_meta", lambda _folder: None)
    yield from diagnose(base, run)


class TestWords:
    def test_both_languages_have_the_same_sentences_with_the_same_fields(self) -> None:
        english, japanese = (dict(words(language).sentences()) for language in LANGUAGES)
        assert english.keys() == japanese.keys()
        for key, fields in english.items():
            assert japanese[key] == fields, key

    def test_japanese_is_japanese(self) -> None:
        said = words("ja")
        for key, _ in said.sentences():
            text = said._tables[key.split(".")[0]][key.split(".")[1]]
            assert not text.endswith(" "), key
            assert "。。" not in text, key

    def test_every_finding_is_said_in_both_and_no_sentence_is_left_over(
        self, base: Machine, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Any]
    ) -> None:
        seen = set()
        for check in every_finding(base, monkeypatch, tiny):
            for language in LANGUAGES:
                assert check.sentence(words(language)).strip()
                assert "{" not in check.sentence(words(language)) + check.next_step(words(language))
            seen |= {f"{check.name}.{check.outcome}", f"{check.name}.{check.outcome}_next", f"{check.name}.title"}
            if check.status == "problem" and check.name != "dataset":  # those errors hold their own next step
                assert check.next_step(words("en")), f"{check.name}.{check.outcome} has no next step"
        parts = ("words.", "nvml.", "watch.")
        every = {key for key, _ in words("en").sentences() if not key.startswith(parts)}
        left = {key for key in every - seen if "_one" not in key}
        assert not left, f"no machine of this test leads to {sorted(left)}"

    def test_another_language_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="--lang must be one of en, ja, got 'fr'"):
            words("fr")


class TestTable:
    @pytest.mark.parametrize("language", LANGUAGES)
    @pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
    def test_no_line_is_wider_than_the_terminal(
        self, base: Machine, tiny: dict[str, Any], language: str, width: int
    ) -> None:
        console = Console(width=width, record=True, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
        with console.file:
            checks = diagnose(base, TrainConfig(**tiny))
            print_table(checks, words(language), console)
        lines = console.export_text().splitlines()
        assert max(map(cell_len, lines)) <= width
        shown = "".join("".join(lines).split())
        assert "RTX3060" in shown
        assert width > 40 or all("".join(check.sentence(words(language)).split()) in shown for check in checks)

    @pytest.mark.parametrize("width", [4, 11, 20, 80])
    @pytest.mark.parametrize("language", LANGUAGES)
    def test_wrapping_keeps_every_word(self, language: str, width: int) -> None:
        said = words(language)
        for table in said._tables.values():
            for text in table.values():
                lines = wrap(text, width)
                assert "".join("".join(lines).split()) == "".join(text.split())
                assert all(cell_len(line) <= width for line in lines), lines

    def test_json_has_the_same_facts(self, base: Machine) -> None:
        checks = diagnose(base)
        found = json.loads(msgspec.json.encode(diagnosis(checks, words("en"))))
        assert [row["sentence"] for row in found["checks"]] == [check.sentence(words("en")) for check in checks]
        (memory,) = [row for row in found["checks"] if row["check"] == "memory"]
        assert memory["facts"]["free_bytes"] == (12288 - 318 - 600) * MIB
        assert found["counts"] == {"problem": 0, "warning": 1, "unknown": 1, "ok": 13}


class TestCommand:
    def test_a_run_in_order(self, tiny: dict[str, Any]) -> None:
        done = here(["doctor", "--device=cpu", *(f"--{key}={value}" for key, value in tiny.items())])
        assert (done.code, done.err) == (0, "")
        assert "4,000 training tokens" in " ".join(done.out.split())

    def test_a_missing_dataset_is_a_problem(self, tmp_path: Path) -> None:
        done = here(["doctor", f"--data_dir={tmp_path}", "--dataset=nowhere", "--json"])
        assert done.code == 1
        (row,) = [row for row in json.loads(done.out)["checks"] if row["check"] == "dataset"]
        assert row["status"] == "problem"
        assert "tightfit prepare nowhere" in row["sentence"]

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--lang=fr"], "--lang must be one of en, ja, got 'fr'"),
            (["--lang"], "--lang needs a value; write --lang=en or ja"),
            (["--batchsize=3"], "--batchsize is not a key; did you mean --batch_size?"),
            (["nowhere.py"], "nowhere.py"),
        ],
    )
    def test_mistakes(self, arguments: list[str], said: str) -> None:
        done = here(["doctor", *arguments])
        assert done.code == 2
        assert said in done.err
        assert done.err.count("\n") == 1

    def test_in_a_real_process(self) -> None:
        done = process(["doctor", "--lang", "ja"])
        assert done.err == ""
        assert "torch" in done.out

    def test_where_nvml_cannot_be_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pynvml", None)
        done = here(["doctor"])
        assert "nvidia-ml-py" in done.out
        assert done.err == ""

    def test_help_shows_an_example(self) -> None:
        assert "example: tightfit doctor" in here(["doctor", "--help"]).out


class TestManners:
    def test_nothing_here_ends_a_process_or_starts_one(self) -> None:
        folder = Path(tightfit.system.__file__).parent
        for path in folder.glob("*.py"):
            tree = ast.parse(path.read_text())
            called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not called & {"kill", "killpg", "terminate", "system", "popen", "Popen", "check_output"}, path
            assert "subprocess" not in path.read_text(), path

    def test_importing_asks_nothing(self) -> None:
        program = (
            "import sys, tightfit.system, tightfit.system.doctor, tightfit.system.watch; "
            "assert not {'torch', 'pynvml'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], env=environment(), check=True, timeout=60)

    def test_cards_on_the_bus(self, tmp_path: Path) -> None:
        nvidia = {"sys/bus/pci/devices/0/class": "0x030000\n", "sys/bus/pci/devices/0/vendor": "0x10de\n"}
        sound = {"sys/bus/pci/devices/1/class": "0x040300\n", "sys/bus/pci/devices/1/vendor": "0x1002\n"}
        assert gpu_vendors(plant(tmp_path, nvidia | sound)) == {"nvidia"}

    def test_space_of_a_folder_yet_to_be_made(self, tmp_path: Path) -> None:
        found, own = space(tmp_path / "a" / "b"), space(tmp_path)
        assert found is not None
        assert own is not None
        assert found.total_bytes == own.total_bytes
