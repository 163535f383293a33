"""Makes tensors on "cuda" possible in a process without a CUDA device, beyond torch's public API.

It needs three parts of torch, which `self_test` checks:
1. a device guard in the CUDA slot of c10's registry, and CUDA hooks that report a built CUDA with a context, so that
   tensors on "cuda" can be made and autograd's engine can run (by ctypes: torch has an official way in for its
   "PrivateUse1" slot only);
2. fake tensors (`torch._subclasses.fake_tensor`), which have a shape, a dtype and the device "cuda", and no data;
3. the names below `torch._C` by which `torch.cuda` reaches its compiled half, which `patches.cuda_api` answers.
"""

import copyreg
import ctypes
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, library, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tightfit.errors import DeviceError
from tightfit.kernels.operators import WITH_OWN_KERNEL
from tightfit.vgpu.assign import assign
from tightfit.vgpu.patches import tensor_kinds
from tightfit.vgpu.patches.autograd_threads import rest_before_exit
from tightfit.wording import say

_CUDA, _META, _PRIVATE_USE = 1, 14, 20
"""c10::DeviceType: places in the registry of device guards."""
_REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"
_GET_CUDA_HOOKS = "_ZN2at6detail12getCUDAHooksEv"
_TIMERS = "_ZN4c10d13TimerRegistryEv"
_MOST_BUCKETS = 64
"""Of the registry of timers, which has one timer for each kind of device."""
_DEVICE_COUNT_SLOT = 15
"""Of `deviceCount` in the virtual table of a device guard, which for "meta" returns 1: a function that says yes."""
_EXCHANGE_STREAM_SLOT = 9
"""Of `exchangeStream`, in the same table."""
_HOOKS_SLOTS = {"isBuilt": 2, "hasPrimaryContext": 4}
_GUARD_TABLE_SLOTS, _HOOKS_TABLE_SLOTS = 30, 80

_enabled = False
KEPT: list[library.Library] = []
"""torch forgets an operator's implementation when its library goes."""


