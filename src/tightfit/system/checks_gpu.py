"""Doctor's checks of the cards: found, driver, memory, processes, number formats, MIG, ECC, spilling."""

from collections import Counter
from collections.abc import Iterator

from msgspec.structs import replace

from tightfit.config import TrainConfig
from tightfit.errors import DeviceError
from tightfit.gpus import GPU, MAX_AUTOTUNE_SMS, find_gpu, resolve_gpu
from tightfit.system.checks import Check, Fact, Part, Program, Status
from tightfit.system.machine import Machine
from tightfit.system.nvml import Failure, GpuMemory, GpuProcess
from tightfit.system.torch_build import SUPPORTED, dotted, hidden_by_environment
from tightfit.units import MIB

BUSY_BYTES = 512 * MIB
"""Memory of other programs that deserves a warning: a desktop at rest uses less."""
_LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""For any CUDA of this major version on Linux: table "minor version compatibility" of the CUDA release notes."""

_OLDEST_BUILT = 12
"""The oldest major version of CUDA for which a torch of `SUPPORTED` is offered."""


def torch_checks(machine: Machine) -> Iterator[Check]:
    """The installed torch: its version, and the cards that it was built for."""
    torch = machine.torch
    if torch is None:
        yield Check(name="torch", outcome="missing", status="problem")
        return
    facts = {"version": torch.version, "oldest": dotted(SUPPORTED[0]), "newest": dotted(SUPPORTED[1])}
    if torch.release < SUPPORTED[0]:
        yield Check(name="torch", outcome="old", status="problem", facts=facts)
    elif torch.release > SUPPORTED[1]:
        yield Check(name="torch", outcome="new", status="warning", facts=facts)
    elif not torch.cuda and ("nvidia" in machine.vendors or machine.cards.cards):
        yield Check(name="torch", outcome="no_cuda", status="problem", facts=facts)
    elif "amd" in machine.vendors and not torch.hip and not torch.cuda:
        yield Check(name="torch", outcome="no_rocm", status="warning", facts=facts)
    else:
        built = "cuda" if torch.cuda else "rocm" if torch.hip else "cpu"
        built_for = dotted(torch.cuda) if torch.cuda else torch.hip
        yield Check(name="torch", outcome=built, status="ok", facts={**facts, "built_for": built_for})


def gpu_checks(machine: Machine, config: TrainConfig | None) -> Iterator[Check]:
    """Everything about cards, the machine's first and then card by card."""
    yield _found(machine, config)
    cards = machine.cards.cards
    if cards:
        yield _driver(machine)
    for card in cards:
        number = card.index if len(cards) > 1 else None
        for check in _card_checks(machine, config, card):
            yield replace(check, card=number)


def table_entry(card: GpuMemory) -> GPU | None:
    """The card's entry in `gpus.csv`; where a name has two sizes, its memory decides. None for an unknown card."""
    if found := find_gpu(card.name):
        return found
    try:
        return resolve_gpu(card.name, memory_bytes=card.total_bytes - (card.reserved_bytes or 0))[0]
    except DeviceError:  # an unknown name, or one that fits several cards
        return None


def _counted(names: list[str]) -> list[str]:
    """
    >>> _counted(["A100", "A100", "T4"])
    ['2 x A100', 'T4']
    """
    return [f"{count} x {name}" if count > 1 else name for name, count in Counter(names).items()]


def _found(machine: Machine, config: TrainConfig | None) -> Check:
    wanted = config is not None and config.device.startswith("cuda")
    lacking: Status = "problem" if wanted else "warning"
    if machine.cards.cards:
        return _cards_found(machine, lacking)
    failure, torch = machine.cards.failure, machine.torch
    why = {"failure": failure or Failure("no_cards")}
    if torch and torch.devices:
        facts: dict[str, Fact] = {**why, "names": _counted([each.name for each in torch.devices])}
        return Check(name="gpu", outcome="amd" if torch.hip else "only_torch", status="unknown", facts=facts)
    if failure and failure.kind in ("no_driver", "mismatch", "lost"):
        return Check(name="gpu", outcome="broken", status="problem", facts=why)
    if "nvidia" in machine.vendors:
        return Check(name="gpu", outcome="nvidia_unseen", status="problem", facts=why)
    if "apple" in machine.vendors:
        return Check(name="gpu", outcome="apple", status="unknown" if torch and torch.mps else "warning")
    if "amd" in machine.vendors:
        return Check(name="gpu", outcome="amd_unseen", status=lacking)
    return Check(name="gpu", outcome="none_but_asked" if wanted else "none", status=lacking, facts=why)


