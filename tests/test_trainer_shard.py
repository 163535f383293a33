"""Models spread over processes with FSDP2: real torchrun runs on gloo give the losses of one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import MESSAGE
from runs import Done, arguments, assert_close, ended, here, torchrun
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.config import TrainConfig
from tightfit.errors import ConfigError
from tightfit.models.model import GPT, GPTConfig
from tightfit.trainer import loop
from tightfit.trainer.distributed import World
from tightfit.trainer.hardware import Hardware
from tightfit.trainer.setup import build_shards
from tightfit.trainer.sharding import Shards, shard_mesh

CPU = torch.device("cpu")

UNEVEN = {"n_embd": 30, "block_size": 3, "bias": True, "batch_size": 7, "gradient_accumulation_steps": 2}
"""No axis divides by the processes, one has fewer rows than there are processes, and so do shares of a step."""
SPLIT = {"micro_batch": 2, "eval_interval": 6, "eval_iters": 3}


def sharded(processes: int, out_dir: Path, data_dir: Path, **keys: object) -> Done:
    return ended(torchrun(processes, ["-m", "tightfit", *arguments(out_dir, data_dir, **{"shard": "full"} | keys)]))


def alone(out_dir: Path, data_dir: Path, **keys: object) -> Path:
    done = here(arguments(out_dir, data_dir, **keys))
    assert done.code == 0, done.err
    return out_dir


class TestLosses:
    def test_two_processes_as_one(self, tmp_path: Path, data_dir: Path) -> None:
        """With accumulation in 4 passes each, recomputed blocks, a chunked loss and a sample at the end."""
        keys = UNEVEN | SPLIT | {"max_iters": 5, "lr_decay_iters": 5}
        own = {"activation_checkpointing": 1, "loss": "chunked", "sample_at_end": 4}
        done = sharded(2, tmp_path / "two", data_dir, **keys, **own)
        assert done.code == 0, done.err
        assert_close(alone(tmp_path / "one", data_dir, **keys), tmp_path / "two")
        assert "as 4 x 2 sequences of 3 on each of 2 processes" in done.out

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("processes", "shard", "checkpointing"),
        [
            (2, "full", 0),
            (2, "full", 2),
            (4, "full", 0),
            (4, "full", 2),
            (3, "full", 1),
            (2, "optimizer", 1),
            (4, "hybrid", 1),
            (2, "auto", 0),
        ],
    )
    def test_fifty_steps(self, tmp_path: Path, data_dir: Path, processes: int, shard: str, checkpointing: int) -> None:
        keys = UNEVEN | SPLIT | {"max_iters": 50, "lr_decay_iters": 50}
        own = {"shard": shard, "shard_size": 2 if shard == "hybrid" else 0, "activation_checkpointing": checkpointing}
        done = sharded(processes, tmp_path / "many", data_dir, **keys, **own)
        assert done.code == 0, done.err
        assert_close(alone(tmp_path / "one", data_dir, **keys), tmp_path / "many")


class TestRefused:
    def test_without_torchrun(self, tmp_path: Path, data_dir: Path) -> None:
        done = here(arguments(tmp_path / "out", data_dir, shard="full"))
        assert done.code == 2
        assert "shard=full spreads the model over several processes, but this run has one; start it with torchrun" in (
            done.err
        )
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()

    def test_copies_that_do_not_divide_the_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "0")
        sentence = (
            "shard=hybrid with 2 processes to a copy of the model needs a multiple of 2 processes, but this run has 3"
        )
        with pytest.raises(ConfigError, match=sentence):
            loop._refuse(TrainConfig(shard="hybrid", shard_size=2), World(0, 3))

    def test_a_plan(self) -> None:
        done = here(["plan", "--gpu=RTX 4090", "--shard=full"])
        assert done.code == 2
        assert "shard=full spreads a model over several cards; name how many, such as --cards=4" in done.err

    @pytest.mark.parametrize(
        ("key", "value", "sentence"),
        [
            ("offload", "optimizer", "shard=full and offload=optimizer do not work together; set one of them to none"),
            ("optimizer", "adamw_8bit", "shard=full works with optimizer=adamw only, got adamw_8bit"),
            ("mode", "reduce-overhead", "shard=full cannot be recorded in CUDA graphs, which mode=reduce-overhead"),
            ("shard", "half", "shard must be one of none, optimizer, full, hybrid, auto"),
            ("shard_size", 2, "shard_size=2 is for shard=hybrid, but this run has shard=full"),
        ],
    )
    def test_with_other_keys(self, key: str, value: str | int, sentence: str) -> None:
        keys: dict[str, str | int] = {"shard": "full"} | {key: value}
        with pytest.raises(ConfigError, match=sentence):
            TrainConfig(**keys)  # type: ignore[arg-type]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shards_in(dtype: torch.dtype) -> Shards:
    hardware = Hardware(device=CPU, dtype=dtype, compile=False, reasons=())
    shape = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
    torch.manual_seed(0)
    return build_shards(TrainConfig(shard="full", device="cpu"), shape, None, hardware, shard_mesh(World(), CPU, 1))


def run_passes(model: nn.Module, shards: Shards, passes: int = 3) -> None:
    """Add up the gradients of some passes, each of another batch."""
    ids = torch.randint(64, (passes, 4, 17), generator=torch.Generator().manual_seed(1))
    for number in range(passes):
        shards.begin_pass(is_last=number == passes - 1)
        with torch.autocast("cpu", dtype=shards.dtype, enabled=shards.dtype != torch.float32):
            loss = model(ids[number, :, :-1], ids[number, :, 1:])
        loss.backward()


def gradients(shards: Shards) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in shards.parameters()}
    return {name: grad.to_local() for name, grad in found.items() if isinstance(grad, DTensor)}


@pytest.mark.usefixtures("group_of_one")
class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_gradients_are_those_of_autocast(self, dtype: torch.dtype) -> None:
        """Block matrices are gathered in bfloat16, sums and layer norms stay float32: bit for bit the same gradients.

        Without biases: autocast on the processor sums a bias's gradient in float32, a gathered one gets bfloat16.
        """
        shards = shards_in(dtype)
        plain = GPT(shards.model.config)
        plain.load_state_dict({name: value.to_local() for name, value in shards.model.state_dict().items()})
        for model in (plain, shards.model):
            run_passes(model, shards)
        found = gradients(shards)
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            assert torch.equal(found[name], parameter.grad), name

    def test_first_weights_are_those_of_one_process(self) -> None:
        shards = shards_in(torch.float32)
        torch.manual_seed(0)
        plain = GPT.on_device(shards.model.config, CPU).init_weights()
        for name, parameter in shards.parameters():
            assert isinstance(parameter, DTensor)
            assert torch.equal(parameter.to_local(), plain.get_parameter(name)), name


@pytest.mark.usefixtures("group_of_one")
class TestRebuilding:
    @pytest.mark.parametrize("at", range(300, 900, 90))
    def test_nothing_is_left_of_a_pass_that_failed(self, at: int) -> None:
        """An error at some operator of three passes, forward or backward: the same passes then give the same sums."""
        shards = shards_in(torch.float32)
        run_passes(shards.model, shards)
        expected = gradients(shards)
        assert len(expected) == 15
        before = dict(shards.parameters())
        shards.model.zero_grad(set_to_none=True)
        with pytest.raises(RuntimeError, match="can't allocate"), FailsAt(at):
            run_passes(shards.model, shards)
        shards.model.zero_grad(set_to_none=True)
        old = shards.model
        assert shards.rebuild() is not old
        assert all(parameter is before[name] for name, parameter in shards.model.named_parameters())
        for _, parameter in shards.parameters():
            parameter.grad = None
        run_passes(shards.model, shards)
        found = gradients(shards)
        for name, grad in expected.items():
            assert torch.equal(found[name], grad), name


class FailsAt(TorchDispatchMode):
    """Raises before the operator of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError(MESSAGE)
        return func(*args, **(kwargs or {}))