_CARDS = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the numbers of the cards that CUDA may use."""


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self) -> "torch._C._autograd.DeviceType":  # type: ignore[override]  # torch calls it with this type
        return torch._C._autograd.DeviceType.CUDA


def enable() -> None:
    """Switch the CUDA device of this process to a virtual one, for good. DeviceError where this torch cannot."""
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_initialized():
        raise DeviceError(say("vgpu.backend.real_gpu_in_use"))
    _hide_cards()
    try:
        _install_guard()
    except (AttributeError, OSError, AssertionError, ValueError) as error:
        kind = type(error).__name__
        raise DeviceError(
            say("vgpu.backend.not_replaceable", version=torch.__version__, kind=kind, error=str(error))
        ) from None
    answer_for_fake_tensors()
    rest_before_exit()
    _enabled = True


def _hide_cards() -> None:
    """Let CUDA, which looks for cards once in a process, find none."""
    os.environ[_CARDS] = ""
    look = getattr(torch._C, "_cuda_getDeviceCount", None)  # not there in a build without CUDA
    if look is not None:
        with warnings.catch_warnings(action="ignore"):  # of an old driver, which nobody asks here
            look()


def let_scripts_see_cards() -> None:
    """Take back the empty list of cards, after CUDA read it: a script would learn from it that there are none."""
    if os.environ.get(_CARDS) == "":
        del os.environ[_CARDS]


def self_test(*, in_fork: bool = False) -> None:
    """Train a virtual tensor for a step. DeviceError, naming the missing part, if that fails.

    `in_fork`: run the backward pass in a child, as a process that trained cannot fork another one that trains.
    """
    missing = _failure_of(lambda: _missing_part(in_fork=in_fork))
    if missing:
        raise DeviceError(say("vgpu.backend.does_not_work", version=torch.__version__, missing=missing))


def _failure_of(test: Callable[[], str]) -> str:
    """Return the part of torch that a test finds missing, or the test's error."""
    try:
        return test()
    except (RuntimeError, AssertionError, AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        return say("vgpu.backend.training_step", kind=type(error).__name__, error=f"{first:.200}")


def _missing_part(*, in_fork: bool) -> str:
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = nn.Parameter(torch.zeros(4, 4, device="cuda"))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (torch.zeros(2, 4).to("cuda") @ weight).sum()
        missing = _asked_of_fork(lambda: _backward(loss, weight)) if in_fork else _backward(loss, weight)
    if weight.device != torch.device("cuda", 0):
        return say("vgpu.backend.device_of_copy")
    return missing or ("" if loss.dtype in (torch.float32, torch.bfloat16) else say("vgpu.backend.autocast"))


def _backward(loss: Tensor, weight: Tensor) -> str:
    loss.backward()
    if weight.grad is None or weight.grad.device.type != "cuda":
        return say("vgpu.backend.gradient")
    return ""


def _asked_of_fork(question: Callable[[], str]) -> str:
    """Return a child's answer to a question about torch."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading, encoding="utf-8") as answer:
            found = answer.read()
        os.waitpid(child, 0)
        return found.removesuffix("\0") if found.endswith("\0") else say("vgpu.backend.no_answer")
    try:
        with open(writing, "w", encoding="utf-8") as answer:
            answer.write(_failure_of(question) + "\0")
    finally:
        os._exit(0)


def _install_guard() -> None:
    folder = Path(torch.__file__).parent / "lib"
    c10 = ctypes.CDLL(str(next(folder.glob("libc10.*"))))
    cpu = ctypes.CDLL(str(next(folder.glob("libtorch_cpu.*"))))
    registry = (ctypes.c_void_p * (_PRIVATE_USE + 1)).in_dll(c10, _REGISTRY)
    guard = _Guard()
    _never_free(guard)
    torch._C._acc.register_python_privateuseone_device_guard(guard)
    registry[_CUDA], registry[_PRIVATE_USE] = registry[_PRIVATE_USE], None
    meta_guard = registry[_META]
    assert meta_guard is not None
    table = ctypes.c_void_p.from_address(meta_guard).value
    assert table is not None
    yes = ctypes.c_void_p.from_address(table + 8 * _DEVICE_COUNT_SLOT).value
    assert yes is not None
    assert ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(yes)(meta_guard) == 1, "deviceCount has moved"
    # Autograd's engine exchanges streams also while an error of the script's leaves it. The guard would then ask
    # Python, which still has that error, and end the process; the one of "meta" has nothing to ask.
    nothing = ctypes.c_void_p.from_address(table + 8 * _EXCHANGE_STREAM_SLOT).value
    assert nothing is not None
    own_guard = registry[_CUDA]
    assert own_guard is not None
    _replace_virtual_functions(own_guard, {_EXCHANGE_STREAM_SLOT: nothing}, _GUARD_TABLE_SLOTS)
    get_hooks = getattr(cpu, _GET_CUDA_HOOKS)
    get_hooks.restype = ctypes.c_void_p
    _replace_virtual_functions(get_hooks(), dict.fromkeys(_HOOKS_SLOTS.values(), yes), _HOOKS_TABLE_SLOTS)
    if hasattr(torch._C, "_cuda_getDeviceCount"):
        _forget_timers(cpu)
    accelerator = torch._C._accelerator_getAccelerator()
    assert str(accelerator) == "cuda", f"the accelerator is {accelerator}"


class _HashTable(ctypes.Structure):
    """The head of libstdc++'s `std::unordered_map`, with which a `c10::Registry` begins."""

    _fields_ = (
        ("buckets", ctypes.c_void_p),
        ("bucket_count", ctypes.c_size_t),
        ("first", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


def _forget_timers(cpu: ctypes.CDLL) -> None:
    """Empty the registry of DDP's timers: one of CUDA asks the driver, which is not there. DDP does without any."""
    get_timers = getattr(cpu, _TIMERS, None)
    if get_timers is None:  # a build without torch.distributed
        return
    get_timers.restype = ctypes.c_void_p
    table = _HashTable.from_address(get_timers())
    if table.count <= table.bucket_count <= _MOST_BUCKETS:
        ctypes.memset(table.buckets, 0, ctypes.sizeof(ctypes.c_void_p) * table.bucket_count)
        table.first, table.count = None, 0


def _never_free(pointed_at: object) -> None:
    """Keep an object that C++ points to beyond the interpreter's end, when modules drop their contents.

    Autograd's engine still asks the guard then, as do tensors that are released late.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pointed_at))


def _replace_virtual_functions(instance: int, functions: dict[int, int], slots: int) -> None:
    """Give a C++ object a copy of its virtual table with other functions in some slots (Itanium C++ ABI)."""
    pointer = ctypes.c_void_p.from_address(instance)
    assert pointer.value is not None
    before = 2  # offset to top, and type information
    copy = (ctypes.c_void_p * (slots + before))()
    ctypes.memmove(copy, pointer.value - 8 * before, 8 * len(copy))
    for slot, function in functions.items():
        copy[slot + before] = function
    _never_free(copy)
    pointer.value = ctypes.addressof(copy) + 8 * before


def answer_for_fake_tensors() -> None:
    """Let torch treat a fake tensor as a GPU's without looking for a GPU."""
    assign(importlib.import_module("torch._subclasses"), __class__=_Discreet)
    # torch.tensor([1.0], device="cuda") makes a host tensor first, which the dispatch mode then receives.
    torch._C._set_only_lift_cpu_tensors(True)
    assign(fake_tensor, init_gpu_context=lambda device: None)
    assign(FakeTensorMode, avoid_device_init=property(lambda self: True))
    for amp in (importlib.import_module("torch.cuda.amp.common"), torch.cuda.amp):
        assign(amp, amp_definitely_not_available=lambda: False)
    import torch.optim.optimizer as optimizer
    import torch.utils._foreach_utils as foreach

    for module in (optimizer, foreach):
        supported = getattr(module, "_foreach_supported_types", None)
        if supported is not None and FakeTensor not in supported:
            supported.append(FakeTensor)
    _claim_cuda_kernels()


def _claim_cuda_kernels() -> None:
    """Register a CUDA kernel for operators that a CPU build of torch would take apart before a mode receives them.

    The dispatch mode answers for tensors on "cuda", so that nothing calls these kernels.
    """
    operators = library.Library("aten", "IMPL")
    for name in WITH_OWN_KERNEL:
        known = hasattr(torch.ops.aten, name)
        if known and not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            operators.impl(name, _no_real_kernel, "CUDA")
    KEPT.append(operators)


def _no_real_kernel(*args: object, **kwargs: object) -> None:
    raise AssertionError("a tensor of the virtual GPU was used without its dispatch mode")


class _Discreet(types.ModuleType):
    """`torch._subclasses`, which shows the class of fake tensors to torch alone.

    Libraries take a fake tensor as a sign of tracing, and take another path than on a card: transformers makes
    attention masks that it would leave out.
    """

    @property
    def FakeTensor(self) -> type:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        return FakeTensor if asker.partition(".")[0] in ("torch", "tightfit") else _NoTensor


class _NoTensor:
    """A class without instances."""


def exchange(one: Tensor, other: Tensor) -> None:
    """Swap the contents of two Python tensors, which stay the same objects; `one` keeps the attributes it was given.

    Does as `torch.utils.swap_tensors`, without its check that nobody else holds the tensors: tied weights have two
    holders.
    """
    given = {name: value for name, value in one.__dict__.items() if name not in _OF_FAKE_TENSORS}
    for name in ("__class__", "__dict__", *sorted(_slots(one) | _slots(other))):
        mine, theirs = getattr(one, name, None), getattr(other, name, None)
        setattr(one, name, theirs)
        setattr(other, name, mine)
    tensor_kinds.exchange(one, other)
    torch._C._swap_tensor_impl(one, other)
    for name, value in given.items():
        one.__dict__.setdefault(name, value)


def _slots(tensor: Tensor) -> set[str]:
    """Names of a tensor's contents outside its dictionary: those of DTensor are its shard and its placement."""
    return {name for name in copyreg._slotnames(type(tensor)) if not name.startswith("__")}  # type: ignore[attr-defined]


_MEMOS = ("nonzero", "item", "unique", "unique_consecutive", "nested_int")
_OF_FAKE_TENSORS = frozenset(
    (
        *("_fake_device", "fake_mode", "constant", "pytype", "dispatch_keys", "real_tensor", "_is_param"),
        *(f"_{name}_memo{part}" for name in _MEMOS for part in ("", "_vc", "_epoch")),
        "_debug_trace",
    )
)
"""Attributes that torch gives a fake tensor."""
