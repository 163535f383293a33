"""Loops of a script's functions, read from their source: where they lead, and which of their lines may allocate."""

import ast
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tightfit.vgpu.plain_branches import AsIf

_HARMLESS_CALLS = (
    "print len range min max sum str int float bool round abs format join append extend update items keys values get "
    "isinstance hasattr getattr time perf_counter monotonic strftime now exit open write flush close makedirs remove "
    "mkdir exists dump dumps info debug warning error log add_scalar set_postfix set_description add_argument item "
    "state_dict synchronize barrier destroy_process_group get_rank empty_cache manual_seed set_epoch collect "
    "max_memory_allocated max_memory_reserved memory_allocated memory_reserved memory_summary tolist finish "
    "reset_peak_memory_stats get_last_lr perf_counter_ns sleep system basename dirname upper lower strip split "
    "get_world_size"
)
"""Calls by name that print, record or measure: they take no device memory."""
_HARMLESS = frozenset(_HARMLESS_CALLS.split())
_SAVES = frozenset(("torch.save", "np.save", "numpy.save", "plt.savefig"))
"""Calls that write what is there; a library's own `save` may gather a model on the card first."""


class Loop(NamedTuple):
    first: int
    last: int
    after: int
    """Line of the statement that follows in the same block; 0 without one, or without a way there."""
    by_way_of: int
    """Line of a statement in the same block that has no block of its own."""
    counts: bool = False
    """True for `for`: its body does not decide when it ends."""
    is_listed: bool = False
    """True for a `for` over a list that is written out."""
    has_items: bool = False
    """True for a `for` over anything but a `range(...)` and its like."""


class Branch(NamedTuple):
    """A block behind a condition that its loop never changes."""

    head: range
    """Lines of the condition."""
    block: range
    """Lines of the block; negative on the line of its `if`."""
    is_late: bool
    """True if the condition is itself behind one that may change, so that it may not have been evaluated yet."""

    def may_run(self, ran: Set[int]) -> bool:
        return not ran.isdisjoint(self.block) or (self.is_late and ran.isdisjoint(self.head))


class Call(NamedTuple):
    """Lines of a statement with a call that may allocate; negative for a body on the line of its `if`."""

    first: int
    last: int
    branches: tuple[Branch, ...] = ()

    def is_missed(self, ran: Set[int]) -> bool:
        """Return True if none of the lines ran, and some still may."""
        return ran.isdisjoint(range(self.first, self.last + 1)) and all(each.may_run(ran) for each in self.branches)


class Endless(NamedTuple):
    """A `while` loop that ends by its condition alone."""

    test: ast.expr
    changing: frozenset[str]
    """Names and attributes that may change."""
    returns: bool
    """True if its function may also be left from within it."""


_RANGES = ("range", "trange")
_OF_RANGES = ("reversed", "tqdm", "enumerate", "list", "track")
_LISTED = (ast.Tuple, ast.List, ast.Set, ast.Dict)
_PLAIN = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Import, ast.ImportFrom, ast.Return, ast.Delete)


@cache
def loops_around(file: str, first: int, name: str, line: int) -> tuple[Loop, ...]:
    """Find the loops around a line of a function, outermost first."""
    blocks: list[tuple[list[ast.stmt], int]] = [(_body(file, first, name), 0)]
    found = []
    while blocks:
        block, behind = blocks.pop()
        for statement, following in zip(block, [*block, None][1:], strict=True):
            if not statement.lineno <= line <= (statement.end_lineno or statement.lineno):
                continue
            after = _first_line(following) if following else behind
            if isinstance(statement, (ast.For, ast.While)):
                plain = next((each.lineno for each in block if isinstance(each, _PLAIN)), 0 if following else after)
                found.append(_loop(statement, after if plain else 0, plain))
                # A jump to the line of a `for` would begin it anew.
                after = statement.lineno if isinstance(statement, ast.While) else 0
            elif not isinstance(statement, ast.If):
                after = 0  # leaving a `with` or `try` would leave out its end
            blocks += [(each, after) for each in blocks_of(statement)]
    return tuple(found)


