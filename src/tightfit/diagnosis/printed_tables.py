"""Tables that programs print beside a failure: who holds a node's memory, and the largest arrays of a program."""

import math
import re
from collections.abc import Iterator

_CONSUMERS = re.compile(r"\b(?:top \d{1,2} memory (?:users|consumers))\b[^\n]*\n", re.IGNORECASE)
_ROW = re.compile(r"\s*\d{1,9}\s+(\d{1,6}(?:\.\d{1,3})?) ?(?:G(?:i?B)?)?\s+(\S[^\n]{0,200})")
_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?G")
_SHARE = 0.5
"""Part of what the listed processes hold from which on one command is the cause."""
_USUAL_LIMIT = 0.95
"""Share of a node's memory at which Ray ends tasks."""


def holders(text: str, used: str, of: str, threshold: str) -> dict[str, str]:
    """Return the command that holds most of a node's memory in Ray's table, as details; empty without one.

    `used`, `of` and `threshold` are those of the message, in GB and as a share; unknown ones are empty.

    >>> table = "Top 10 memory users:\\nPID MEM(GB) COMMAND\\n1 11.0 ray::work\\n2 11.0 ray::work\\n3 1.0 ray::other\\n"
    >>> holders(table, "24.00GB", "25.00GB", "0.95")["ray_fits"]
    '1'
    """
    rows = list(_rows(text))
    total = sum(size for size, _ in rows)
    by_name: dict[str, list[float]] = {}
    for size, name in rows:
        by_name.setdefault(name, []).append(size)
    if not by_name:
        return {}
    name, sizes = max(by_name.items(), key=lambda item: sum(item[1]))
    if sum(sizes) <= _SHARE * total:
        return {}
    each = sum(sizes) / len(sizes)
    if len(sizes) == 1:
        return {"ray_alone": name, "ray_each": f"{each:.1f} GB"}
    held, whole = _gigabytes(used), _gigabytes(of)
    found = {"ray_holder": name, "ray_each": f"{each:.1f} GB", "ray_count": str(len(sizes))}
    if held is not None and whole is not None and each:
        limit = whole * float(threshold or _USUAL_LIMIT)
        fits = math.floor((limit - (held - sum(sizes))) / each)
        found |= {"ray_fits": str(fits)} if 0 < fits < len(sizes) else {}
    return found


def _rows(text: str) -> Iterator[tuple[float, str]]:
    """Yield the size in GB and the command of each process that Ray lists."""
    head = _CONSUMERS.search(text)
    for line in text[head.end() :].splitlines()[:14] if head else ():
        if row := _ROW.match(line):
            yield float(row[1]), row[2].split()[0].split("(")[0]


def _gigabytes(printed: str) -> float | None:
    found = _SIZE.search(printed) or re.fullmatch(r"\d{1,6}(?:\.\d{1,3})?", printed)
    return float(found[found.lastindex or 0]) if found else None


_LARGEST = re.compile(r"[Ll]argest program allocations in hbm:(?s:.{0,40}?)Size: ([\d.]{1,9}[KMG])(?s:(.{0,600}))")
_SHAPED = re.compile(r"Shape: (\w{2,5}\[[\d,]{1,60}\])")
_NAMED = re.compile(r'Operator: op_name="([^"\n]{1,160})"')


def largest_allocation(text: str) -> dict[str, str]:
    """Return the largest array of a program on a TPU, as XLA prints it, as details; empty without one.

    >>> largest_allocation("Largest program allocations in hbm:\\n  1. Size: 4.00G\\n     Shape: f32[16,16]{1,0}")
    {'xla_size': '4.00G', 'xla_shape': 'f32[16,16]'}
    """
    found = _LARGEST.search(text)
    if found is None:
        return {}
    first = found[2].partition("\n  2.")[0]
    shape, name = _SHAPED.search(first), _NAMED.search(first)
    return (
        {"xla_size": found[1]}
        | ({"xla_shape": shape[1]} if shape else {})
        | ({"xla_operator": name[1]} if name else {})
    )


_PEAK = re.compile(r"Peak buffers:\s+Buffer 1:\s+Size: ([\d.]{1,9}) ?([KMG]iB)(?s:(.{0,600}))")
_ATTENTION = re.compile(r"attention|attn|bhqk|bqhd", re.IGNORECASE)


def peak_buffer(text: str) -> dict[str, str]:
    """Return the largest array of a program on a GPU, as XLA prints it, as details; empty without one.

    >>> peak_buffer('Peak buffers:\\n Buffer 1:\\n Size: 9.00GiB\\n Operator: op_name="f"\\n Shape: f32[2,3]')
    {'peak_size': '9.00 GiB', 'peak_shape': 'f32[2,3]', 'peak_operator': 'f'}
    """
    found = _PEAK.search(text)
    first = found[3].partition("Buffer 2:")[0] if found else ""
    shape, name = _SHAPED.search(first), _NAMED.search(first)
    if found is None or shape is None or name is None:
        return {}
    details = {"peak_size": f"{found[1]} {found[2]}", "peak_shape": shape[1], "peak_operator": name[1]}
    sizes = re.findall(r"\d+", shape[1].partition("[")[2])
    is_square = len(sizes) >= 3 and sizes[-1] == sizes[-2]
    return details | ({"peak_scores": "yes"} if is_square and _ATTENTION.search(name[1]) else {})


_PRESSED = re.compile(
    r"(\d{1,6}) Workers? \(tasks / actors\) killed due to memory pressure \(OOM\), (\d{1,6}) Workers? crashed"
    r"[^\n]{0,60}? at node \(ID: \w{1,64}, IP: ([\w.:-]{1,64})\)"
)
_ACTOR = re.compile(r"class_name: (\w{1,80})(?s:.{0,200}?)\bip: ([\w.:-]{1,64})")


def ray_nodes(text: str) -> dict[str, str]:
    """Return the nodes on which Ray ended workers or an actor, with their numbers, as details.

    >>> line = "2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed at "
    >>> ray_nodes(line + "node (ID: a, IP: b)")
    {'ray_nodes': 'b (2)'}
    """
    killed: dict[str, int] = {}
    crashed: dict[str, int] = {}
    for ended, failed, node in _PRESSED.findall(text):
        killed[node] = killed.get(node, 0) + int(ended)
        crashed[node] = crashed.get(node, 0) + int(failed)
    found = {"ray_nodes": _counted(killed)} if any(killed.values()) else {}
    found |= {"ray_crashed": _counted(crashed)} if any(crashed.values()) else {}
    actor = _ACTOR.search(text)
    return found or ({"ray_actor": actor[1], "ray_node": actor[2]} if actor else {})


def _counted(numbers: dict[str, int]) -> str:
    return ", ".join(f"{node} ({number})" for node, number in numbers.items() if number)


_NAMED_HOLDER = re.compile(r"name=([\w.:]{1,80}),? pid=\d{1,9}, memory used=([\d.]{1,9}) ?GB")


def named_holder(text: str, used: str) -> dict[str, str]:
    """Return the task or actor that Ray's message names, if it holds most of what is used, as details.

    >>> named_holder("(actor ID: a, name=Buffer.__init__, pid=7, memory used=90.0GB) was running", "100.0GB")
    {'ray_alone': 'Buffer', 'ray_each': '90.0 GB'}
    """
    found, whole = _NAMED_HOLDER.search(text), _gigabytes(used) if used else None
    if found is None or whole is None or float(found[2]) <= _SHARE * whole:
        return {}
    return {"ray_alone": found[1].split(".")[0], "ray_each": f"{found[2]} GB"}
