"""`torch.compile` on the virtual GPU: Inductor compiles for the card, and its own wrapper code runs without kernels.

Inductor decides which buffers a compiled graph takes, reuses and frees when it fuses and schedules. It writes them
into the wrapper that calls the kernels, and `inductor_wrapper` runs that. `patches.inductor` answers Inductor's
questions about Triton and the card; Triton is only imported.
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from tightfit.kernels.temporaries import Argument
from tightfit.vgpu.autotuning import Trials
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.graphs import CudaGraphs
from tightfit.vgpu.inductor_wrapper import Call, run_wrapper, wrapper_of
from tightfit.vgpu.kept_frames import KeptFrames
from tightfit.wording import say

if TYPE_CHECKING:
    from torch._inductor.output_code import OutputCode

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., object]

_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_EAGER = ("eager", "aot_eager", "aot_eager_decomp_partition")
"""Backends that run Dynamo's graphs operator by operator, as a function of the script's own may do."""
_GRAPHS_OPTION = "triton.cudagraphs"


class Compiler:
    """Stands in for `torch.compile` in a process with a virtual GPU."""

    def __init__(self, device: VirtualDevice, trials: Trials, prepare_inductor: Callable[[], None]) -> None:
        """`prepare_inductor` is called once, before the first compilation."""
        self._device, self._trials, self._prepare_inductor = device, trials, prepare_inductor
        self._compile: Callable[..., Function] = torch.compile
        self._arguments = inspect.signature(torch.compile).parameters.keys()
        self._ready: bool | None = None
        self._graphs = CudaGraphs(device)
        self.kept_frames = KeptFrames(device.card.torch_version)

    def compile(
        self,
        model: Function | None = None,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: str | Function | None = "inductor",
        mode: str | None = None,
        options: Mapping[str, str | int | bool | Function] | None = None,
        disable: bool = False,
        **others: Any,  # as torch takes them
    ) -> Function:
        """Compile like `torch.compile`; a model that cannot be compiled here runs eagerly, and the report names it.

        `others` are arguments of newer versions of torch, which change no memory.
        """
        for name in others.keys() - self._arguments:
            raise TypeError(f"compile() got an unexpected keyword argument {name!r}")
        if model is None:
            return functools.partial(
                self.compile,
                fullgraph=fullgraph,
                dynamic=dynamic,
                backend=backend,
                mode=mode,
                options=options,
                disable=disable,
                **others,
            )
        if disable:
            return model
        if isinstance(backend, str) and backend not in ("inductor", *_EAGER):
            return self._eagerly(model, say("vgpu.compiled.other_backend", backend=repr(backend)))
        if not self._prepare():
            return self._eagerly(model, say("vgpu.compiled.no_triton"))
        if backend not in ("inductor", None):
            compiled = self._compile(model, fullgraph=fullgraph, dynamic=dynamic, backend=backend, options=options)
            return compiled if isinstance(model, nn.Module) else self._without_hooks(compiled)
        if mode == "max-autotune":
            self._device.note(say("vgpu.compiled.max_autotune"))
        with_graphs = bool((options or {}).get(_GRAPHS_OPTION, mode in _MODES_WITH_GRAPHS))
        own = functools.partial(self.backend, with_graphs=with_graphs) if with_graphs else self.backend
        compiled = self._compile(model, fullgraph=fullgraph, dynamic=dynamic, backend=own)
        return compiled if isinstance(model, nn.Module) else self._without_hooks(compiled)

    @contextlib.contextmanager
    def running(self, module: nn.Module | None) -> Iterator[None]:
        """Count the lines within as one call of a compiled module or function."""
        self._graphs.called()
        with self._device.phases.compiled_call(module):
            yield

    def _without_hooks(self, compiled: Callable[P, R]) -> Callable[P, R]:
        phases, is_step = self._device.phases, False

        @functools.wraps(compiled)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal is_step
            traced, counted = phases.compiled_steps, phases.steps
            with self.running(None):
                result = compiled(*args, **kwargs)
            is_step = is_step or phases.compiled_steps > traced
            if is_step and phases.steps == counted:
                phases.after_compiled_step()
            return result

        if (
            "_torchdynamo_wrapper_id" in call.__dict__
        ):  # by which Dynamo tells a wrapper of its own when it compiles one
            call.__dict__["_torchdynamo_wrapper_id"] = id(call)
        return call

    def _prepare(self) -> bool:
        if self._ready is None:
            self._ready = importlib.util.find_spec("triton") is not None
            if self._ready:
                self._prepare_inductor()
        return self._ready

    def _eagerly(self, model: nn.Module | Callable[P, R], note: str) -> nn.Module | Callable[P, R]:
        """Return what runs as it is. Of a function the note waits for a call: libraries compile some as they load."""
        if isinstance(model, nn.Module):
            self._device.note(note)
            return model

        @functools.wraps(model)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            self._device.note(note)
            return model(*args, **kwargs)

        return call

    def backend(
        self, graph: fx.GraphModule, inputs: Sequence[Tensor | int | torch.SymInt | None], with_graphs: bool = False
    ) -> Function:
        """Return a function for one of Dynamo's graphs that takes the memory of Inductor's code."""
        from torch._dynamo.exc import RestartAnalysis
        from torch._inductor.compile_fx import compile_fx

        self.kept_frames.compiles(graph)
        try:
            no_cache = importlib.import_module("torch._functorch.config").patch(enable_autograd_cache=False)
            with self._device.phases.named("compile"), _without_collector(), no_cache:
                compiled = compile_fx(graph, inputs, functools.partial(self._compile_graph, with_graphs=with_graphs))
        except (RestartAnalysis, torch.OutOfMemoryError):  # Dynamo traces the function otherwise, or passes it on
            raise
        except Exception as error:  # Inductor's passes and their libraries raise any kind; the script runs eagerly
            first = (str(error).splitlines() or [""])[0]
            self._device.note(say("vgpu.compiled.failed", kind=type(error).__name__, error=f"{first:.200}"))
            return graph.forward
        assert callable(compiled)
        return compiled

    def _without_templates(self) -> AbstractContextManager[object]:
        """Return a context in which Inductor takes cuBLAS's products: it would time its own templates on the card."""
        config = importlib.import_module("torch._inductor.config")
        names = ("max_autotune", "max_autotune_gemm")
        if any(getattr(config, name) for name in names):
            self._device.note(say("vgpu.compiled.max_autotune"))
        patched: AbstractContextManager[object] = config.patch(dict.fromkeys(names, False))
        return patched

    def _compile_graph(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[Tensor | int],
        *,
        with_graphs: bool = False,
        is_backward: bool = False,
        is_inference: bool = False,
        **_: object,
    ) -> "OutputCode":
        """Return Inductor's wrapper of one forward or backward graph, as a function of a list of its inputs."""
        with self._device.phases.named("compile"), self._without_templates():
            wrapper = wrapper_of(graph, inputs, is_backward=is_backward, is_inference=is_inference)
        call = run_wrapper(wrapper, self._device, self._trials)
        if with_graphs and wrapper.no_cuda_graph_because:
            self._device.note(say("vgpu.compiled.no_cuda_graph", reason=wrapper.no_cuda_graph_because))
            with_graphs = False
        return self._boxed(call, with_graphs, is_backward, is_inference)

    def _boxed(self, call: Call, with_graphs: bool, is_backward: bool, is_inference: bool) -> "OutputCode":
        def run(arguments: list[Argument]) -> Argument:
            kept_there = (
                self._graphs.run(arguments, backward=is_backward, inference=is_inference)
                if with_graphs
                else contextlib.nullcontext()
            )
            try:
                with kept_there, torch.no_grad():
                    return call(arguments)
            finally:
                self._device.compiled_line = ()

        run.__dict__["_boxed_call"] = True
        return cast("OutputCode", run)  # all that compile_fx needs of one is a boxed call


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector takes a sixth of Inductor's time and finds nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