def _first_line(statement: ast.stmt) -> int:
    """Return the line at which a statement begins to run: that of its first decorator, if it has any."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(each.lineno for each in decorators)])


def _loop(statement: ast.For | ast.While, after: int, by_way_of: int) -> Loop:
    last = statement.end_lineno or statement.lineno
    if isinstance(statement, ast.While):
        return Loop(statement.lineno, last, after, by_way_of)
    is_listed = isinstance(statement.iter, _LISTED)
    has_items = not _is_count(statement.iter)
    return Loop(statement.lineno, last, after, by_way_of, counts=True, is_listed=is_listed, has_items=has_items)


def _is_count(items: ast.expr) -> bool:
    """Return True for `range(...)`, also within `reversed(...)`, `tqdm(...)` and their like."""
    if not isinstance(items, ast.Call):
        return False
    name = _name_of(items.func)
    return name in _RANGES or (name in _OF_RANGES and bool(items.args) and _is_count(items.args[0]))


def head_line(loop: ast.For | ast.While) -> int:
    """Return the line at which a loop's next iteration begins."""
    is_endless = isinstance(loop, ast.While) and isinstance(loop.test, ast.Constant)
    return loop.body[0].lineno if is_endless else loop.lineno


@cache
def loop_node(file: str, first: int, name: str, loop_line: int) -> ast.For | ast.While | None:
    """Return the loop that starts at a line of a function."""
    statements = _statements(_body(file, first, name))
    return next(
        (each for each in statements if isinstance(each, (ast.For, ast.While)) and each.lineno == loop_line), None
    )


@cache
def loop_heads(file: str, first: int, name: str) -> dict[int, int]:
    """Map the lines at which the iterations of a function's loops begin to the first lines of the loops.

    Python does not come back to the line of `while True`, but to the one below.
    """
    loops = (each for each in _statements(_body(file, first, name)) if isinstance(each, (ast.For, ast.While)))
    return {head_line(each): each.lineno for each in loops}


@cache
def reachable_calls(file: str, first: int, name: str, line: int) -> tuple[Call, ...]:
    """Find the calls that may allocate: in the outermost loop around `line`, or after it.

    Those behind a condition that the loop never changes have a `Branch`. Error handling and functions that print or
    measure do not count.
    """
    body = _body(file, first, name)
    around = [each for each in _statements(body) if each.lineno <= line <= (each.end_lineno or each.lineno)]
    loop = next((each for each in around if isinstance(each, (ast.For, ast.AsyncFor, ast.While))), None)
    found: set[Call] = set()
    if loop is not None:
        changing = _stored(loop) | _attributes(_tree(file))
        found |= set(_calls(loop.body, changing))
    end = (loop.end_lineno or line) if loop is not None else line
    own = _stored(ast.Module(body, [])) | _parameters(file, first, name)
    own |= _attributes(_tree(file)) | _shared(_tree(file))
    found |= {each for each in _calls(body, own, is_late=True) if abs(each.first) > end}
    return tuple(sorted(found))


def _parameters(file: str, first: int, name: str) -> set[str]:
    node = _function(file, first, name) if name != "<module>" else None
    arguments = node.args if node is not None else ast.arguments([], [], None, [], [], None, [])
    each = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    return {argument.arg for argument in each if argument is not None} - {"self"}


def _shared(tree: ast.Module) -> set[str]:
    """Return the global names that functions assign, or loops outside of them."""
    loops = (each for each in _statements(tree.body) if isinstance(each, (ast.For, ast.AsyncFor, ast.While)))
    assigned = (name for each in ast.walk(tree) if isinstance(each, ast.Global) for name in each.names)
    return {*assigned, *(name for loop in loops for name in _stored(loop))}


@cache
def endless_test(file: str, first: int, name: str, loop_line: int) -> Endless | None:
    """Return the condition of a `while`, if nothing else leads behind it; None for a loop within another one."""
    loop = loop_node(file, first, name, loop_line)
    if not isinstance(loop, ast.While) or any(isinstance(each, ast.Break) for each in ast.walk(loop)):
        return None
    if len(loops_around(file, first, name, loop_line)) > 1:
        return None
    changing = _stored(loop) | _attributes(_tree(file)) | _shared(_tree(file))
    returns = any(isinstance(each, (ast.Return, ast.Raise)) for each in ast.walk(loop))
    return Endless(loop.test, frozenset(changing), returns)


