"""Messages of the allocators on devices: every format that states figures, from PyTorch 0.4 to 2.14.

The formats and the versions that print them: c10/cuda/CUDACachingAllocator.cpp and its siblings. A group that is named
like a figure holds that figure.
"""

import functools
import re

from tightfit.oomlog.facts import Figure, OtherProcess
from tightfit.oomlog.message import SIZE, Message

REACH = 2500
"""Characters, without white space, that one message may span; a list of a hundred processes needs as many."""
HEAD_WORDS = ("toallocate", "tallocate", "totalcapac", "hasatotalcapac", "mpsbackend", "allocationondevice")
"""Words, in small letters, of which every head has one."""
HEAD = re.compile(
    r"(?:(?P<backend>CUDA|HIP|XPU|NPU|MUSA|MLU|GCU|HPU|SDAA|MACA|PrivateUse1)out|(?P<bare>Out))ofmemory[.:,]*"
    rf"Triedt?o?allocate(?:(?P<size>{SIZE})|(?P<huge>morethan1EB(?:memory)?))"
    rf"|OutOfMemoryError:?[`*]*(?=Triedt?o?allocate)(?P<named>)Triedt?o?allocate(?P<asked>{SIZE})"
    rf"|MPSbackendoutofmemory\(MPSallocated:(?P<mps>{SIZE})"
    rf"|(?:blockwithsizelargerthan4GB!)?Triedt?o?allocate(?P<tail>{SIZE})\.?(?=[^A-Za-z\d]{{0,3}}(?:[GN]PU\d*(?:;|hasatotal|total|free)|total|free))"
    rf"|\((?P<unit>[GN]PU)(?P<index>\d{{1,4}});(?={SIZE}totalcapacity)"
    r"|GPU#?\d{0,4}hasatotalcapac(?:i?)tyof"
    r"|Allocationondevice(?P<device>\d{0,4})wouldexceedallowedmemory\.?(?:\(outofmemory\))?"
    r"|(?:OutOfMemoryError|ExceptionMessage):\**Allocationondevice(?!\d{1,4}would|would)(?P<cut>)",
    re.IGNORECASE,
)
_OLD = re.compile(
    rf"(?<=[;(,])(?P<size>{SIZE})(?P<name>totalcapacity|alreadyallocated|currentactive|free|allowed|cached|"
    r"reservedintotalbyPyTorch)(?:[;)]|(?=(?-i:[A-Z#`*])|$))"
    r"|(?P<unit>[GN]PU)(?P<index>\d{1,4});",
    re.IGNORECASE,
)
_OLD_NAMES = {
    "totalcapacity": "total_bytes",
    "alreadyallocated": "allocated_bytes",
    "free": "free_bytes",
    "allowed": "allowed_bytes",
    "reservedintotalbypytorch": "reserved_bytes",
    "cached": "unallocated_bytes",  # PyTorch 0.4.1 to 1.3 print amount_cached - amount_allocated
}
_NEW = re.compile(
    rf"GPU#?(?P<index>\d{{0,4}})hasatotal(?P<word>capaci?ty)of(?P<total>{SIZE})"
    rf"|GPU#?(?P<cut_index>\d{{1,4}})hasatotalcapaci?ty(?:of(?:\d{{1,6}}(?:\.\d{{0,2}})?)?)?$"
    rf"|ofwhich(?P<free>{SIZE})(?:isfree)?"
    rf"|Process(?P<pid>\d{{1,10}})has(?P<theirs>{SIZE})(?:memoryinuse)?"
    rf"|thisprocesshas(?P<process>{SIZE})(?:memoryinuse)?"
    rf"|(?<=[.\s])(?P<allowed>{SIZE})allowed;"
    rf"|Oftheallocatedmemory(?P<allocated>{SIZE})(?:isallocatedbyPyTorch)?"
    rf"|with(?P<private_pool>{SIZE})allocatedinprivatepools"
    rf"|and(?P<unallocated>{SIZE})isreservedbyPyTorchbutunallocated"
    r"|(?P<advice>trysetting)(?P<setting>max_split_size_mb|PYTORCH_(?:(?:CUDA|HIP)_)?ALLOC_CONF)?"
    r"|(?P<site>docs\.pytorch\.org|optimizing-memory-usage)",
    re.IGNORECASE,
)
_ASYNC = re.compile(
    rf"Currentlyallocated:(?P<allocated>{SIZE})|Requested:(?P<requested>{SIZE})|Devicelimit:(?P<total>{SIZE})"
    rf"|Free\(accordingtoCUDA\):(?P<free>{SIZE})|PyTorchlimit\(setbyuser-suppliedmemoryfraction\):(?P<allowed>{SIZE})",
    re.IGNORECASE,
)
# Metal counts only this process's buffers, so its other allocations are of this process, too.
_MPS = re.compile(
    rf"otherallocations:(?P<outside_pytorch>{SIZE})|maxallowed:(?P<allowed>{SIZE})|Triedt?o?allocate(?P<requested>{SIZE})",
    re.IGNORECASE,
)
_BACKENDS = {"cuda": "cuda", "hip": "hip", "xpu": "xpu", "npu": "npu", "mpsbackend": "mps"}


