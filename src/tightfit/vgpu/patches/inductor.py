"""Answers for Inductor and Dynamo, so that they compile for a virtual card on a machine without one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from types import SimpleNamespace

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tightfit.kernels.temporaries import Argument, Arguments, Options
from tightfit.vgpu.assign import assign
from tightfit.vgpu.autotuning import Trials
from tightfit.vgpu.device import VirtualDevice, VirtualDeviceMode
from tightfit.vgpu.phases import Phases

Running = Callable[[nn.Module | None], AbstractContextManager[None]]


def install(device: VirtualDevice, properties: SimpleNamespace, trials: Trials, running: Running) -> None:
    """Patch what Inductor asks of the machine; calls of a compiled module are made within `running`."""
    hide_mode_from_dynamo()
    _trace_without_modes()
    _answer_for_card(device, properties)
    _answer_for_triton()
    trials.install()
    _decide_beforehand()
    _wrap_modules(device.phases, running)
    _make_states_on_card(device)


def hide_mode_from_dynamo() -> None:
    """Let Dynamo pass over the virtual device's dispatch mode instead of tracing it."""
    hide = import_module("torch._compile")._disable_dynamo
    assign(VirtualDeviceMode, __torch_dispatch__=hide(VirtualDeviceMode.__torch_dispatch__, recursive=True))


def _trace_without_modes() -> None:
    """Turn dispatch modes off while Dynamo traces: under DDP it leaves them on, and views would become ours."""
    converter = import_module("torch._dynamo.convert_frame").ConvertFrameAssert
    usual: Callable[..., object] = converter.__call__

    def call(*args: object, **kwargs: object) -> object:
        with _disable_current_modes():
            return usual(*args, **kwargs)

    assign(converter, __call__=call)


def _answer_for_card(device: VirtualDevice, properties: SimpleNamespace) -> None:
    cuda = import_module("torch._dynamo.device_interface").CudaInterface
    assign(
        cuda,
        get_device_properties=staticmethod(lambda where=None: properties),
        is_available=staticmethod(lambda: True),
        device_count=staticmethod(lambda: 1),
        current_device=staticmethod(lambda: 0),
        set_device=staticmethod(lambda where: None),
        get_raw_stream=staticmethod(lambda index=0: 0),
        get_compute_capability=staticmethod(lambda where=None: properties.major * 10 + properties.minor),
        is_triton_capable=staticmethod(lambda where=None: True),
        raise_if_triton_unavailable=staticmethod(lambda where=None: None),
        is_bf16_supported=staticmethod(lambda including_emulation=False: True),
        synchronize=staticmethod(lambda where=None: None),
        exchange_device=staticmethod(lambda index: 0),
        maybe_exchange_device=staticmethod(lambda index: 0),
    )
    assign(
        cuda.Worker,
        get_device_properties=staticmethod(lambda where=None: properties),
        current_device=staticmethod(lambda: 0),
    )


def _answer_for_triton() -> None:
    triton = import_module("torch.utils._triton")
    has_triton = {"has_triton": lambda *args, **kwargs: True, "has_triton_package": lambda *args, **kwargs: True}
    assign(triton, **has_triton)
    assign(
        triton,
        triton_hash_with_backend=lambda *args, **kwargs: "virtual",
        triton_backend=lambda *args, **kwargs: None,
    )
    # It hashes all of Triton's files, which takes a second or two.
    assign(import_module("torch._inductor.codecache"), triton_key=lambda: "virtual")
    scheduler = import_module("torch._inductor.scheduler")
    assign(scheduler, **{name: answer for name, answer in has_triton.items() if hasattr(scheduler, name)})


def _decide_beforehand() -> None:
    """Decide what Inductor would compute on the card, and start no compiling processes."""
    assign(
        import_module("torch._inductor.config"),
        compile_threads=1,  # no kernels are compiled: workers would only be started
    )
    _fold_on_host()
    # Torch gives the recomputation in backward the random state of forward: host memory alone.
    assign(
        import_module("torch._functorch.partitioners"),
        functionalize_rng_ops=lambda joint, forward, backward, symbols: (forward, backward),
    )


class _OnHost(TorchDispatchMode):
    """Runs operators on the host that name another device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Arguments = (), kwargs: Options | None = None
    ) -> Argument:
        def here(value: Argument) -> Argument:
            return torch.device("cpu") if isinstance(value, torch.device) else value

        out: Argument = func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})
        return out


def _fold_on_host() -> None:
    """Let Inductor compute a graph's constants on the host: there are no values on the device."""
    joint = import_module("torch._inductor.fx_passes.joint_graph")
    usual = joint.UniformValueConstantFolder

    class Folder(usual):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            with _OnHost():
                super().__init__(*args, **kwargs)

        def run(self, *args: object, **kwargs: object) -> object:
            with _OnHost():
                return super().run(*args, **kwargs)

        def _deduce_value(self, node: fx.Node) -> object:
            found = super()._deduce_value(node)
            return self.unknown_value if isinstance(found, FakeTensor) else found

    assign(joint, UniformValueConstantFolder=Folder)


def _wrap_modules(phases: Phases, running: Running) -> None:
    """Count calls of a compiled module as one forward pass."""
    dynamo = import_module("torch._dynamo.eval_frame")
    compiled_modules = dynamo.OptimizedModule
    usual: Callable[..., object] = compiled_modules.__call__

    def call(module: nn.Module, /, *args: object, **kwargs: object) -> object:
        if phases.compiled_calls:  # Dynamo's own, too: it makes one of each graph that it splits for DDP's buckets
            return usual(module, *args, **kwargs)
        original = module._orig_mod
        assert isinstance(original, nn.Module)
        with running(original):
            return usual(module, *args, **kwargs)

    dynamo.skip_code(call.__code__)  # or Dynamo compiles it where a compiled function calls it
    assign(compiled_modules, __call__=call)


def _make_states_on_card(device: VirtualDevice) -> None:
    """Let a compiled optimizer make its states on the card: Dynamo calls `_init_group` while it has all modes off."""
    optimizers = import_module("torch._dynamo.variables.optimizer").OptimizerVariable
    usual: Callable[..., object] = optimizers.call_method

    def call_method(variable: object, translator: object, name: str, *rest: object) -> object:
        if name != "_init_group":
            return usual(variable, translator, name, *rest)
        device.phases.compiled_steps += 1
        with device.mode():
            return usual(variable, translator, name, *rest)

    assign(optimizers, call_method=call_method)