@cache
def bodies_on_line(file: str, first: int, name: str) -> dict[int, int]:
    """Map lines of the form `if condition: call()` in a function to the columns at which their bodies begin."""
    branches = (each for each in _statements(_body(file, first, name)) if isinstance(each, ast.If))
    return {each.lineno: each.body[0].col_offset for each in branches if each.body[0].lineno == each.lineno}


@cache
def calls_of_loop(file: str, first: int, name: str, loop_line: int) -> tuple[Call, ...]:
    """Find the calls that may allocate in the loop that starts at a line."""
    loops = (
        each for each in _statements(_body(file, first, name)) if isinstance(each, ast.For) and each.lineno == loop_line
    )
    return tuple(found for loop in loops for found in _calls(loop.body, _stored(loop) | _attributes(_tree(file))))


def optimizer_calls(loop: ast.For | ast.While) -> tuple[bool, set[int]]:
    """Find calls that may step an optimizer: True for one in each iteration, and the lines of those under an `if`.

    By their names: what steps, updates, trains or accumulates somewhere may do so.
    """
    plain, behind = False, set[int]()
    for statement in loop.body:
        calls = [each for each in ast.walk(statement) if isinstance(each, ast.Call)]
        lines = {each.lineno for each in calls if _is_step(each)}
        if isinstance(statement, ast.If) and not lines & _lines(statement.test):
            behind |= lines
        elif lines or any(_may_step(each) for each in calls):
            plain = True
    return plain, behind


def steps_after(loop: ast.For | ast.While, file: str, first: int, name: str) -> bool:
    """Return True if a call behind a loop, in the same function and in the loop around it, steps an optimizer."""
    body = _body(file, first, name)
    for outer in _statements(body):
        if isinstance(outer, (ast.For, ast.While)) and outer is not loop and _holds(outer, loop):
            body = outer.body
    calls = (each for statement in body for each in ast.walk(statement) if isinstance(each, ast.Call))
    return any(_is_step(each) and each.lineno > (loop.end_lineno or loop.lineno) for each in calls)


def counts_for_later(loop: ast.For | ast.While, file: str, first: int, name: str) -> bool:
    """Return True if a loop adds to a number that is read behind it.

    Any item may be; an attribute if its file reads it elsewhere, a name if the loop's function does. A name that
    outlives the loop's run and is read in the loop itself is read when it runs again.
    """
    counts = [each.target for each in ast.walk(loop) if isinstance(each, ast.AugAssign)]
    if any(isinstance(each, ast.Subscript) for each in counts):
        return True
    names = {each.id for each in counts if isinstance(each, ast.Name)}
    attributes = {each.attr for each in counts if isinstance(each, ast.Attribute)}
    of_function = [each for statement in _body(file, first, name) for each in ast.walk(statement)]
    is_inner = len(loops_around(file, first, name, loop.lineno)) > 1
    shared = {each for part in of_function if isinstance(part, (ast.Global, ast.Nonlocal)) for each in part.names}
    if (names if is_inner else names & shared) & _names_read_in(loop):
        return True
    parts = [*of_function, *(ast.walk(_tree(file)) if attributes else ())]
    return _are_read_behind(loop, parts, names, attributes)


def sets_for_later(loop: ast.For | ast.While, file: str, first: int, name: str) -> bool:
    """Return True if a `for` loop sets a name under a condition on its own item, as a result of late epochs is set.

    The loop's function reads it behind the loop.
    """
    if isinstance(loop, ast.While):
        return False
    names = _set_by_number(loop)
    parts = [each for statement in _body(file, first, name) for each in ast.walk(statement)] if names else []
    return _are_read_behind(loop, parts, names)


def _are_read_behind(
    loop: ast.For | ast.While, parts: Iterable[ast.AST], names: Set[str], attributes: Set[str] = frozenset()
) -> bool:
    """Return True if some of the `parts` that are not in a loop read one of the names or attributes."""
    lines = range(loop.lineno, (loop.end_lineno or loop.lineno) + 1)
    read = (each for each in parts if isinstance(getattr(each, "ctx", None), ast.Load))
    return any(
        (isinstance(each, ast.Name) and each.id in names)
        or (isinstance(each, ast.Attribute) and each.attr in attributes)
        for each in read
        if getattr(each, "lineno", 0) not in lines
    )


