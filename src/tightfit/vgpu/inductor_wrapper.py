"""Inductor's wrapper code, run without kernels: its buffers are virtual tensors."""

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch._C._dynamo import guards
from torch.utils._python_dispatch import _disable_current_modes

from tightfit.kernels.cost import fused_kernel, kernel_of
from tightfit.kernels.temporaries import Argument
from tightfit.vgpu.autotuning import Kernel, Trials
from tightfit.vgpu.device import VirtualDevice
from tightfit.vgpu.frames import Frame, frames_of_text
from tightfit.wording import say

if TYPE_CHECKING:
    from torch._inductor.graph import GraphLowering

Call = Callable[[list[Argument]], Argument]
"""A compiled graph: a function of the list of its inputs."""
_TELL = "_tightfit_buffer_follows"


@dataclass(frozen=True)
class Wrapper:
    """Inductor's output for one graph."""

    code: str
    """Python source."""
    lines: dict[str, tuple[Frame, ...]]
    """The user's lines of each buffer."""
    no_cuda_graph_because: str
    """Empty where the graph can be recorded."""


def wrapper_of(
    graph: fx.GraphModule, inputs: Sequence[Tensor | int], *, is_backward: bool, is_inference: bool
) -> Wrapper:
    """Return Inductor's code for a graph of aten operators. Nothing is compiled or run."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes, record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

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
        _recursive_post_grad_passes(graph, is_inference=is_inference)
        assert fake_mode is not None, "a graph without tensors is not compiled"
        lowering = GraphLowering(
            graph,
            example_inputs=inputs,
            is_backward=is_backward,
            is_inference=is_inference,
            shape_env=fake_mode.shape_env,
        )
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            if context.output_strides is not None:
                context.output_strides.extend(_strides_of_outputs(lowering))
            code = lowering.codegen()[0]
            reason = lowering.disable_cudagraphs_reason or ""
            if not reason and "cpu" in lowering.device_types:
                reason = "it also uses tensors of the host"
            return Wrapper(str(getattr(code, "value", code)), _lines_of_buffers(lowering), reason.strip())


def _strides_of_outputs(lowering: "GraphLowering") -> Iterator[tuple[int, ...] | None]:
    """Yield the strides that Inductor chose for each output; None for those of no tensor, and of unknown sizes.

    The graph of the backward pass is then compiled for saved tensors as they are, "channels last" for example.
    """
    for out in lowering.graph_outputs or ():
        strides: Sequence[object] = out.get_layout().stride if out.has_tensor_output() else (None,)
        known = [int(str(stride)) for stride in strides if str(stride).isdecimal()]  # a number, or a formula of sizes
        yield tuple(known) if len(known) == len(strides) else None


def _lines_of_buffers(lowering: "GraphLowering") -> dict[str, tuple[Frame, ...]]:
    """Return the user's lines of each buffer's operator; of several fused ones, the last."""
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


def run_wrapper(wrapper: Wrapper, device: VirtualDevice, trials: Trials) -> Call:
    """Return the wrapper's function; while it runs, `device.compiled_line` holds the lines of the next buffer."""
    names = _answers(device, trials)
    tree = ast.parse(wrapper.code)
    tree.body = [statement for statement in tree.body if not _bound_names(statement) & names.keys()]
    tree = ast.fix_missing_locations(_TellBuffers().visit(tree))

    def buffer_follows(name: str) -> None:
        device.compiled_line = wrapper.lines.get(name, ())

    names[_TELL] = buffer_follows
    exec(compile(tree, "<inductor>", "exec"), names)  # our own compiler's output of this very process
    call = names["call"]
    assert callable(call)
    return call


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


class _TellBuffers(ast.NodeTransformer):
    """Inserts a call that names the buffer before each `buf12 = ...` of a wrapper."""

    def visit_Assign(self, statement: ast.Assign) -> ast.Assign | list[ast.stmt]:
        target = statement.targets[0]
        if not isinstance(target, ast.Name) or not target.id.startswith("buf"):
            return statement
        told = ast.Call(ast.Name(_TELL, ast.Load()), [ast.Constant(target.id)], [])
        return [ast.Expr(told), statement]