def _cards_found(machine: Machine, lacking: Status) -> Check:
    """The cards that NVML reports, and reasons for which torch has none of them."""
    cards, torch = machine.cards.cards, machine.torch
    facts: dict[str, Fact] = {"names": _counted([card.name for card in cards]), "count": len(cards)}
    hidden = hidden_by_environment(machine.environ)
    if hidden is not None:
        return Check(name="gpu", outcome="hidden", status=lacking, facts={**facts, "value": hidden})
    if torch and torch.cuda and not torch.devices:
        outcome = "not_in_torch" if torch.complaint else "not_in_torch_silent"
        return Check(name="gpu", outcome=outcome, status="problem", facts={**facts, "complaint": torch.complaint})
    return Check(name="gpu", outcome="found", status="ok", facts=facts)


def _driver(machine: Machine) -> Check:
    """The driver's CUDA against torch's. Any minor version of the same major works (NVIDIA's compatibility rule)."""
    has, torch = machine.cards.cuda_version, machine.torch
    facts = {"driver": machine.cards.driver or "?"}
    if has is None:
        return Check(name="driver", outcome="silent", status="unknown", facts=facts)
    facts["has"] = dotted(has)
    if torch is None or torch.cuda is None:
        return Check(name="driver", outcome="alone", status="ok", facts=facts)
    facts["wants"] = dotted(torch.cuda)
    if has >= torch.cuda:
        return Check(name="driver", outcome="enough", status="ok", facts=facts)
    if has[0] == torch.cuda[0]:
        return Check(name="driver", outcome="same_major", status="ok", facts=facts)
    facts["major"] = str(has[0])
    facts["least"] = _LEAST_DRIVER.get(torch.cuda[0], "") if machine.platform == "linux" and not machine.wsl else ""
    outcome = "old" if facts["least"] else "old_unnamed"
    if has[0] < _OLDEST_BUILT:
        outcome = "too_old" if facts["least"] else "too_old_unnamed"
    return Check(name="driver", outcome=outcome, status="problem", facts=facts)


def _card_checks(machine: Machine, config: TrainConfig | None, card: GpuMemory) -> Iterator[Check]:
    yield from _capability(machine, config, card)
    if card.mig:
        yield _mig(machine, card)
    else:
        yield _memory(card)
        yield from _processes(machine, card)
    yield _multiprocessors(machine, card)
    yield _ecc(card)
    yield _spill(machine, card)


def _capability(machine: Machine, config: TrainConfig | None, card: GpuMemory) -> Iterator[Check]:
    if card.capability is None:
        yield Check(name="capability", outcome="silent", status="unknown")
        return
    torch, facts = machine.torch, {"capability": dotted(card.capability), "name": card.name}
    if torch and torch.serves(card.capability) is False:
        built = [dotted(each) for each in torch.capabilities]
        yield Check(name="capability", outcome="no_code", status="problem", facts={**facts, "built": built})
        return
    dtype = config.dtype if config else "auto"
    if card.capability >= (8, 0):
        yield Check(name="capability", outcome="native", status="ok", facts=facts)
    elif dtype == "bfloat16":
        yield Check(name="capability", outcome="emulated", status="warning", facts=facts)
    elif card.capability >= (7, 0):
        yield Check(name="capability", outcome="half", status="ok", facts=facts)
    else:
        yield Check(name="capability", outcome="no_tensor_cores", status="warning", facts=facts)