def _set_by_number(loop: ast.For) -> set[str]:
    own = {each.id for each in ast.walk(loop.target) if isinstance(each, ast.Name)}
    return {
        each.id
        for condition in ast.walk(loop)
        if isinstance(condition, ast.If)
        and own & {each.id for each in ast.walk(condition.test) if isinstance(each, ast.Name)}
        for each in ast.walk(condition)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
    }


def _names_read_in(loop: ast.For | ast.While) -> set[str]:
    """Return the names that a loop's statements read, without those that only print or count."""
    heads = [
        part
        for statement in _statements(loop.body)
        if not changes_nothing(statement)
        for part in ast.iter_child_nodes(statement)
        if isinstance(part, (ast.expr, ast.withitem))
    ]
    names = [each for head in heads for each in ast.walk(head) if isinstance(each, ast.Name)]
    return {each.id for each in names if isinstance(each.ctx, ast.Load)}


_NO_OPTIMIZERS = ("prof", "sched", "bar", "env", "timer", "log", "writer", "track", "lr")
"""Parts of names of what has a method `step`, too."""
_MAY_STEP = ("step", "optim", "update", "train", "accumulat", "fit")


def _is_step(call: ast.Call) -> bool:
    name = _name_of(call.func)
    if name.endswith("optimizer_step"):
        return True
    owner = ast.unparse(call.func.value).lower() if isinstance(call.func, ast.Attribute) else ""
    return name == "step" and not any(part in owner for part in _NO_OPTIMIZERS)


def _may_step(call: ast.Call) -> bool:
    name = _name_of(call.func)
    return name not in ("step", "training_step") and any(part in name.lower() for part in _MAY_STEP)


def _lines(node: ast.expr) -> set[int]:
    return set(range(node.lineno, (node.end_lineno or node.lineno) + 1))


def _holds(outer: ast.stmt, inner: ast.stmt) -> bool:
    return any(each is inner for each in ast.walk(outer))


@cache
def _tree(file: str) -> ast.Module:
    """Parse a file; one that is not there or is no Python is empty."""
    try:
        tree: ast.Module = AsIf().visit(ast.parse(Path(file).read_bytes()))
        return tree
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


@cache
def _body(file: str, first: int, name: str) -> list[ast.stmt]:
    """Return the statements of a function, or of the module."""
    if name == "<module>":
        return _tree(file).body
    node = _function(file, first, name)
    return node.body if node is not None else []


@cache
def function_statements(file: str, first: int, name: str) -> tuple[ast.stmt, ...]:
    """Return all statements of a function, the outer ones before those within them."""
    return tuple(_statements(_body(file, first, name)))


def function_node(file: str, first: int, name: str) -> ast.FunctionDef | None:
    """Return the source of a function that does not suspend."""
    node = _function(file, first, name)
    return node if isinstance(node, ast.FunctionDef) else None


def function_nodes(file: str, first: int, name: str) -> list[ast.FunctionDef | ast.Lambda]:
    """Return the source of a function; all those that begin on the line of a function without a name."""
    if name == "<lambda>":
        return [each for each in ast.walk(_tree(file)) if isinstance(each, ast.Lambda) and each.lineno == first]
    node = function_node(file, first, name)
    return [node] if node is not None else []