def backend_kind(backend: str | None) -> str:
    """Return the kind of failure of a backend by the name in its message; None if the message names none."""
    known = _BACKENDS.get((backend or "").lower())
    return f"{known}_out_of_memory" if known else "device_out_of_memory"


def allocator_message(text: str, head: re.Match[str]) -> Message:
    """Read the message that begins with `head`, up to its last figure."""
    stop = _stop(head.end(), text)
    if head["mps"]:
        message = Message("mps_out_of_memory", head.start(), head.end())
        message.take("allocated_bytes", head["mps"])
        _collect(message, _MPS, text, min(stop + 200, head.end() + 300))
        return message
    if head["device"] is not None or head["cut"] is not None:
        return _async_message(text, head, stop)
    message = Message(_kind(head), head.start(), head.end())
    if size := head["size"] or head["tail"] or head["asked"]:
        message.take("requested_bytes", size)
    elif head["huge"]:
        message.note("request_beyond_1eb")
    # A head that is itself the beginning of the sentence on the device is read again, for its figures.
    begin = head.end() if size or head["huge"] else head.start()
    if "hasatotalcapac" in text[begin : min(begin + 120, stop)].lower():
        _new_sentences(message, text, begin, stop)
    else:
        _old_parenthesis(message, text, begin, stop)
    if "total_bytes" not in message.figures:
        _loose_figures(message, text, begin, stop)
    if head["bare"]:
        message.torch_format = "T9"
    return message


def _async_message(text: str, head: re.Match[str], stop: int) -> Message:
    """Read a message of cudaMallocAsync."""
    message = Message("cuda_async", head.start(), head.end())
    if head["cut"] is not None:
        message.exception, message.start = "torch.OutOfMemoryError", head.start() + head[0].lower().index("allocation")
    message.device_index = int(head["device"]) if head["device"] else None
    _collect(message, _ASYNC, text, stop)
    return message


def _kind(head: re.Match[str]) -> str:
    backend = head["backend"]
    if backend or head["bare"]:
        return backend_kind(backend)
    # The first words are missing; only CUDA's users leave them out.
    if "thansize4GB" in head[0] or "largerthan4GB" in head[0]:
        return "xpu_out_of_memory"
    return "npu_out_of_memory" if (head["unit"] or "").upper() == "NPU" else "cuda_out_of_memory"


def _stop(position: int, text: str) -> int:
    """Return the place where the next message begins, or the farthest that one may reach."""
    ahead = text[position : position + REACH].lower()
    stop = len(ahead)
    for anchor in ("triedtoallocate", *HEAD_WORDS[2:]):
        # Each format has a second part that is found by itself where the first is missing.
        at = ahead.find(anchor, 120 if "total" in anchor else 0, stop)
        stop = at if at >= 0 else stop
    return position + stop


