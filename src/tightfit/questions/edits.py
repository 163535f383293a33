"""Changes to a script's text that save memory: each finds its places in a tree and leaves all else as it is.

A change is only a proposal. `tightfit.questions.suggest` plays the changed script, and shows what fits.
"""

import ast
import builtins
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from tightfit.questions.script_text import (
    Function,
    ScriptText,
    Statements,
    calls,
    dotted,
    functions,
    has_call,
    loops,
    names_read,
    names_written,
)

_EVALUATION = re.compile(r"_*(eval|evaluate|evaluation|estimate|validate|validation|valid|val|test)(_.*)?")
_EVALUATES = re.compile(
    r"\beval\b|no_grad|inference_mode|set_grad_enabled|def _*(eval|evaluate|evaluation|estimate|validat|val|test)"
)
_OPTIMIZES = re.compile("Adam|SGD")
_NO_GRAD = ("no_grad", "inference_mode", "set_grad_enabled")
_OPTIMIZERS = ("Adam", "AdamW", "SGD")
_8BIT_TAKES = {"lr", "betas", "eps", "weight_decay"}
_PRETRAINED = re.compile(r"Auto(Model\w*)|\w+(ForCausalLM|LMHeadModel|For\w+|Model)")
_HEADER = "with torch.autocast('cuda', dtype=torch.bfloat16):"


@dataclass(frozen=True)
class Kind:
    """A kind of change."""

    code: str
    """Name in the sentences and in JSON."""
    is_exact: bool
    """True if the result stays the same, up to rounding."""
    costs_time: bool
    rewrite: Callable[[ScriptText], None]
    """Collects the changes of one file."""
    needs: re.Pattern[str]
    """Pattern of the texts to look through: parsing every file takes seconds."""
    option: str = ""
    """Option that does the same in a program with Transformers' TrainingArguments."""
    package: str = ""
    """Package that the option needs."""
    switch: re.Pattern[str] | None = None
    """Switch of a script's own argparse that does the same; its name is the first group."""

    def apply(self, text: str) -> str | None:
        """Return the changed text; None if the kind finds no place in it, or it is no Python."""
        return _applied(self, text)


@cache
def _applied(kind: Kind, text: str) -> str | None:
    """Change a text once: a search tries the same kinds again and again, upon every file that a script imports."""
    if not kind.needs.search(text):
        return None
    try:
        script = ScriptText(text)
    except (SyntaxError, ValueError):
        return None
    kind.rewrite(script)
    changed = script.changed
    try:
        ast.parse(changed or "")
    except SyntaxError:  # such as a second argument beside a generator without brackets
        return None
    return changed


def _no_grad(script: ScriptText) -> None:
    """Evaluate without autograd, which would keep the activations of every pass."""
    for function in functions(script.tree):
        if not _evaluates(function) or has_call(function, "backward") or _mentions(function, _NO_GRAD):
            continue
        if any(isinstance(each, ast.Call) and _is_model_call(each) for each in ast.walk(function)):
            script.needs_import("torch")
            script.add_line("@torch.no_grad()", before=function)


def _evaluates(scope: ast.AST) -> bool:
    """Return True for a function that evaluates, by its name or by its calls."""
    has_name = isinstance(scope, Function) and _EVALUATION.fullmatch(scope.name) is not None
    return has_name or has_call(scope, "eval") or _mentions(scope, _NO_GRAD)


def _mentions(tree: ast.AST, names: Sequence[str]) -> bool:
    return any(
        (isinstance(each, ast.Attribute) and each.attr in names) or (isinstance(each, ast.Name) and each.id in names)
        for each in ast.walk(tree)
    )


def _is_model_call(call: ast.Call) -> bool:
    """Return True for a call that may be a network's forward pass: `model(x)`, `self.net(x)`."""
    name = dotted(call.func)
    last = name.rpartition(".")[2]
    is_own = "." not in name or name.startswith("self.")
    return bool(name) and is_own and last.islower() and not hasattr(builtins, last) and bool(call.args or call.keywords)