@cache
def _function(file: str, first: int, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            starts = {node.lineno, *(each.lineno for each in node.decorator_list)}
            if first in starts:
                return node
    return None


def allocating_lines(body: list[ast.stmt]) -> list[tuple[int, int]]:
    """Return the first and last lines of statements with calls that may allocate."""
    return [(each.first, each.last) for each in _calls(body, None)]


def is_harmless(call: ast.Call) -> bool:
    """Return True for a call that prints, records or measures."""
    return _name_of(call.func) in _HARMLESS


def changes_nothing(statement: ast.stmt) -> bool:
    """Return True for a statement that prints, counts, or leaves the loop: it neither takes nor frees memory later."""
    match statement:
        case ast.Expr(value=ast.Call() as call):
            return is_harmless(call)
        case ast.If():
            return all(map(changes_nothing, [*statement.body, *statement.orelse]))
        case ast.Expr() | ast.AugAssign() | ast.Pass() | ast.Break() | ast.Continue() | ast.Return() | ast.Raise():
            return True
    return False


def blocks_of(statement: ast.stmt) -> list[list[ast.stmt]]:
    """List the bodies within a statement, without those of functions, classes and error handling."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return []
    blocks = [getattr(statement, key, []) for key in ("body", "orelse", "finalbody")]
    return blocks + [case.body for case in getattr(statement, "cases", [])]


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield statement
        for block in blocks_of(statement):
            yield from _statements(block)


def _calls(
    body: list[ast.stmt], changing: set[str] | None, branches: tuple[Branch, ...] = (), *, is_late: bool = False
) -> Iterator[Call]:
    """Yield the statements with calls that may allocate. A condition may depend on the names `changing`."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Raise, ast.Assert)):
            continue
        heads = [each for each in ast.iter_child_nodes(statement) if isinstance(each, (ast.expr, ast.withitem))]
        if any(_may_allocate(head) for head in heads) or _keeps_item(statement):
            ends = [head.end_lineno or 0 for head in heads if isinstance(head, ast.expr)]
            yield Call(statement.lineno, max([statement.lineno, *ends]), branches)
        if isinstance(statement, ast.If):
            yield from _calls_behind(statement, changing, branches, is_late=is_late)
            continue
        for block in blocks_of(statement):
            yield from _calls(block, changing, branches, is_late=is_late)


def _keeps_item(statement: ast.stmt) -> bool:
    """Return True for `size = sizes[step]`: the kept item may be a size."""
    match statement:
        case ast.Assign(targets=[ast.Name() | ast.Attribute()], value=ast.Subscript(value=of, slice=key)):
            is_chosen = not isinstance(key, (ast.Constant, ast.Slice, ast.Tuple, ast.UnaryOp))
            return is_chosen and isinstance(of, (ast.Name, ast.Attribute))
    return False


def _calls_behind(
    statement: ast.If, changing: set[str] | None, branches: tuple[Branch, ...], *, is_late: bool
) -> Iterator[Call]:
    """Yield those of the branches of an `if`; Python leaves out a branch that a written constant closes."""
    test, blocks = statement.test, blocks_of(statement)
    changes = changing is None or may_change(test, changing)
    if isinstance(test, ast.Constant):
        changes, blocks = True, blocks[:1] if test.value else blocks[1:]
    head = range(statement.lineno, (test.end_lineno or statement.lineno) + 1)
    for block in filter(None, blocks):
        is_on_line = block[0].lineno == statement.lineno
        first, last = block[0].lineno, block[-1].end_lineno or block[-1].lineno
        lines = range(-first, 1 - first) if is_on_line else range(first, last + 1)
        behind = branches if changes else (*branches, Branch(head, lines, is_late))
        late = is_late or (changes and not isinstance(test, ast.Constant))
        for each in _calls(block, changing, behind, is_late=late):
            yield Call(-each.first, -each.first, behind) if is_on_line else each


def _may_allocate(node: ast.AST) -> bool:
    calls = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return any(_name_of(each) not in _HARMLESS and ast.unparse(each) not in _SAVES for each in calls)


def _name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def may_change(test: ast.expr, changing: Set[str]) -> bool:
    """Return True if a condition calls something, or reads a name or attribute that is among those `changing`.

    `isinstance` is no such call.
    """
    names = {each.id for each in ast.walk(test) if isinstance(each, ast.Name)}
    names |= {each.attr for each in ast.walk(test) if isinstance(each, ast.Attribute)}
    calls = (each.func for each in ast.walk(test) if isinstance(each, ast.Call))
    return bool(names & changing) or any(not isinstance(of, ast.Name) or of.id != "isinstance" for of in calls)


def _stored(loop: ast.stmt | ast.Module) -> set[str]:
    """Return the names that a loop assigns, and those that it assigns items of."""
    stored = [each for each in ast.walk(loop) if isinstance(getattr(each, "ctx", None), ast.Store)]
    holders = [each.value if isinstance(each, ast.Subscript) else each for each in stored]
    return {each.id for each in holders if isinstance(each, ast.Name)}


def _attributes(tree: ast.Module) -> set[str]:
    """Collect the attributes that something other than `__init__` assigns."""
    fixed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
        for inner in ast.walk(node)
    }
    return {
        each.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and id(each) not in fixed
    }