def _collect(message: Message, pattern: re.Pattern[str], text: str, stop: int) -> None:
    """Keep the first figure of each name behind the head."""
    for match in pattern.finditer(text, message.end, stop):
        name = f"{match.lastgroup}_bytes"
        if name not in message.figures:
            message.take(name, match[match.lastgroup or 0])
            message.end = match.end()


def _old_parenthesis(message: Message, text: str, begin: int, stop: int) -> None:
    """Read `(GPU 0; T total capacity; A already allocated; ...)`, and the advice behind it."""
    for match in _OLD.finditer(text, begin, min(stop, begin + 500)):
        if match["index"]:
            if message.device_index is None:
                message.device_index = int(match["index"])
            if match["unit"].upper() == "NPU" and message.kind == "device_out_of_memory":
                message.kind = "npu_out_of_memory"
        else:
            name = match["name"].lower()
            if name == "cached":
                message.torch_format = "T1"
            elif name == "reservedintotalbypytorch" and message.torch_format is None:
                message.torch_format = "T2"
            if name in _OLD_NAMES:
                message.take(_OLD_NAMES[name], match["size"])
        message.end = match.end()
        if match[0].endswith(")"):
            if text.startswith("Ifreservedmemory", match.end()):
                message.torch_format = "T3"
            break
    _cut_figure(message, text)
    if "total_bytes" not in message.figures or not {"reserved_bytes", "unallocated_bytes"} & set(message.figures):
        message.note("message_cut")


_ORDER = {
    "total_bytes": "totalcapacity",
    "allocated_bytes": "alreadyallocated",
    "free_bytes": "free",
    "reserved_bytes": "reservedintotalbypytorch",
    "unallocated_bytes": "cached",
}
"""Figures of the parenthesis in its order, with their names; the version decides on the last two."""
_CUT_FIGURE = re.compile(rf"[;(,](?P<size>{SIZE})(?:(?P<name>[A-Za-z]{{2}})|(?=$|[`…]|\.\.))", re.IGNORECASE)


def _cut_figure(message: Message, text: str) -> None:
    """Read the last figure of a parenthesis that was cut off before the figure's name, or within it."""
    if message.kind not in ("cuda_out_of_memory", "hip_out_of_memory"):
        return
    match = _CUT_FIGURE.match(text, max(message.end - 1, 0))
    begun = (match["name"] or "").lower() if match else ""
    missing = [name for name in _ORDER if name not in message.figures]
    expected = missing[:1] if missing and missing[0] in tuple(_ORDER)[:3] else missing if begun else []
    name = next((name for name in expected if _ORDER[name].startswith(begun)), None)
    if match and name:
        message.take(name, match["size"])
        message.torch_format = message.torch_format or {"reserved_bytes": "T2", "unallocated_bytes": "T1"}.get(name)
        message.end = match.end("size")


def _new_sentences(message: Message, text: str, begin: int, stop: int) -> None:
    """Read `GPU 0 has a total capacity of T of which F is free. ...`."""
    is_new = False
    word = setting = ""
    for match in _NEW.finditer(text, begin, stop):
        if match.start() > message.end + 700 and "total_bytes" in message.figures:
            break
        name = match.lastgroup or ""
        if match["total"]:
            message.device_index = int(match["index"]) if match["index"] else None
            if not match["index"] or "#" in match[0]:
                message.torch_format = "T5b"
            word = match["word"]
            message.take("total_bytes", match["total"])
        elif match["cut_index"]:
            message.device_index = int(match["cut_index"])
        elif match["theirs"]:
            figure = Figure.printed(match["theirs"])
            if figure and len(message.other_processes) < 1000:
                message.other_processes.append(OtherProcess(pid=int(match["pid"]), bytes=figure.bytes))
        elif match["site"]:
            is_new = True
        elif match["advice"]:
            setting = match["setting"] or ""
        elif f"{name}_bytes" in message.figures:
            break  # another message
        else:
            message.take(f"{name}_bytes", match[name])
        message.end = match.end()
    if message.torch_format is None:
        message.torch_format = _version(word, setting, is_new, "private_pool_bytes" in message.figures)
    if message.device_index is None:
        message.note("device_unstated")
    if "unallocated_bytes" not in message.figures:
        message.note("message_cut")
    if any(process.bytes >= 2**63 for process in message.other_processes):
        message.note("other_process_memory_unknown")


