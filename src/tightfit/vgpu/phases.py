"""Phase of a running script, recognized by its calls of torch."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tightfit.vgpu.records import Phase

_LOSS_OPERATORS = frozenset(
    {
        "aten::_log_softmax",
        "aten::nll_loss_forward",
        "aten::nll_loss2d_forward",
        "aten::mse_loss",
        "aten::binary_cross_entropy_with_logits",
        "aten::binary_cross_entropy",
        "aten::smooth_l1_loss",
        "aten::huber_loss",
    }
)


TraceFunction = Callable[[FrameType, str, object], object]


class EnoughSeen(BaseException):
    """End of the script, because the rest repeats recorded steps. Not an Exception, so that scripts do not catch it."""


class _Course(threading.local):
    """Unfinished calls of one thread."""

    def __init__(self) -> None:
        self.depth = 0
        """Modules around the running line."""
        self.is_untraced = False
        """True while the trace function is off for the sake of these."""
        self.with_grad = True
        self.evaluates = False
        """True in a forward pass of an evaluation, with gradients or without."""
        self.steps_open = 0
        self.named: list[Phase] = []


class Phases:
    """Follows the script by hooks on modules, optimizers and autograd."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        """`on_step` is called after each optimizer step, in the script's own thread."""
        self._on_step = on_step
        self.after_forward: Callable[[nn.Module], None] | None = None
        """Called with each module of the script after its forward pass."""
        self._course = _Course()
        self._outside: Phase = "setup"  # of operators outside all modules: it follows the course of a step
        self.trace: TraceFunction | None = None
        """Python's trace function while lines are followed: off in modules and operators, which it slows down."""
        self.steps = 0
        self.trained = 0
        """Forward passes with gradients, but those of an evaluation, and optimizer steps."""
        self.evaluated = 0
        """Those of an evaluation: without gradients, or of a module in eval mode that trains at other times."""
        self._evaluated_with_grad = 0
        self.has_evaluated = False
        """True once one of these ran."""
        self._trained_modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.backwards = 0
        self.after_module: Callable[[nn.Module], None] | None = None
        """Called after each forward pass of a module, while lines are followed."""
        self.after_evaluation: Callable[[], None] | None = None
        """Called after each of these, in the script's own thread."""
        self.passes = 0
        """Backward passes since the last optimizer step."""
        self.after_pass: Callable[[], None] | None = None
        """Called after each of these, if there is an optimizer of torch's."""
        self.compiled_calls = 0
        """Calls of compiled modules and functions that are running."""
        self.compiled_steps = 0
        """Optimizer steps that Dynamo compiled so far."""
        self._has_stepped = False
        """True if an optimizer stepped within the running backward pass."""
        self.asked: set[str] = set()
        """What a library's trainer shall do next: "evaluation", "end"."""
        self.has_optimizer = False
        self._is_installed = False  # until then, backward passes are the self-test's
        self.vocabulary = 0
        """Rows of the largest embedding so far: tensors with so many columns are logits."""
        self.modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def install(self) -> None:
        self._is_installed = True
        self._hook()

    def all_passes(self) -> int:
        """Return the number of forward passes with gradients and backward passes so far."""
        return self.backwards + self.trained + self._evaluated_with_grad - self.steps

    def learned(self) -> int:
        """Return a number that grows with each forward pass in training, backward pass and optimizer step."""
        return self.backwards + self.trained

    def is_asked(self, what: str) -> bool:
        """Return True once for each time that a library's trainer was asked for this."""
        is_asked = what in self.asked
        self.asked.discard(what)
        return is_asked

    def made_optimizer(self) -> None:
        """Count only optimizer steps from now on: the script has one of torch's."""
        if not self.has_optimizer:
            self.has_optimizer, self.steps = True, 0

    def after_backward(self) -> None:
        """Count a backward pass, also as a step if optimizers stepped in it or if there is none of torch's."""
        self.backwards += 1
        self.passes += 1
        if self._is_installed and (not self.has_optimizer or self._has_stepped) and not _in_backward():
            self._has_stepped = False
            self._end_step()
        elif self._is_installed and self.after_pass is not None and not _in_backward():
            self.after_pass()

    def pause_trace(self) -> bool:
        """Take the trace function off in this thread; False if it is not on."""
        if self.trace is None or sys.gettrace() is not self.trace:
            return False
        sys.settrace(None)
        return True

    def resume_trace(self) -> None:
        sys.settrace(self.trace)  # type: ignore[arg-type]

    @contextmanager
    def untraced(self) -> Iterator[None]:
        """Take the trace function off for a while, if it is on in this thread."""
        is_paused = self.pause_trace()
        try:
            yield
        finally:
            if is_paused:
                self.resume_trace()

    def _hook(self) -> None:
        self._handles = (
            nn.modules.module.register_module_forward_pre_hook(self._before_forward),
            nn.modules.module.register_module_forward_hook(self._after_forward, always_call=True),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        )

    @contextmanager
    def compiled_call(self, module: nn.Module | None) -> Iterator[None]:
        """Take our hooks off for one call of a compiled module or function: Dynamo would trace them and fail.

        Calls within others, also in other threads, leave them off until the last one ends.
        """
        if not self.compiled_calls:
            for handle in self._handles:
                handle.remove()
        self.compiled_calls += 1
        self._before_forward(module, ())
        try:
            yield
        finally:
            self._after_forward(module, (), ())
            self.compiled_calls -= 1
            if not self.compiled_calls:
                self._hook()

    @contextmanager
    def named(self, phase: Phase) -> Iterator[None]:
        """Set the phase for one call of the script, such as saving."""
        self._course.named.append(phase)
        try:
            yield
        finally:
            self._course.named.pop()

    def now(self, operator: str = "") -> Phase:
        """Return the phase of an operator that is about to run."""
        if _in_backward():
            self._outside = "optimizer" if self.modules or self.steps else self._outside  # else a warm-up
            return "backward"
        course = self._course
        if course.named:
            return course.named[-1]
        if course.steps_open:
            return "optimizer"
        if course.depth:
            if not course.with_grad:
                return "eval"
            return "loss" if operator in _LOSS_OPERATORS else "forward"
        return "loss" if operator in _LOSS_OPERATORS else self._outside

    def _before_forward(self, module: nn.Module | None, args: object) -> None:
        if _in_backward():  # a recomputed forward pass
            return
        course = self._course
        if course.depth == 0:
            if module is not None and module not in self.modules:
                self.modules.add(module)
                embeddings = (each for each in module.modules() if isinstance(each, nn.Embedding))
                self.vocabulary = max([self.vocabulary, *(each.num_embeddings for each in embeddings)])
            # Asked here and not for each operator: autocast's cast of a weight turns gradients on within no_grad.
            course.is_untraced = self.pause_trace()
            course.with_grad = torch.is_grad_enabled()
            self._outside = "loss" if course.with_grad else "eval"
            course.evaluates = not course.with_grad or self._evaluates_with_grad(module)
        course.depth += 1

    def _evaluates_with_grad(self, module: nn.Module | None) -> bool:
        """Tell an evaluation with gradients from a frozen teacher: only the former's module trains at other times."""
        if module is None:
            return False
        is_known = module in self._trained_modules
        if module.training and not is_known:
            self._trained_modules.update(module.modules())
        return is_known and not module.training

    def _after_forward(self, module: nn.Module | None, args: object, output: object) -> None:
        if not _in_backward():
            course = self._course
            course.depth = max(0, course.depth - 1)
            if not course.depth:
                if course.is_untraced:
                    self.resume_trace()
                if not course.steps_open:  # an optimizer may call modules and compiled functions of its own
                    self._count_pass(course)
            if self.after_forward is not None and module is not None:
                self.after_forward(module)
            if self.after_module is not None and module is not None:
                self.after_module(module)

    def _count_pass(self, course: _Course) -> None:
        self.trained += not course.evaluates
        self.evaluated += course.evaluates
        self._evaluated_with_grad += course.evaluates and course.with_grad
        self.has_evaluated = self.has_evaluated or course.evaluates
        if course.evaluates and self.after_evaluation is not None:
            self.after_evaluation()

    def after_compiled_step(self) -> None:
        """Count an optimizer step within a compiled function, which calls no hooks."""
        self._course.steps_open += 1
        self._after_step()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.optimizers.add(optimizer)
        self._course.steps_open += 1

    def _after_step(self, *_: object) -> None:
        self._course.steps_open -= 1
        if self._course.steps_open:
            return
        if _in_backward():
            self._has_stepped = True  # an optimizer for each parameter, in hooks: together they are one step
        else:
            self._outside = "forward"
            self.trained += 1
            self._end_step()

    def _end_step(self) -> None:
        self.steps += 1
        self.passes = 0
        self._on_step()


def _in_backward() -> bool:
    """True while autograd's engine runs this line, in any thread."""
    return torch._C._current_graph_task_id() != -1