def _answers(device: VirtualDevice, trials: Trials) -> dict[str, object]:
    """Names of the wrapper with their stand-ins for kernels, streams and allocations."""
    kernels = _NoKernels(device, trials)
    names = ("async_compile", "triton", "tl", "start_graph", "end_graph", "triton_heuristics")
    return {
        "__name__": "tightfit.vgpu.inductor_wrapper",
        **dict.fromkeys(names, kernels),
        "AsyncCompile": lambda *args, **kwargs: kernels,
        "extern_kernels": _Gemms(device),
        "get_raw_stream": lambda index: 0,
        "get_cuda_stream": lambda index: 0,
        **dict(_layout_checks(device)),
        "assert_alignment": lambda *args, **kwargs: None,
        "empty_strided_cuda": _empty,
        "empty_strided_cpu": _empty_host,
        "empty_strided_cpu_pinned": _empty_host,
        "reinterpret_tensor": _reinterpret,
    }


def _empty(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, **_: object) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


def _empty_host(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, **_: object) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def _reinterpret(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(tensor, size, stride, int(tensor.storage_offset()) + offset)


def _layout_checks(device: VirtualDevice) -> Iterator[tuple[str, Callable[..., None]]]:
    """Yield what Inductor's code calls to compare tensors with the sizes and strides that it was written for."""
    utilities = sys.modules.get("torch._inductor.runtime.runtime_utils")  # loaded if code has been written
    for name in ("assert_size_stride", "assert_size_stride_grouped", "assert_tensor_metadata"):  # 2.15 has all three
        check = getattr(guards, name, None) or getattr(utilities, name, None)
        if check is not None:
            yield name, _noted(device, check)


def _noted(device: VirtualDevice, check: Callable[..., None]) -> Callable[..., None]:
    """Return a check that notes where the virtual GPU differs. An operator of the script fails as on a card."""

    def noted(*args: object) -> None:
        operator = args[-1] if isinstance(args[-1], str) else "input"
        try:
            check(*args)
        except (AssertionError, RuntimeError):
            if not operator.startswith(_OF_TORCH):
                raise
            device.note(say("vgpu.compiled.layout", operator=operator))

    return noted


_OF_TORCH = ("input", "torch.ops.aten.", "torch.ops.prims.", "torch.ops.inductor.", "torch.ops.prim.")


class _NoKernels:
    """Stands in for compiled kernels and their compilers: accepts every call, does nothing."""

    def __init__(self, device: VirtualDevice, trials: Trials, kernel: Kernel | None = None) -> None:
        self._device, self._trials, self._kernel = device, trials, kernel

    def triton(self, name: str, source: str, *_: object, **__: object) -> "_NoKernels":
        """Define a kernel of Inductor's, given its Python source."""
        return _NoKernels(self._device, self._trials, self._trials.kernel(source))

    def __call__(self, *args: object, **kwargs: object) -> "_NoKernels":
        if self._kernel is not None:
            self._kernel.tune(args)
        if self._device.observer is not None:
            buffers = [argument for argument in args if isinstance(argument, Tensor)]
            if buffers:
                self._device.observer(fused_kernel(buffers))
        return self

    def __getattr__(self, name: str) -> "_NoKernels":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "_NoKernels":
        return self


class _Gemms:
    """Inductor's calls of cuBLAS with an output of its own: nothing but a workspace is taken."""

    def __init__(self, device: VirtualDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Argument]:
        operator = getattr(torch.ops.aten, name, None)
        overload = getattr(operator, "default", None)

        def call(*args: Argument, out: Tensor | None = None, **kwargs: Argument) -> Argument:
            if out is None:
                made: Argument = getattr(torch.ops.aten, name)(*args, **kwargs)
                return made
            if overload is not None:
                self._device.take_workspaces(overload, args, kwargs)
                if self._device.observer is not None and (kernel := kernel_of(overload, args, {}, out)) is not None:
                    self._device.observer(kernel)
            return out

        return call