_LABELS = {
    "requested_bytes": "triedt?o?allocate|requested|request",
    "total_bytes": "totalcapaci?ty(?:of)?|totalmemory|total|capacity",
    "free_bytes": "ofwhich|free(?:memory)?|available",
    "allocated_bytes": "ofthe(?:allocated)?memory|alreadyallocated|allocated",
    "unallocated_bytes": "unallocated|reservedbut(?:unallocated)?",
    "reserved_bytes": "reserved(?:intotal)?(?:bypytorch)?|cached",
    "process_bytes": "thisprocess(?:has|uses|memory)?|processmemory|inuse|used",
}
"""Words beside a figure in a message that a person shortened, or that a picture's reader spelled its own way."""


@functools.cache
def _labels() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Compile the words that stand before a figure, and those behind one."""
    before = "(?:" + "|".join(f"(?P<{name}>{words})" for name, words in _LABELS.items()) + r")[:=~≈(is]{0,4}$"
    return re.compile(before, re.IGNORECASE), re.compile(_BEHIND, re.IGNORECASE)


_BEHIND = (
    r"(?:"
    r"(?P<total_bytes>totalcap|total(?!ly)|capac)|(?P<allocated_bytes>alread|allocated(?!but))"
    r"|(?P<unallocated_bytes>(?:is)?reservedbypytorchbutun|(?:reservedbut)?unallocated)"
    r"|(?P<reserved_bytes>reserved(?!b)|reservedintotal|cached)|(?P<free_bytes>(?:is)?free|available)"
    r"|(?P<process_bytes>(?:memory)?inuse|used)|(?P<allowed_bytes>allowed))"
)
_A_SIZE = re.compile(SIZE, re.IGNORECASE)
_LOOSE = 450
"""Characters behind a message's head in which its figures are looked for."""


def _loose_figures(message: Message, text: str, begin: int, stop: int) -> None:
    """Read figures with a label right before or behind them, in any order."""
    found: dict[str, str] = {}
    end = message.end
    before, behind = _labels()
    for match in _A_SIZE.finditer(text, begin, min(stop, begin + _LOOSE)):
        label = before.search(text, max(match.start() - 40, 0), match.start()) or behind.match(text, match.end())
        if label and label.lastgroup:
            found.setdefault(label.lastgroup, match[0])
            end = max(end, match.end(), label.end())
    if {"total_bytes", "free_bytes"} & found.keys():
        for name, size in found.items():
            message.take(name, size)
        message.end = end
        if "total_bytes" in message.figures and "message_cut" in message.notes:
            message.notes.remove("message_cut")


def _version(word: str, setting: str, new_site: bool, private: bool) -> str:
    if word.lower() == "capacty" or setting.lower() == "max_split_size_mb":
        return "T4"
    if setting.upper() == "PYTORCH_ALLOC_CONF":
        return "T7"
    if new_site:
        return "T8"
    return "T6" if private else "T5"


def date(message: Message, text: str) -> None:
    """Set the version that the class of the exception, or a cut message, shows."""
    exception = message.exception or ""
    if message.torch_format == "T5" and exception.endswith("torch.OutOfMemoryError"):
        message.torch_format = "T6"
    elif message.torch_format in ("T2", None) and exception.endswith("OutOfMemoryError"):
        # The class came with 1.13, and the parenthesis went with 2.1.
        message.torch_format = "T3" if "total_bytes" in message.figures else message.torch_format
    if message.torch_format is None and "requested_bytes" in message.figures:
        # PyTorch 2.3.0 on GPU 0: the index was a byte of value 0, which ends the text.
        cut = re.match(r"(?i)\.GPU#?(?![\d\s(;])", text[message.end : message.end + 6])
        if cut:
            message.torch_format = "T5b"
            message.note("device_unstated")
            message.note("message_cut")
            message.end += len(".GPU")
