"""Launchers of distributed training, read from their arguments: what each process runs, and its variables.

Written from the sources of torch 2.13, accelerate 1.15, DeepSpeed 0.18 and Lightning 2.6.
"""

import argparse
import importlib
import os
import re
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from tightfit.errors import ConfigError
from tightfit.wording import say

_RUN_VALUES = (
    "rdzv-backend rdzv-endpoint rdzv-id rdzv-conf max-restarts monitor-interval start-method event-log-handler role "
    "log-dir local-ranks-filter duplicate-stdout-filters duplicate-stderr-filters master-addr master-port local-addr "
    "logs-specs numa-binding signals-to-handle shutdown-timeout"
)
_RUN_FLAGS = "standalone no-python run-path virtual-local-rank use-env"
_DEEPSPEED_VALUES = (
    "num_nodes master_port master_addr launcher launcher_args module_name autotuning enable_each_rank_log exclude "
    "hostfile min_elastic_nodes max_elastic_nodes node_rank bind_core_list ssh_port venv_script"
)
_DEEPSPEED_FLAGS = (
    "no_python no_local_rank no_ssh no_ssh_check force_multi elastic_training save_pid bind_cores_to_rank"
)


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a launched command."""

    command: tuple[str, ...]
    environ: dict[str, str]
    notes: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """A launcher's parser, with both spellings of each option."""

    def __init__(self, name: str, *, values: str = "", flags: str = "") -> None:
        super().__init__(prog=name, add_help=False)
        for each in values.split():
            self.add_argument(*_spellings(each))
        for each in flags.split():
            self.add_argument(*_spellings(each), action="store_true")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(say("vgpu.command.launcher", launcher=self.prog, message=message))

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse options, then the script in `script` and its words in `rest`. ConfigError without a script."""
        self.add_argument("script", nargs="?")
        self.add_argument("rest", nargs=argparse.REMAINDER)
        options = self.parse_args(list(words))
        if options.script == "--":
            options.script, options.rest = (options.rest or [None])[0], options.rest[1:]
        if not options.script:
            example = f"{self.prog} --option=value train.py"
            raise ConfigError(say("vgpu.command.no_script", launcher=self.prog, example=example))
        return options


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}", f"--{name.replace('_', '-')}"]))


def torchrun(words: Sequence[str], rank: int) -> Launch:
    """Read `torchrun`'s words."""
    return _torchrun("torchrun", words, rank, passes_rank=False)


def torch_launch(words: Sequence[str], rank: int) -> Launch:
    """Read the words of `python -m torch.distributed.launch`, which gives the script --local-rank."""
    return _torchrun("torch.distributed.launch", words, rank, passes_rank=True)


