"""Names that a script sets only behind conditions: `if accuracy > best: best_epoch = epoch`.

An accuracy that was never computed is made up, so that such a name may stay unset, and the script fails where it reads
it. On a card it would not.
"""

import ast
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

from tightfit.vgpu.frames import Frame

_NAME = re.compile(r"'([^']+)'")


def lines_that_set(error: BaseException) -> list[Frame]:
    """List the lines that set the name which an error found unset, if each is behind a condition passed before.

    Empty for other errors, and where the name is set without a condition or nowhere.
    """
    name = _NAME.search(str(error))
    if not isinstance(error, NameError) or name is None or error.__traceback__ is None:
        return []
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    code = frame.f_code
    try:
        tree = ast.parse(Path(code.co_filename).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found = list(_settings(tree, name[1], line, is_behind=False))
    if not all(is_behind for _, is_behind in found):
        return []
    return [Frame(code.co_filename, number, code.co_qualname) for number, _ in found]


def _settings(node: ast.AST, name: str, line: int, *, is_behind: bool) -> Iterator[tuple[int, bool]]:
    """Yield each line that sets a name, and True if it is behind a condition that ends before `line`."""
    if isinstance(node, ast.If):
        is_behind = is_behind or (node.end_lineno or node.lineno) < line
    match node:
        case ast.Name(id=found, ctx=ast.Store()) if found == name:
            yield node.lineno, is_behind
        case ast.FunctionDef(name=found) | ast.AsyncFunctionDef(name=found) | ast.ClassDef(name=found):
            if found == name:
                yield node.lineno, is_behind
        case ast.alias() if (node.asname or node.name.partition(".")[0]) == name:
            yield node.lineno, is_behind
    for child in ast.iter_child_nodes(node):
        yield from _settings(child, name, line, is_behind=is_behind)