def _detach(script: ScriptText) -> None:
    """Keep the values of losses without the graphs that made them."""
    for loop in loops(script.tree):
        scope = _scope_of(script, loop)
        if _mentions(scope, _NO_GRAD):
            continue
        losses = {dotted(call.func.value) for call in calls(scope, "backward") if isinstance(call.func, ast.Attribute)}
        numbers = set(_assigned_numbers(scope))
        for target, value in _kept(loop):
            is_loss = value.id in losses or "loss" in value.id
            if is_loss and value.id not in numbers and target not in losses:
                script.replace(value, f"{value.id}.detach()")


def _scope_of(script: ScriptText, loop: ast.For | ast.While) -> ast.AST:
    """Return the innermost function around a loop, or the whole tree."""
    around = [each for each in script.functions if each.lineno <= loop.lineno <= (each.end_lineno or 0)]
    return around[-1] if around else script.tree


def _kept(loop: ast.For | ast.While) -> Iterator[tuple[str, ast.Name]]:
    """Yield the names that a loop's statements add to something, and to what."""
    for each in _own_statements(loop.body):
        match each:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add(), value=ast.Name() as value):
                yield target, value
            case ast.Expr(
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=target), attr="append"), args=[ast.Name() as value])
            ):
                yield target, value


def _own_statements(body: Statements) -> Iterator[ast.stmt]:
    """Yield statements and those under `if`, `with` and `try`, without inner loops and functions."""
    for each in body:
        yield each
        if isinstance(each, ast.If | ast.With | ast.Try):
            yield from _own_statements([*each.body, *getattr(each, "orelse", [])])


def _assigned_numbers(scope: ast.AST) -> Iterator[str]:
    """Yield the names that somewhere get a Python number."""
    for each in ast.walk(scope):
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Call):
            name = dotted(each.value.func)
            if name in ("float", "int") or (
                isinstance(each.value.func, ast.Attribute) and each.value.func.attr == "item"
            ):
                yield from names_written(each)


def _zero_grad_first(script: ScriptText) -> None:
    """Give the last step's gradients back before the forward pass, not behind it."""
    for loop in loops(script.tree):
        body = loop.body
        zeroing = [each for each in body if isinstance(each, ast.Expr) and has_call(each.value, "zero_grad")]
        backward = _backward_in(body)
        if len(zeroing) != 1 or backward is None:
            continue
        place = body.index(zeroing[0])
        if 0 < place < backward and script.owns_its_lines(zeroing[0]) and script.owns_its_lines(body[0]):
            script.move(zeroing[0], body[0])


def _backward_in(body: Statements) -> int | None:
    """Return the first statement with a backward pass."""
    return next((place for place, each in enumerate(body) if has_call(each, "backward")), None)


def _delete(script: ScriptText) -> None:
    """Let go of a pass's outputs as soon as nothing reads them; a name would keep them for the whole next pass."""
    for loop in loops(script.tree):
        scope = _scope_of(script, loop)
        if not (any(has_call(each, "backward") for each in loop.body) or _evaluates(scope)):
            continue
        dying: dict[int, list[str]] = {}
        for name in _outputs(loop.body):
            last = _last_read(scope, loop, name)
            if last is not None:
                dying.setdefault(last, []).append(name)
        for place, names in dying.items():
            script.add_line(f"del {', '.join(names)}", after=loop.body[place])


def _outputs(body: Statements) -> Iterator[str]:
    """Yield the names that the body gives the outputs of a network: no loss, which is small and read later."""
    for each in body:
        inner = each.body if isinstance(each, ast.With) else [each]
        for statement in inner:
            match statement:
                case ast.Assign(targets=[target], value=ast.Call() as call) if _is_model_call(call):
                    names = [target] if isinstance(target, ast.Name) else getattr(target, "elts", [])
                    yield from (
                        name.id
                        for name in names
                        if isinstance(name, ast.Name) and name.id != "_" and not _is_loss(name.id)
                    )