def _torchrun(name: str, words: Sequence[str], rank: int, *, passes_rank: bool) -> Launch:
    parser = _Parser(name, values=_RUN_VALUES, flags=_RUN_FLAGS)
    parser.add_argument(*_spellings("nproc-per-node"), default="1")
    parser.add_argument("--nnodes", default="1")
    parser.add_argument(*_spellings("node-rank"), default="0")
    parser.add_argument("-m", "--module", action="store_true")
    parser.add_argument("-r", "--redirects")
    parser.add_argument("-t", "--tee")
    options = parser.read(words)
    per_node, notes = _per_node(name, options.nproc_per_node)
    nodes = _number(name, "--nnodes", options.nnodes.rpartition(":")[2])
    address = (options.rdzv_endpoint or "").rpartition(":")
    variables = world(
        rank,
        per_node=per_node,
        nodes=nodes,
        launcher=name,
        address=options.master_addr or address[0],
        port=options.master_port or address[2],
    )
    elastic = {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": options.max_restarts or "0"}
    elastic |= {"TORCHELASTIC_RUN_ID": options.rdzv_id or "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    local = [f"--local-rank={variables['LOCAL_RANK']}"] if passes_rank and not options.use_env else []
    command = _command(options.script, [*local, *options.rest], module=options.module, no_python=options.no_python)
    return Launch(command=command, environ={**variables, **elastic}, notes=notes)


def _per_node(name: str, text: str) -> tuple[int, tuple[str, ...]]:
    if text in ("gpu", "auto"):
        return 1, (say("vgpu.command.all_cards", launcher=name),)
    return _number(name, "--nproc_per_node", text), ()


def _number(name: str, option: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigError(say("vgpu.command.number", launcher=name, option=option, value=text))
    return int(text)


def world(
    rank: int, *, per_node: int, nodes: int = 1, launcher: str = "torchrun", address: str = "", port: str = ""
) -> dict[str, str]:
    """Return the variables that torch's launcher sets for a rank. ConfigError for a rank that there is not."""
    size = per_node * nodes
    if rank >= size:
        raise ConfigError(say("vgpu.command.rank", rank=rank, size=size))
    node, local = divmod(rank, per_node)
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": per_node,
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": nodes,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
    }
    found = {name: str(number) for name, number in numbers.items()}
    found |= {"ROLE_NAME": "default", "MASTER_ADDR": address or "127.0.0.1", "MASTER_PORT": port or "29500"}
    if per_node > 1:
        found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return found


def _command(script: str, rest: Sequence[str], *, module: bool, no_python: bool) -> tuple[str, ...]:
    if no_python:
        return script, *rest
    return ("python", "-m", script, *rest) if module else ("python", script, *rest)


def deepspeed(words: Sequence[str], rank: int) -> Launch:
    """Read `deepspeed`'s words: it gives the script --local_rank."""
    parser = _Parser("deepspeed", values=_DEEPSPEED_VALUES, flags=_DEEPSPEED_FLAGS)
    parser.add_argument(*_spellings("num_gpus"))
    parser.add_argument("-i", "--include", default="")
    parser.add_argument("-m", "--module", action="store_true")
    options = parser.read(words)
    named = re.findall(r"(?:^|@)[^:@]*:([\d,]+)", options.include)
    cards = named[0].count(",") + 1 if named else 0
    notes: tuple[str, ...] = ()
    if options.num_gpus is None and not cards:
        notes = (say("vgpu.command.all_cards_deepspeed"),)
    per_node = cards or _number("deepspeed", "--num_gpus", options.num_gpus or "1")
    nodes = _number("deepspeed", "--num_nodes", options.num_nodes or "1") if options.num_nodes != "-1" else 1
    found = world(rank, per_node=per_node, nodes=nodes, address=options.master_addr, port=options.master_port)
    kept = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    variables = {name: value for name, value in found.items() if name in kept}
    variables |= {"LOCAL_SIZE": str(per_node), "CROSS_RANK": found["GROUP_RANK"], "CROSS_SIZE": str(nodes)}
    local = [] if options.no_local_rank else [f"--local_rank={found['LOCAL_RANK']}"]
    command = _command(options.script, [*local, *options.rest], module=options.module, no_python=options.no_python)
    return Launch(command=command, environ=variables, notes=notes)


def fabric(words: Sequence[str], rank: int) -> Launch:
    """Read the words after `fabric run` or `lightning run`: Lightning's Fabric reads its settings from variables."""
    given = list(words[1:] if words[:1] == ["model"] else words)
    parser = _Parser("fabric run", values="accelerator strategy precision main-address main-port")
    parser.add_argument("--devices", default="1")
    parser.add_argument(*_spellings("num-nodes"), default="1")
    parser.add_argument(*_spellings("node-rank"), default="0")
    script = next((each for each in given if each.endswith(".py")), None)
    # Its options stand before the script or directly after it.
    rest = given[given.index(script) + 1 :] if script else []
    before = given[: given.index(script)] if script else given
    options, others = parser.parse_known_args([*before, *rest])
    options.script = script
    if not script:
        raise ConfigError(say("vgpu.command.no_script", launcher="fabric run", example="fabric run train.py"))
    devices = str(options.devices)
    per_node = devices.count(",") + 1 if "," in devices else (int(devices) if devices.isdecimal() else 1)
    notes = (say("vgpu.command.all_cards", launcher="fabric run"),) if devices in ("auto", "-1") else ()
    nodes = _number("fabric run", "--num-nodes", options.num_nodes)
    variables = {"LT_CLI_USED": "1", "LT_DEVICES": devices, "LT_NUM_NODES": str(nodes)}
    for name in ("accelerator", "strategy", "precision"):
        if getattr(options, name):
            variables[f"LT_{name.upper()}"] = getattr(options, name)
    size = world(rank, per_node=max(1, per_node), nodes=nodes, address=options.main_address, port=options.main_port)
    elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    return Launch(command=("python", script, *others), environ={**size, **elastic, **variables}, notes=notes)


def accelerate_launch(words: Sequence[str], rank: int) -> Launch:
    """Read the words after `accelerate launch` with accelerate's own parser, so that its config files count, too."""
    try:
        launch = importlib.import_module("accelerate.commands.launch")
        environments = importlib.import_module("accelerate.utils.launch")
    except ImportError as error:
        raise ConfigError(say("vgpu.command.not_installed", launcher="accelerate", reason=error)) from None
    parser = launch.launch_command_parser()
    parser.error = _Parser("accelerate launch").error
    options = parser.parse_args(list(words))
    if options.config_file is not None and not os.path.isfile(options.config_file):
        raise ConfigError(say("vgpu.command.no_config", file=options.config_file))
    notes: tuple[str, ...] = ()
    if options.num_processes is None and not (options.config_file or os.path.isfile(launch.default_config_file)):
        options.num_processes, notes = 1, (say("vgpu.command.all_cards_accelerate"),)
    try:
        options, defaults, _ = launch._validate_launch_command(options)
        options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config) if defaults else ""
        several = options.use_fsdp or options.multi_gpu or options.use_megatron_lm
        if options.use_deepspeed:
            _, variables = environments.prepare_deepspeed_cmd_env(options)
        elif several:
            variables = environments.prepare_multi_gpu_env(options)
        else:
            _, variables = environments.prepare_simple_launcher_cmd_env(options)
    except (ValueError, ConnectionError, AssertionError, NotImplementedError) as error:
        raise ConfigError(say("vgpu.command.launcher", launcher="accelerate launch", message=error)) from None
    changed = {name: value for name, value in variables.items() if os.environ.get(name) != value}
    nodes = max(1, int(options.num_machines or 1))
    if options.use_deepspeed or several:
        per_node = max(1, int(options.num_processes or 1) // nodes)
        changed = {**world(rank, per_node=per_node, nodes=nodes, port=str(options.main_process_port or "")), **changed}
    command = _command(
        options.training_script,
        options.training_script_args,
        module=bool(options.module),
        no_python=bool(options.no_python),
    )
    return Launch(command=command, environ=changed, notes=notes)
