"""Messages of the allocators on devices: every format that states figures, from PyTorch 0.4 to 2.14.

The formats and the versions that print them: c10/cuda/CUDACachingAllocator.cpp and its siblings. A group that is named
like a figure holds that figure.
"""

import re

from tightfit.oomlog.facts import Figure, OtherProcess
from tightfit.oomlog.message import SIZE, Message

REACH = 2500
"""Characters, without white space, that one message may span; a list of a hundred processes needs as many."""
HEAD_WORDS = ("Triedtoallocate", "totalcapac", "hasatotalcapac", "MPSbackend", "Allocationondevice")
"""Words of which every head has one."""
HEAD = re.compile(
    r"(?:(?P<backend>CUDA|HIP|XPU|NPU|MUSA|MLU|GCU|HPU|SDAA|MACA|PrivateUse1)out|(?P<bare>Out))ofmemory[.:,]*"
    rf"Triedtoallocate(?:(?P<size>{SIZE})|(?P<huge>morethan1EB(?:memory)?))"
    rf"|MPSbackendoutofmemory\(MPSallocated:(?P<mps>{SIZE})"
    rf"|(?:blockwithsizelargerthan4GB!)?Triedtoallocate(?P<tail>{SIZE})\.?(?=\(?[GN]PU\d*(?:;|hasatotal))"
    rf"|\((?P<unit>[GN]PU)(?P<index>\d{{1,4}});(?={SIZE}totalcapacity)"
    r"|GPU#?\d{0,4}hasatotalcapac(?:i?)tyof"
    r"|Allocationondevice(?P<device>\d{0,4})wouldexceedallowedmemory\.?(?:\(outofmemory\))?"
    r"|OutOfMemoryError:Allocationondevice(?!\d{1,4}would|would)(?P<cut>)"
)
_OLD = re.compile(
    rf"(?<=[;(,])(?P<size>{SIZE})(?P<name>totalcapacity|alreadyallocated|currentactive|free|allowed|cached|"
    r"reservedintotalbyPyTorch)[;)]"
    r"|(?P<unit>[GN]PU)(?P<index>\d{1,4});"
)
_OLD_NAMES = {
    "totalcapacity": "total_bytes",
    "alreadyallocated": "allocated_bytes",
    "free": "free_bytes",
    "allowed": "allowed_bytes",
    "reservedintotalbyPyTorch": "reserved_bytes",
    "cached": "unallocated_bytes",  # PyTorch 0.4.1 to 1.3 print amount_cached - amount_allocated
}
_NEW = re.compile(
    rf"GPU#?(?P<index>\d{{0,4}})hasatotal(?P<word>capaci?ty)of(?P<total>{SIZE})"
    rf"|ofwhich(?P<free>{SIZE})isfree"
    rf"|Process(?P<pid>\d{{1,10}})has(?P<theirs>{SIZE})memoryinuse"
    rf"|thisprocesshas(?P<process>{SIZE})memoryinuse"
    rf"|(?<=[.\s])(?P<allowed>{SIZE})allowed;"
    rf"|Oftheallocatedmemory(?P<allocated>{SIZE})isallocatedbyPyTorch"
    rf"|with(?P<private_pool>{SIZE})allocatedinprivatepools"
    rf"|and(?P<unallocated>{SIZE})isreservedbyPyTorchbutunallocated"
    r"|(?P<advice>trysetting)(?P<setting>max_split_size_mb|PYTORCH_(?:(?:CUDA|HIP)_)?ALLOC_CONF)?"
    r"|(?P<site>docs\.pytorch\.org|optimizing-memory-usage)"
)
_ASYNC = re.compile(
    rf"Currentlyallocated:(?P<allocated>{SIZE})|Requested:(?P<requested>{SIZE})|Devicelimit:(?P<total>{SIZE})"
    rf"|Free\(accordingtoCUDA\):(?P<free>{SIZE})|PyTorchlimit\(setbyuser-suppliedmemoryfraction\):(?P<allowed>{SIZE})"
)
# Metal counts only this process's buffers, so its other allocations are of this process, too.
_MPS = re.compile(
    rf"otherallocations:(?P<outside_pytorch>{SIZE})|maxallowed:(?P<allowed>{SIZE})|Triedtoallocate(?P<requested>{SIZE})"
)
BACKENDS = {"CUDA": "cuda", "HIP": "hip", "XPU": "xpu", "NPU": "npu", "MPSbackend": "mps"}


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
    if size := head["size"] or head["tail"]:
        message.take("requested_bytes", size)
    elif head["huge"]:
        message.note("request_beyond_1eb")
    # A head that is itself the beginning of the sentence on the device is read again, for its figures.
    begin = head.end() if size or head["huge"] else head.start()
    if text.find("hasatotalcapac", begin, min(begin + 120, stop)) >= 0:
        _new_sentences(message, text, begin, stop)
    else:
        _old_parenthesis(message, text, begin, stop)
    if head["bare"]:
        message.torch_format = "T9"
    return message


def _async_message(text: str, head: re.Match[str], stop: int) -> Message:
    """Read a message of cudaMallocAsync."""
    message = Message("cuda_async", head.start(), head.end())
    if head["cut"] is not None:
        message.exception, message.start = "torch.OutOfMemoryError", head.start() + len("OutOfMemoryError:")
    message.device_index = int(head["device"]) if head["device"] else None
    _collect(message, _ASYNC, text, stop)
    return message


def _kind(head: re.Match[str]) -> str:
    backend = head["backend"]
    if backend or head["bare"]:
        return f"{BACKENDS[backend]}_out_of_memory" if backend in BACKENDS else "device_out_of_memory"
    # The first words are missing; only CUDA's users leave them out.
    if "thansize4GB" in head[0] or "largerthan4GB" in head[0]:
        return "xpu_out_of_memory"
    return "npu_out_of_memory" if head["unit"] == "NPU" else "cuda_out_of_memory"


def _stop(position: int, text: str) -> int:
    """Return the place where the next message begins, or the farthest that one may reach."""
    stop = min(len(text), position + REACH)
    for anchor in HEAD_WORDS:
        # Each format has a second part that is found by itself where the first is missing.
        at = text.find(anchor, position + (120 if "total" in anchor else 0), stop)
        stop = at if at >= 0 else stop
    return stop


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
            if match["unit"] == "NPU" and message.kind == "device_out_of_memory":
                message.kind = "npu_out_of_memory"
        else:
            name = match["name"]
            if name == "cached":
                message.torch_format = "T1"
            elif name == "reservedintotalbyPyTorch" and message.torch_format is None:
                message.torch_format = "T2"
            if name in _OLD_NAMES:
                message.take(_OLD_NAMES[name], match["size"])
        message.end = match.end()
        if match[0].endswith(")"):
            if text.startswith("Ifreservedmemory", match.end()):
                message.torch_format = "T3"
            break
    if "total_bytes" not in message.figures or not {"reserved_bytes", "unallocated_bytes"} & set(message.figures):
        message.note("message_cut")


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


def _version(word: str, setting: str, new_site: bool, private: bool) -> str:
    if word == "capacty" or setting == "max_split_size_mb":
        return "T4"
    if setting == "PYTORCH_ALLOC_CONF":
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
        cut = re.match(r"\.GPU#?(?![\d\s(;])", text[message.end : message.end + 6])
        if cut:
            message.torch_format = "T5b"
            message.note("device_unstated")
            message.note("message_cut")
            message.end += len(".GPU")