def _is_loss(name: str) -> bool:
    return "loss" in name.lower()


def _last_read(scope: ast.AST, loop: ast.For | ast.While, name: str) -> int | None:
    """Return the statement of the loop's body that reads a name last; None where it must be kept."""
    own_elsewhere = [each for each in functions(scope) if each is not scope and name in names_written(each)]
    apart = {id(each) for tree in (loop, *own_elsewhere) for each in ast.walk(tree)}
    if any(isinstance(each, ast.Name) and each.id == name and id(each) not in apart for each in ast.walk(scope)):
        return None
    if any(
        isinstance(each, Function | ast.Lambda | ast.Delete) and name in _all_names(each) for each in ast.walk(loop)
    ):
        return None
    written = next(place for place, each in enumerate(loop.body) if name in names_written(each))
    if any(name in names_read(each) for each in loop.body[:written]):
        return None
    reading = [place for place, each in enumerate(loop.body) if name in names_read(each)]
    last = max([written, *reading])
    return None if isinstance(loop.body[last], ast.Return | ast.Continue | ast.Break) else last


def _all_names(tree: ast.AST) -> set[str]:
    return names_read(tree) | names_written(tree)


def _checkpoint(script: ScriptText) -> None:
    """Recompute the blocks of a network in the backward pass instead of keeping their activations."""
    if _mentions(script.tree, ("checkpoint", "gradient_checkpointing_enable")):
        return
    for function in functions(script.tree):
        if not function.args.args or function.args.args[0].arg != "self":
            continue
        for loop in loops(function):
            if not isinstance(loop, ast.For) or "self" not in names_read(loop.iter):
                continue
            blocks = names_written(loop.target)
            for call in (each for each in ast.walk(ast.Module(loop.body, [])) if isinstance(each, ast.Call)):
                if isinstance(call.func, ast.Name) and call.func.id in blocks and call.args:
                    _wrap(script, call)


def _wrap(script: ScriptText, call: ast.Call) -> None:
    script.needs_import("torch.utils.checkpoint")
    script.insert(script.start_of(call.args[0]), f"{script.text_of(call.func)}, ")
    script.replace(call.func, "torch.utils.checkpoint.checkpoint")
    _add_keyword(script, call, "use_reentrant=False")


def _add_keyword(script: ScriptText, call: ast.Call, keyword: str) -> None:
    """Add an argument before a call's closing bracket."""
    last = max(map(script.end_of, (*call.args, *(each.value for each in call.keywords))))
    behind = script.text_of(call).encode()[last - script.start_of(call) : -1].decode()
    has_comma = "," in re.sub(r"#[^\n]*", "", behind)
    space = "" if behind[-1:].isspace() else " "
    script.insert(script.end_of(call) - 1, f"{space}{keyword}" if has_comma else f", {keyword}")


_CHECKPOINT_SWITCH = re.compile(
    r"add_argument\(\s*['\"](--(?:use[-_])?(?:grad(?:ient)?|activation)[-_]checkpoint(?:ing)?)['\"][^)]*store_true"
)


def _model_checkpoint(script: ScriptText) -> None:
    """The same for a model of Transformers, which has a switch."""
    if _mentions(script.tree, ("gradient_checkpointing_enable",)):
        return
    for each in ast.walk(script.tree):
        match each:
            case ast.Assign(
                targets=[ast.Name(id=name)],
                value=ast.Call(func=ast.Attribute(value=owner, attr="from_pretrained" | "from_config")),
            ) if _PRETRAINED.fullmatch(dotted(owner).rpartition(".")[2]):
                script.add_line(f"{name}.gradient_checkpointing_enable()", after=each)


def _fused(script: ScriptText) -> None:
    """Update the weights in one kernel, without copies of all of them."""
    for call in _optimizers(script.tree):
        if not {"fused", "foreach", None} & {each.arg for each in call.keywords}:
            _add_keyword(script, call, "fused=True")


