"""The text of a Python file, read as a tree and changed in place, so that all else keeps its form."""

import ast
from collections.abc import Iterator, Sequence
from functools import cached_property

Statements = list[ast.stmt]
Function = ast.FunctionDef | ast.AsyncFunctionDef


class ScriptText:
    """A Python file and the changes to it that were collected so far. SyntaxError for a text that is no Python."""

    def __init__(self, text: str) -> None:
        self._data = text.encode()
        self.tree = ast.parse(text)
        self._lines = self._data.splitlines(keepends=True)
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._changes: list[tuple[int, int, bytes]] = []
        self._newline = "\r\n" if "\r\n" in text else "\n"

    @cached_property
    def functions(self) -> list[Function]:
        """All functions, outer ones before those within them."""
        return list(functions(self.tree))

    def replace(self, node: ast.expr, new: str) -> None:
        """Write `new` in place of an expression."""
        self._changes.append((*self._span(node), new.encode()))

    def insert(self, place: int, new: str) -> None:
        """Write `new` at an offset in bytes."""
        self._changes.append((place, place, new.encode()))

    def add_line(self, line: str, *, before: ast.stmt | None = None, after: ast.stmt | None = None) -> None:
        """Add a line beside a statement, with its indent; nothing where the statement shares its lines with others."""
        beside = before or after
        assert beside is not None
        if not self.owns_its_lines(beside):
            return
        first = min([beside.lineno, *(each.lineno for each in getattr(beside, "decorator_list", []))])
        number = first - 1 if before else (beside.end_lineno or beside.lineno)
        indent = self._indent(beside)
        new = f"{indent}{line}{self._newline}"
        if number and not self._lines[number - 1].endswith(b"\n"):
            new = f"{self._newline}{indent}{line}"
        self.insert(self._starts[number], new)

    def move(self, statement: ast.stmt, before: ast.stmt) -> None:
        """Move a statement of whole lines to the place before another of the same body."""
        start, end = self._starts[statement.lineno - 1], self._starts[statement.end_lineno or statement.lineno]
        lines = self._data[start:end].decode()
        self._changes.append((start, end, b""))
        self.insert(self._starts[before.lineno - 1], lines)

    def indent_under(self, header: str, body: Sequence[ast.stmt]) -> None:
        """Put consecutive statements of whole lines under a line such as `with ...:`."""
        indent = self._indent(body[0])
        self.add_line(header, before=body[0])
        inside = set()
        for node in ast.walk(ast.Module(list(body), [])):
            if isinstance(node, ast.Constant | ast.JoinedStr) and isinstance(getattr(node, "value", ""), str):
                inside |= set(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
        for number in range(body[0].lineno, (body[-1].end_lineno or body[-1].lineno) + 1):
            if number not in inside and self._lines[number - 1].strip():  # a text of several lines stays as it is
                self.insert(self._starts[number - 1], "\t" if "\t" in indent else "    ")

    def owns_its_lines(self, statement: ast.stmt) -> bool:
        """Return True if nothing but a comment shares the statement's lines."""
        last = self._lines[(statement.end_lineno or statement.lineno) - 1]
        rest = last[statement.end_col_offset :].strip()
        head = self._lines[statement.lineno - 1][: statement.col_offset]
        return not head.strip() and (not rest or rest.startswith(b"#"))

    def start_of(self, node: ast.expr) -> int:
        return self._span(node)[0]

    def end_of(self, node: ast.expr) -> int:
        return self._span(node)[1]

    def text_of(self, node: ast.expr) -> str:
        start, end = self._span(node)
        return self._data[start:end].decode()

    def needs_import(self, name: str) -> None:
        """Add `import name` behind the last import at the top, unless the file has it."""
        imports = [each for each in self.tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
        if any(
            isinstance(each, ast.Import) and name in [alias.name for alias in each.names if not alias.asname]
            for each in imports
        ):
            return
        if imports:
            self.add_line(f"import {name}", after=imports[-1])
        else:
            self.insert(0, f"import {name}{self._newline}")

    @property
    def changed(self) -> str | None:
        """The text with all changes; None without any."""
        if not self._changes:
            return None
        data = self._data
        order = sorted(enumerate(self._changes), key=lambda each: (each[1][0], each[0]))
        for _, (start, end, new) in reversed(order):
            data = data[:start] + new + data[end:]
        return data.decode()

    def _span(self, node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _indent(self, statement: ast.stmt) -> str:
        line = self._lines[statement.lineno - 1]
        return line[: len(line) - len(line.lstrip())].decode()


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yield all functions, nested ones too."""
    yield from (each for each in ast.walk(tree) if isinstance(each, Function))


def loops(tree: ast.AST) -> Iterator[ast.For | ast.While]:
    yield from (each for each in ast.walk(tree) if isinstance(each, ast.For | ast.While))


def calls(tree: ast.AST, method: str) -> Iterator[ast.Call]:
    """Yield the calls of a method, as `x.method(...)`."""
    for each in ast.walk(tree):
        if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr == method:
            yield each


def has_call(tree: ast.AST, method: str) -> bool:
    return any(True for _ in calls(tree, method))


def names_read(tree: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}


def names_written(tree: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(tree) if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)}


def dotted(node: ast.expr) -> str:
    """Return `a.b.c` for such an expression, else nothing.

    >>> dotted(ast.parse("torch.optim.AdamW", mode="eval").body)
    'torch.optim.AdamW'
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""