def _memory(card: GpuMemory) -> Check:
    facts = {"free_bytes": card.free_bytes, "total_bytes": card.total_bytes, "reserved_bytes": card.reserved_bytes}
    outcome = "free" if card.reserved_bytes is None else "free_of_usable"
    return Check(name="memory", outcome=outcome, status="ok", facts=facts)


def _processes(machine: Machine, card: GpuMemory) -> Iterator[Check]:
    others, used = card.others, card.used_by_others_bytes
    if others is None or (not others and card.spills_to_host):
        at_most = card.used_bytes - (card.own_bytes or 0) if used is None else used
        yield Check(name="processes", outcome="silent", status="unknown", facts={"used_bytes": at_most})
        return
    if not others:
        if used is not None and used >= BUSY_BYTES:
            yield Check(name="processes", outcome="unseen", status="warning", facts={"used_bytes": used})
        else:
            yield Check(name="processes", outcome="none", status="ok")
        return
    facts: dict[str, Fact] = {"who": [_program(process) for process in others], "used_bytes": used}
    if used is None or any(process.used_bytes is None for process in others):
        yield Check(name="processes", outcome="some_unmeasured", status="unknown", facts=facts)
        return
    computing = [process for process in others if not process.draws]
    if used < BUSY_BYTES and not computing:
        yield Check(name="processes", outcome="little", status="ok", facts=facts)
        return
    pids = [process.pid for process in computing]
    if not pids:
        yield Check(name="processes", outcome="desktop", status="warning", facts=facts)
        return
    stop = "taskkill /PID " + " /PID ".join(map(str, pids)) if machine.platform == "win32" else _kill(pids)
    yield Check(name="processes", outcome="some", status="warning", facts={**facts, "command": stop})


def _kill(pids: list[int]) -> str:
    return "kill " + " ".join(map(str, pids))


def _program(process: GpuProcess) -> Program:
    return Program(name=process.name or "?", pid=process.pid, used_bytes=process.used_bytes)


def _mig(machine: Machine, card: GpuMemory) -> Check:
    """The parts of a card that MIG divides. A process uses one of them; without a part CUDA has no device."""
    parts = [Part(name=part.name, free_bytes=part.free_bytes, total_bytes=part.total_bytes) for part in card.instances]
    if not parts:
        return Check(name="mig", outcome="empty", status="problem", facts={"index": card.index})
    chosen = machine.environ.get("CUDA_VISIBLE_DEVICES", "")
    facts: dict[str, Fact] = {"parts": parts, "count": len(parts), "uuid": card.instances[0].uuid, "chosen": chosen}
    if chosen.startswith("MIG-"):
        return Check(name="mig", outcome="chosen", status="ok", facts=facts)
    return Check(name="mig", outcome="on", status="warning", facts=facts)


def _multiprocessors(machine: Machine, card: GpuMemory) -> Check:
    count, facts = _sm_count(machine, card), {"threshold": MAX_AUTOTUNE_SMS}
    if count is None:
        return Check(name="sms", outcome="unknown", status="unknown", facts=facts)
    outcome = "few" if count < MAX_AUTOTUNE_SMS else "enough"
    return Check(name="sms", outcome=outcome, status="ok", facts={**facts, "count": count})


def _sm_count(machine: Machine, card: GpuMemory) -> int | None:
    """Multiprocessors of a MIG part, of torch's device or of the table's entry."""
    if card.instances:
        return card.instances[0].sm_count
    devices = machine.torch.devices if machine.torch else ()
    same = [device.sm_count for device in devices if device.name == card.name]
    if same:
        return same[0]
    entry = table_entry(card)
    return entry.sm_count if entry else None


def _ecc(card: GpuMemory) -> Check:
    if card.ecc_errors:
        return Check(name="ecc", outcome="errors", status="problem", facts={"count": card.ecc_errors})
    outcome = "none" if card.ecc is None else "on" if card.ecc else "off"
    return Check(name="ecc", outcome=outcome, status="ok")


def _spill(machine: Machine, card: GpuMemory) -> Check:
    if not card.spills_to_host:
        return Check(name="spill", outcome="no", status="ok")
    return Check(name="spill", outcome="wsl" if machine.wsl else "windows", status="warning")
