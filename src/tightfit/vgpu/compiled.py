"""`torch.compile` on the virtual GPU: Inductor compiles for the card, and its own wrapper code runs without kernels.

Which buffers a compiled graph takes, reuses and frees is decided by Inductor when it fuses and schedules, and written
down in the wrapper that calls the kernels. That wrapper runs here: its buffers are virtual tensors, its kernels do
nothing. Inductor needs to believe that Triton and the card are there; Triton is only imported.
"""

import ast
import contextlib
import functools
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tightfit.kernels.cost import fused_kernel, kernel_of
from tightfit.vgpu.device import VirtualDevice, VirtualDeviceMode
from tightfit.vgpu.frames import Frame, frames_of_text
from tightfit.vgpu.graphs import CudaGraphs

_MODES_WITH_GRAPHS = ("reduce-overhead", "max-autotune")
_GRAPHS_OPTION = "triton.cudagraphs"


class Compiler:
    """Stands for `torch.compile` in a process with a virtual GPU."""

    def __init__(self, device: VirtualDevice, properties: Any) -> None:
        self._device, self._properties = device, properties
        self._compile = torch.compile
        self._ready: bool | None = None
        self._graphs = CudaGraphs(device)

    def compile(
        self,
        model: Any = None,
        *,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        backend: Any = "inductor",
        mode: str | None = None,
        options: dict[str, Any] | None = None,
        disable: bool = False,
    ) -> Any:
        """Compile like `torch.compile`; a model that cannot be compiled here runs eagerly, and the report names it."""
        if model is None:
            return lambda function: self.compile(
                function,
                fullgraph=fullgraph,
                dynamic=dynamic,
                backend=backend,
                mode=mode,
                options=options,
                disable=disable,
            )
        if disable:
            return model
        if backend not in ("inductor", None):
            self._say(f"torch.compile(backend={backend!r}): run eagerly")
            return model
        if not self._prepare():
            return model
        if mode == "max-autotune":
            self._say("torch.compile(mode='max-autotune'): what trying out kernels takes while compiling")
        with_graphs = (options or {}).get(_GRAPHS_OPTION, mode in _MODES_WITH_GRAPHS)
        backend = functools.partial(self.backend, with_graphs=with_graphs) if with_graphs else self.backend
        compiled = self._compile(model, fullgraph=fullgraph, dynamic=dynamic, backend=backend)
        return compiled if isinstance(model, nn.Module) else self._without_hooks(compiled)

    def _without_hooks(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._graphs.called()
            with self._device.phases.compiled_call(None):
                return compiled(*args, **kwargs)

        return call

    def _say(self, what: str) -> None:
        if what not in self._device.not_modelled:
            self._device.not_modelled.append(what)

    def _prepare(self) -> bool:
        if self._ready is None:
            self._ready = importlib.util.find_spec("triton") is not None
            if self._ready:
                VirtualDeviceMode.hide_from_dynamo()
                _convince_inductor(self._device, self._properties)
                padding: Any = importlib.import_module("torch._inductor.fx_passes.pad_mm")
                padding.get_cached_should_pad = self._pads
                partitioners: Any = importlib.import_module("torch._functorch.partitioners")
                partitioners.functionalize_rng_ops = _same_random_numbers
                self._wrap_modules()
            else:
                self._say(
                    "torch.compile: run eagerly, which takes more memory, "
                    "because Triton is not installed (pip install triton)"
                )
        return self._ready

    def _pads(self, key: object) -> bool:
        """Return True: a card times whether padding unaligned matrices pays, and it nearly always does."""
        self._say("torch.compile: whether unaligned matrix products are padded, which a card would time; taken as yes")
        return True

    def _wrap_modules(self) -> None:
        """Calls of a compiled module count as one forward pass."""
        compiled_modules: Any = importlib.import_module("torch._dynamo.eval_frame").OptimizedModule
        usual = compiled_modules.__call__

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            self._graphs.called()
            with self._device.phases.compiled_call(module._orig_mod):
                return usual(module, *args, **kwargs)

        compiled_modules.__call__ = call

    def backend(self, graph: Any, inputs: list[Any], with_graphs: bool = False) -> Any:
        """Return a function for one of Dynamo's graphs that takes the memory of Inductor's code."""
        from torch._inductor.compile_fx import compile_fx

        try:
            no_cache = importlib.import_module("torch._functorch.config").patch(enable_autograd_cache=False)
            with self._device.phases.named("compile"), _without_collector(), no_cache:
                compile_graph = functools.partial(self._compile_graph, with_graphs=with_graphs)
                return compile_fx(graph, inputs, inner_compile=compile_graph)
        except Exception as error:  # Inductor raises what it likes; the script goes on without it
            first = (str(error).splitlines() or [""])[0]
            self._say(
                "torch.compile: a graph was run eagerly, which takes more memory, because Inductor failed here "
                f"({type(error).__name__}: {first:.200})"
            )
            return graph.forward

    def _compile_graph(self, graph: Any, inputs: list[Any], with_graphs: bool = False, **options: Any) -> Any:
        """Inductor's wrapper of one forward or backward graph, as a function of a list of its inputs."""
        with self._device.phases.named("compile"):
            wrapper = wrapper_of(graph, inputs, **options)
        call = self._run_wrapper(wrapper.code, wrapper.lines)
        if with_graphs and wrapper.no_cuda_graph_because:
            self._say(f"a CUDA graph, which torch.compile would not make either: {wrapper.no_cuda_graph_because}")
            with_graphs = False
        backward, inference = bool(options.get("is_backward")), bool(options.get("is_inference"))

        def run(arguments: list[Any]) -> Any:
            kept_there = (
                self._graphs.run(arguments, backward=backward, inference=inference)
                if with_graphs
                else contextlib.nullcontext()
            )
            try:
                with kept_there, torch.no_grad():
                    return call(arguments)
            finally:
                self._device.compiled_line = ()

        return _boxed(run)

    def _run_wrapper(self, code: str, lines: dict[str, tuple[Frame, ...]]) -> Callable[[list[Any]], Any]:
        names = self._answers()
        tree = ast.parse(code)
        tree.body = [statement for statement in tree.body if not _bound_names(statement) & names.keys()]
        tree = ast.fix_missing_locations(_TellBuffers().visit(tree))

        def buffer_follows(name: str) -> None:
            self._device.compiled_line = lines.get(name, ())

        names[_TELL] = buffer_follows
        exec(compile(tree, "<inductor>", "exec"), names)  # our own compiler's output of this very process
        return names["call"]  # type: ignore[no-any-return]

    def _answers(self) -> dict[str, Any]:
        """Names of the wrapper with their stand-ins for kernels, streams and allocations."""

        def empty(size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

        def empty_host(size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype)

        def reinterpret(tensor: Tensor, size: Any, stride: Any, offset: int = 0) -> Tensor:
            return torch.as_strided(tensor, size, stride, int(tensor.storage_offset()) + offset)

        kernels = _NoKernels(self._device)
        return {
            "__name__": "tightfit.vgpu.inductor_wrapper",
            "AsyncCompile": lambda *args, **kwargs: kernels,
            "async_compile": kernels,
            "triton": kernels,
            "tl": kernels,
            "start_graph": kernels,
            "end_graph": kernels,
            "triton_heuristics": kernels,
            "extern_kernels": _Gemms(self._device),
            "get_raw_stream": lambda index: 0,
            "get_cuda_stream": lambda index: 0,
            "assert_size_stride": lambda *args, **kwargs: None,
            "assert_alignment": lambda *args, **kwargs: None,
            "empty_strided_cuda": empty,
            "empty_strided_cpu": empty_host,
            "empty_strided_cpu_pinned": empty_host,
            "reinterpret_tensor": reinterpret,
        }


def _same_random_numbers(joint: Any, forward: Any, backward: Any, symbols: int) -> tuple[Any, Any]:
    """Torch gives what backward recomputes forward's random state, of the card's generators: host memory alone."""
    return forward, backward


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


class _NoKernels:
    """Stands in for compiled kernels and their compilers: accepts every call, does nothing."""

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._device.observer is not None:
            buffers = [argument for argument in args if isinstance(argument, Tensor)]
            if buffers:
                self._device.observer(fused_kernel(buffers))
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self


class _Gemms:
    """Inductor's calls of cuBLAS with an output of its own: nothing but a workspace is taken."""

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.aten, name, None)

        def call(*args: Any, **kwargs: Any) -> Any:
            out = kwargs.pop("out", None)
            if out is None:
                return operator(*args, **kwargs)  # type: ignore[misc]
            overload = getattr(operator, "default", None)
            if overload is not None:
                self._device.take_workspaces(overload, args, kwargs)
                if self._device.observer is not None and (kernel := kernel_of(overload, args, {}, out)) is not None:
                    self._device.observer(kernel)
            return out

        return call


_TELL = "_tightfit_buffer_follows"


class _TellBuffers(ast.NodeTransformer):
    """Inserts a call that names the buffer before each `buf12 = ...` of a wrapper."""

    def visit_Assign(self, statement: ast.Assign) -> Any:
        target = statement.targets[0]
        if not isinstance(target, ast.Name) or not target.id.startswith("buf"):
            return statement
        said = ast.Call(ast.Name(_TELL, ast.Load()), [ast.Constant(target.id)], [])
        return [ast.Expr(said), statement]


@dataclass(frozen=True)
class Wrapper:
    """Inductor's output for one graph."""

    code: str
    """Python source."""
    lines: dict[str, tuple[Frame, ...]]
    """The user's lines of each buffer."""
    no_cuda_graph_because: str
    """Empty where the graph can be recorded."""


def wrapper_of(graph: Any, inputs: list[Any], **options: Any) -> Wrapper:
    """Inductor's code for a graph of aten operators. Nothing is compiled or run."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    inference, backward = bool(options.get("is_inference")), bool(options.get("is_backward"))
    values = (node.meta.get("val") for node in graph.graph.nodes)
    fake_mode = torch._guards.detect_fake_mode([value for value in values if isinstance(value, Tensor)])
    context = torch._guards.TracingContext.try_get() or torch._guards.TracingContext(fake_mode)
    with (
        _disable_current_modes(),
        V.set_fake_mode(fake_mode),
        torch._guards.tracing(context),
        DebugContext(),
    ):
        record_original_output_strides(graph)
        _recursive_post_grad_passes(graph, is_inference=inference)
        assert fake_mode is not None, "a graph without tensors is not compiled"
        lowering = GraphLowering(
            graph, example_inputs=inputs, is_backward=backward, is_inference=inference, shape_env=fake_mode.shape_env
        )
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            code = lowering.codegen()[0]
            reason = lowering.disable_cudagraphs_reason or ""
            if not reason and "cpu" in lowering.device_types:
                reason = "it also uses tensors of the host"
            return Wrapper(
                code if isinstance(code, str) else str(code.value), _lines_of_buffers(lowering), reason.strip()
            )


def _lines_of_buffers(lowering: Any) -> dict[str, tuple[Frame, ...]]:
    """The lines of the operator that each buffer is the result of: of several fused ones the last."""
    order = {node: number for number, node in enumerate(lowering.graph.nodes)}
    lines = {}
    for buffer in lowering.buffers:
        own = getattr(buffer, "origin_node", None)
        origins = (
            [own] if own is not None else sorted(getattr(buffer, "origins", ()), key=lambda node: order.get(node, 0))
        )
        traces = [node.meta["stack_trace"] for node in origins if node.meta.get("stack_trace")]
        if traces:
            lines[buffer.get_name()] = frames_of_text(traces[-1])
    return lines


def _boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


def _convince_inductor(device: VirtualDevice, properties: Any) -> None:
    """Answer where Inductor asks the machine for Triton and for the card."""
    interfaces: Any = importlib.import_module("torch._dynamo.device_interface")
    cuda: Any = interfaces.CudaInterface
    major, minor = device.card.capability
    answers: dict[str, Any] = {
        "get_device_properties": lambda where=None: properties,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda where: None,
        "get_raw_stream": lambda index=0: 0,
        "get_compute_capability": lambda where=None: major * 10 + minor,
        "is_triton_capable": lambda where=None: True,
        "raise_if_triton_unavailable": lambda where=None: None,
        "is_bf16_supported": lambda including_emulation=False: True,
        "synchronize": lambda where=None: None,
        "exchange_device": lambda index: 0,
        "maybe_exchange_device": lambda index: 0,
    }
    for name, answer in answers.items():
        setattr(cuda, name, staticmethod(answer))
    cuda.Worker.get_device_properties = staticmethod(lambda where=None: properties)
    cuda.Worker.current_device = staticmethod(lambda: 0)
    triton: Any = importlib.import_module("torch.utils._triton")
    triton.has_triton = triton.has_triton_package = lambda *args, **kwargs: True
    triton.triton_hash_with_backend = lambda *args, **kwargs: "virtual"
    triton.triton_backend = lambda *args, **kwargs: None
    codecache: Any = importlib.import_module("torch._inductor.codecache")
    codecache.triton_key = lambda: "virtual"  # it hashes all of Triton's files, which takes a second or two
    scheduler: Any = importlib.import_module("torch._inductor.scheduler")
    for name in ("has_triton", "has_triton_package"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, lambda *args, **kwargs: True)
    configuration: Any = importlib.import_module("torch._inductor.config")
    configuration.joint_graph_constant_folding = False  # would compute constants on the device
    configuration.compile_threads = 1  # no kernels are compiled: workers would only be started