def _optimizers(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that make one of PyTorch's own optimizers."""
    imported = {
        alias.asname or alias.name
        for each in ast.walk(tree)
        if isinstance(each, ast.ImportFrom) and each.module == "torch.optim"
        for alias in each.names
    }
    for each in ast.walk(tree):
        if not isinstance(each, ast.Call) or not each.args:
            continue
        owner, _, name = dotted(each.func).rpartition(".")
        if name in _OPTIMIZERS and (owner in ("torch.optim", "optim") or (not owner and name in imported)):
            yield each


def _8bit(script: ScriptText) -> None:
    """Keep the optimizer's moments in 8 bits."""
    if find_spec("bitsandbytes") is None:
        return
    for call in _optimizers(script.tree):
        name = dotted(call.func).rpartition(".")[2]
        if name in ("Adam", "AdamW") and {each.arg for each in call.keywords} <= _8BIT_TAKES and len(call.args) == 1:
            script.needs_import("bitsandbytes")
            script.replace(call.func, f"bitsandbytes.optim.{name}8bit")


def _autocast(script: ScriptText) -> None:
    """Compute the forward pass in bfloat16."""
    if _mentions(script.tree, ("autocast", "bfloat16", "half", "float16", "bf16", "fp16")):
        return
    for loop in loops(script.tree):
        body = loop.body
        backward = _backward_in(body)
        forward = next(
            (place for place, each in enumerate(body) if isinstance(each, ast.Assign) and _calls_model(each)), None
        )
        if backward is None or forward is None or forward >= backward:
            continue
        part = list(itertools.takewhile(lambda each: not has_call(each, "zero_grad"), body[forward:backward]))
        rest = body[forward + len(part) : backward]
        if all(has_call(each, "zero_grad") for each in rest) and all(map(script.owns_its_lines, part)):
            script.needs_import("torch")
            script.indent_under(_HEADER, part)


def _calls_model(tree: ast.AST) -> bool:
    return any(isinstance(each, ast.Call) and _is_model_call(each) for each in ast.walk(tree))


_AMP_SWITCH = re.compile(
    r"add_argument\(\s*(?:['\"]-\w['\"],\s*)?['\"](--(?:use[-_])?(?:amp|bf16|fp16|mixed[-_]precision))['\"][^)]*store_true"
)
_NOWHERE = re.compile(r"(?!)")
"""Pattern for a kind that is never made in a text."""


KINDS = (
    Kind("no_grad", is_exact=True, costs_time=False, rewrite=_no_grad, needs=_EVALUATES),
    Kind("detach", is_exact=True, costs_time=False, rewrite=_detach, needs=re.compile("backward")),
    Kind(
        "delete", is_exact=True, costs_time=False, rewrite=_delete, needs=re.compile(f"backward|{_EVALUATES.pattern}")
    ),
    Kind("zero_grad_first", is_exact=True, costs_time=False, rewrite=_zero_grad_first, needs=re.compile("zero_grad")),
    Kind("fused", is_exact=True, costs_time=False, rewrite=_fused, needs=_OPTIMIZES),
    Kind("checkpoint", is_exact=True, costs_time=True, rewrite=_checkpoint, needs=re.compile(r"\bin\b.*\bself\b")),
    Kind(
        "model_checkpoint",
        is_exact=True,
        costs_time=True,
        rewrite=_model_checkpoint,
        needs=re.compile("from_pretrained|from_config"),
        option="--gradient_checkpointing=True",
        switch=_CHECKPOINT_SWITCH,
    ),
    Kind("autocast", is_exact=False, costs_time=False, rewrite=_autocast, needs=re.compile("backward")),
    Kind(
        "amp",
        is_exact=False,
        costs_time=False,
        rewrite=lambda script: None,
        needs=_NOWHERE,
        switch=_AMP_SWITCH,
    ),
    Kind(
        "8bit",
        is_exact=False,
        costs_time=False,
        rewrite=_8bit,
        needs=_OPTIMIZES,
        option="--optim=adamw_bnb_8bit",
        package="bitsandbytes",
    ),
)
"""All kinds, the most harmless first."""
