"""Python's tracebacks, and IPython's: the frames of one exception, and the phase of training that they are in."""

import re
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace


class TraceFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a traceback."""

    file: str
    """The path as printed, or `cell N` of a notebook."""
    line: int | None
    """Counted from 1; None if the traceback does not print it."""
    function: str
    """The function's name, `<module>` outside one."""
    source: str | None = None
    """The line of code, if the traceback shows it."""

    @property
    def is_library(self) -> bool:
        """True if the file belongs to an installed package or to Python rather than to the user."""
        path = self.file.replace("\\", "/")
        inside = ("site-packages/", "dist-packages/", "/lib/python", "<frozen", "importlib", "torchinductor_")
        return any(part in path for part in inside) or path.startswith("torch/")


_FRAME = re.compile(r'File "([^"\n]{1,1000})", line (\d{1,9})(?:, in ([^\n]{1,300}))?')
_NOTEBOOK = re.compile(
    r"(?:File )?(?P<file>[~/.\w<\\:][^\n,:()]{0,400}?)(?:\.py:(?P<line>\d{1,8}))?,? in (?P<function>[\w.<>]{1,200})\("
)
_CELL = re.compile(r"(?:Input In|Cell In) ?\[(\d{1,6})\],? (?:line (\d{1,8})|in )")
_ARROW = re.compile(r"-+> *(\d{1,8})[ |]?(.*)")
_CARETS = re.compile(r"[\s^~]+")


def frames_of(lines: Sequence[str]) -> tuple[TraceFrame, ...]:
    """Return the frames of the last traceback in `lines`, which end where the exception's message starts.

    Prefixes of loggers may stand before them: only lines that quote a file count.
    """
    start = len(lines)
    for start in range(len(lines) - 1, -1, -1):
        if "most recent call last" in lines[start]:
            break
    else:
        start = -1
    found = list(_frames(lines[start + 1 :]))
    if start < 0 and found:  # the head was cut off, or is far away: only what stands close together
        return tuple(found[-60:])
    return tuple(found)


def _frames(lines: Iterable[str]) -> Iterable[TraceFrame]:
    waiting: TraceFrame | None = None
    for line in lines:
        match = _FRAME.search(line)
        if match:
            if waiting:
                yield waiting
            function = (match[3] or "<module>").strip()
            waiting = TraceFrame(file=match[1], line=int(match[2]), function=function)
            continue
        arrow = _ARROW.match(line.strip())
        if arrow:
            if waiting:
                yield replace(waiting, line=int(arrow[1]), source=arrow[2].strip()[:400] or None)
                waiting = None
            continue
        notebook = _notebook(line)
        if notebook:
            if waiting and waiting.line is not None:
                yield waiting
            waiting = notebook
        elif waiting and waiting.line is not None and line.strip() and not _CARETS.fullmatch(line):
            yield replace(waiting, source=line.strip()[:400])
            waiting = None
    if waiting and waiting.line is not None:
        yield waiting


def _notebook(line: str) -> TraceFrame | None:
    """Return a frame from its head in IPython's format; its line of code follows behind an arrow."""
    text = line.strip()
    cell = _CELL.match(text)
    if cell:
        return TraceFrame(file=f"cell {cell[1]}", line=int(cell[2]) if cell[2] else None, function="<module>")
    if " in " not in text or not text.startswith(("File ", "~", "/", "<ipython", "C:", "D:", "E:")):
        return None
    match = _NOTEBOOK.match(text)
    if not match:
        if text.startswith("<ipython") and " in <module>" in text:
            return TraceFrame(file=text.split(" in ")[0], line=None, function="<module>")
        return None
    file = match["file"] + (".py" if match["line"] else "")
    return TraceFrame(file=file, line=int(match["line"]) if match["line"] else None, function=match["function"])


_SAVE = re.compile(
    r"torch\.save\(|save_checkpoint|save_pretrained\(|save_model|_save_to_state_dict"
    r"|safetensors.*save"
)
_RESUME = re.compile(r"load_state_dict|torch\.load\(|load_checkpoint|resume_from|_load_from_state_dict")
_SAMPLE = re.compile(r"\.generate\(|\bsample_sequence\(")
_EVAL = re.compile(
    r"(?:estimate_loss|evaluate|evaluation|evaluation_loop|validate|validation|validation_step|eval|eval_step|"
    r"prediction_step|eval_model|run_eval|eval_epoch|test_step|evaluation_step|eval_loss|compute_val_loss|"
    r"_?run_validation|val_epoch|do_eval|calc_loss_loader)"
)
_EVAL_CALL = re.compile(r"\b(?:estimate_loss|trainer\.evaluate|\.evaluate|validate|evaluate_model)\(")
_OPTIMIZER = re.compile(r"\b(?:optimizers?|opt|optim|scaler|self\.optimizer)\w*(?:\[[^\]]{1,20}\])?\.step\(")
_BACKWARD = re.compile(r"\.backward\(|_engine_run_backward|run_backward\(")
_LOSS = re.compile(
    r"cross_entropy\(|CrossEntropyLoss|nll_loss|\bloss_fn\(|\bcriterion\(|log_softmax\(|compute_loss_fn\("
)
_SETUP = re.compile(
    r"\.to\(|\.cuda\(|from_pretrained\(|DistributedDataParallel\(|\bDDP\(|torch\.compile\(|\.half\(|\.bfloat16\(|"
    r"init_process_group|\.to_empty\(|FullyShardedDataParallel\("
)
_COMPILE = re.compile(
    r"compile_fx(?:_inner)?|_?compile_inner|_compile|compile_to_fn|compile_to_module|codegen|codegen_and_compile|"
    r"fx_codegen_and_compile|autotune_to_one_config|benchmark(?:_all_configs)?|do_autotuning|transform_code_object|"
    r"call_user_compiler|coordinate_descent_tuning"
)


def phase_of(frames: Sequence[TraceFrame]) -> str | None:
    """Return the phase of training that a stack is in, or None if no frame shows it.

    Saving, resuming, sampling and evaluation come first, because they run the model for another purpose. In a
    training step, the last part that was entered names the phase.
    """
    functions = {frame.function.rsplit(".", 1)[-1] for frame in frames}
    code = "\n".join(frame.source or "" for frame in frames)

    def runs(pattern: re.Pattern[str]) -> bool:
        return bool(pattern.search(code)) or any(pattern.search(f"{name}(") for name in functions)

    if not frames:
        return None
    if runs(_SAVE):
        return "save"
    if runs(_RESUME):
        return "resume"
    if functions & {"generate", "sample"} or _SAMPLE.search(code):
        return "sample"
    if any(_EVAL.fullmatch(name) for name in functions) or _EVAL_CALL.search(code):
        return "eval"
    paths = [frame.file.replace("\\", "/") for frame in frames]
    if _OPTIMIZER.search(code) or any("torch/optim/" in path for path in paths):
        return "optimizer"
    if _BACKWARD.search(code) or "backward" in functions:
        return "backward"
    if any(map(_COMPILE.fullmatch, functions)) and any("torch/_" in path or "triton/" in path for path in paths):
        return "compile"
    if runs(_LOSS):
        return "loss"
    if any(
        name == "forward" or name.startswith(("training_step", "_call_impl", "_wrapped_call")) for name in functions
    ):
        return "forward"
    if _SETUP.search(code) or functions & {"convert", "_apply", "from_pretrained"}:
        return "setup"
    return None
