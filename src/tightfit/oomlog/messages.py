"""The formats of out-of-memory messages, as patterns over text from which all white space was removed.

Terminals, mailers and loggers break messages anywhere, in the middle of words and numbers, and indent what follows.
Without white space all those breaks are gone, and no format is ambiguous without it. The formats and the versions
that print them: c10/cuda/CUDACachingAllocator.cpp and its siblings from PyTorch 0.1.12 to 2.14.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tightfit.oomlog.facts import Figure, OtherProcess

SIZE = r"\d{1,20}(?:\.\d{0,6})?(?:bytes?|[KMGTPE]i?B)"
REACH = 2500
"""Characters, without white space, that one message may span; a list of a hundred processes needs as many."""

_HEAD = re.compile(
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
    "totalcapacity": "total_bytes", "alreadyallocated": "allocated_bytes", "free": "free_bytes",
    "allowed": "allowed_bytes", "reservedintotalbyPyTorch": "reserved_bytes",
    "cached": "unallocated_bytes",  # PyTorch 0.4.1 to 1.3 print amount_cached - amount_allocated
}  # fmt: skip
_NEW = re.compile(
    rf"GPU#?(?P<index>\d{{0,4}})hasatotal(?P<word>capaci?ty)of(?P<total>{SIZE})"
    rf"|ofwhich(?P<free>{SIZE})isfree"
    rf"|Process(?P<pid>\d{{1,10}})has(?P<theirs>{SIZE})memoryinuse"
    rf"|thisprocesshas(?P<own>{SIZE})memoryinuse"
    rf"|(?<=[.\s])(?P<allowed>{SIZE})allowed;"
    rf"|Oftheallocatedmemory(?P<allocated>{SIZE})isallocatedbyPyTorch"
    rf"|with(?P<pools>{SIZE})allocatedinprivatepools"
    rf"|and(?P<unallocated>{SIZE})isreservedbyPyTorchbutunallocated"
    r"|(?P<advice>trysetting)(?P<setting>max_split_size_mb|PYTORCH_(?:(?:CUDA|HIP)_)?ALLOC_CONF)?"
    r"|(?P<site>docs\.pytorch\.org|optimizing-memory-usage)"
)
_NEW_NAMES = {
    "total": "total_bytes", "free": "free_bytes", "own": "process_bytes", "allowed": "allowed_bytes",
    "allocated": "allocated_bytes", "pools": "private_pool_bytes", "unallocated": "unallocated_bytes",
}  # fmt: skip
_ASYNC = re.compile(
    rf"Currentlyallocated:(?P<allocated>{SIZE})|Requested:(?P<requested>{SIZE})|Devicelimit:(?P<total>{SIZE})"
    rf"|Free\(accordingtoCUDA\):(?P<free>{SIZE})|PyTorchlimit\(setbyuser-suppliedmemoryfraction\):(?P<allowed>{SIZE})"
)
_ASYNC_NAMES = {name: f"{name}_bytes" for name in ("allocated", "requested", "total", "free", "allowed")}
_MPS = re.compile(
    rf"otherallocations:(?P<others>{SIZE})|maxallowed:(?P<allowed>{SIZE})|Triedtoallocate(?P<requested>{SIZE})"
)
# Metal counts only this process's buffers, so its other allocations are of this process, too.
_MPS_NAMES = {"others": "outside_pytorch_bytes", "allowed": "allowed_bytes", "requested": "requested_bytes"}
_CLASS = re.compile(r"([A-Za-z_][\w.]{0,80}(?:Error|Exception|Warning|OutOfResources)):(?:[\w ]{0,40}:)?$")

_OTHERS = (
    ("cuda_driver", "outofmemory", r"cudaruntimeerr(?:or)?\(2\):outofmemoryat(?P<t0>)"),
    ("cuda_driver", "error=2:outofmemory", r"THCudaCheckFAILfile=[^\s]{1,200}?error=2:outofmemory(?P<t0>)"),
    (
        "cuda_driver", "cudaMallocfailed:outofmemory",
        rf"allocating(?P<size>{SIZE})ondevice(?P<device>\d{{1,3}}):cudaMallocfailed:outofmemory",
    ),
    ("cuda_driver", "outofmemory", r"(?:CUDA(?:driver|runtime)?|HIP)[Ee]rror:outofmemory"
    r"|CUDADriverError:outofmemory"),
    ("cuda_driver", "failed:outofmemory", r"(?:cuda|hip)Malloc(?:Async|Managed|Host)?failed:outofmemory"),
    ("cuda_driver", "ErrorMemoryAllocation", r"cudaErrorMemoryAllocation"),
    ("cuda_driver", "OUT_OF_MEMORY", r"CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuda_driver", "hipErrorOutOfMemory", r"hipErrorOutOfMemory"),
    ("cublas", "BLAS_STATUS_ALLOC", r"[A-Z]{2,3}BLAS_STATUS_ALLOC_FAILED"),
    ("cublas", "cublasruntimeerror:", r"cublasruntimeerror:(?:resourceallocationfailed"
    r"|librarynotinitialized(?P<unsure>))"),
    ("cublas", "BLAS_STATUS_NOT", r"[A-Z]{2,3}BLAS_STATUS_NOT_INITIALIZED(?P<unsure>)"),
    ("cudnn", "CUDNN_STATUS_ALLOC", r"CUDNN_STATUS_ALLOC_FAILED"),
    ("cudnn", "CUDNN_STATUS_NOT_INIT", r"CUDNN_STATUS_NOT_INITIALIZED(?P<unsure>)"),
    ("cuda_library", "ALLOC", r"(?:CUSOLVER|CUSPARSE|CURAND)_STATUS_(?:ALLOC_FAILED|ALLOCATION_FAILED)"
    r"|CUFFT_ALLOC_FAILED"),
    ("nccl", "FailedtoCUDA", r"FailedtoCUDA[cm]alloc(?:async)?(?P<size>\d{1,16}bytes)"),
    ("nccl", "failure", r"C(?:uda|UDA)failure2?[:,]?'outofmemory'"),
    ("nvml_assert", "NVML_SUCCESS==", r"NVML_SUCCESS==.{0,200}?(?:INTERNALASSERTFAILED|CUDACachingAllocator)"),
    ("expandable_segments_assert", "handles_.at(i)", r"!handles_\.at\(i\)INTERNALASSERTFAILED"),
    (
        "triton_resources", "outofresource:",
        r"outofresource:(?P<what>sharedmemory|threads|registers|tensormemory),?Required:(?P<need>\d{1,15}),?"
        r"(?:Hardwarelimit(?:ation)?:(?P<limit>\d{1,15}))?",
    ),
    (
        "host_allocator", "youtriedtoallocate",
        r"DefaultCPUAllocator:[^:]{0,40}:?youtriedtoallocate(?P<size>\d{1,20}bytes)",
    ),
    ("host_allocator", "youtriedtoallocate", r"Torch:notenoughmemory:youtriedtoallocate(?P<floor>\d{1,6})GB"),
    ("host_numpy", "Unabletoallocate", rf"Unabletoallocate(?P<size>{SIZE})foranarraywithshape"),
    ("host_numpy", "Unabletoallocatearray", r"Unabletoallocatearraywithshape"),
    (
        "shared_memory", "signal:Buserror",
        r"DataLoaderworker\(pid(?:\(s\))?(?P<pid>\d{1,10})\)iskilledbysignal:Buserror",
    ),
    (
        "dataloader_killed", "DataLoaderworker(",
        r"DataLoaderworker\(pid(?:\(s\))?(?P<pid>[\d,]{1,60})\)(?:iskilledbysignal:(?:Killed|Aborted)"
        r"|exitedunexpectedly)",
    ),
    ("shared_memory", "sharedmemory", r"insufficientsharedmemory\(shm\)|outofsharedmemory"
    r"|unabletoallocatesharedmemory\(shm\)"),
    ("shared_memory", "unabletowritetofile", r"unabletowritetofile</torch_"),
    ("windows_commit_limit", "1455", r"(?:oserror|WinError|errorcode:)<?1455(?!\d)"),
    ("windows_commit_limit", "pagingfile", r"pagingfileistoosmall"),
    ("windows_commit_limit", "页面文件", r"页面文件太小"),
    ("windows_commit_limit", "ページング", r"ページングファイルが小さすぎ"),
    ("mps_out_of_memory", "Invalidbuffersize:", rf"Invalidbuffersize:(?P<size>{SIZE})"),
    ("mps_out_of_memory", "CallbackErrorOutOfMemory", r"kIOGPUCommandBufferCallbackErrorOutOfMemory"),
    (
        "host_killed", "Outofmemory:Kill",
        r"Outofmemory:Kill(?:ed)?process(?P<pid>\d{1,10})(?:.{0,200}?anon-rss:(?P<rss>\d{1,15}kB))?",
    ),
    ("host_killed", "oom", r"oom[-_]kill"),
    ("host_killed", "OOMKilled", r"OOMKilled(?!.?:false)"),
    ("host_killed", "code", r"(?:exit|return)code[:=]?-9(?!\d)(?P<unsure>)"),
    ("host_killed", "137", r"(?:code|exit|status)[:=]?\(?137(?!\d)(?P<unsure>)"),
    ("host_killed", "SIGKILL", r"(?:\(|Signals\.|signal(?:9[:：])?)SIGKILL(?P<unsure>)"),
    ("host_memory_error", "MemoryError:", r"(?<!OutOf)(?<!Array)MemoryError:(?!Unabletoallocate)"),
    ("host_memory_error", "std::bad_alloc", r"std::bad_alloc"),
    ("host_memory_error", "Cannotallocatememory", r"\[Errno12\]Cannotallocatememory"),
    ("host_memory_error", "unabletommap", r"unabletommap(?P<size>\d{1,16}bytes)"),
)  # fmt: skip
"""Kind, words that are in every match, pattern."""
_OTHER = tuple((kind, anchor, re.compile(pattern)) for kind, anchor, pattern in _OTHERS)
_HEADS = ("Triedtoallocate", "totalcapac", "hasatotalcapac", "MPSbackend", "Allocationondevice")
_PLAIN = re.compile(
    r"(?:(?P<backend>CUDA|HIP|XPU|NPU|MPSbackend)outofmemory|torch(?:\.cuda)?\.OutOfMemoryError(?P<bare>))"
)
BACKENDS = {"CUDA": "cuda", "HIP": "hip", "XPU": "xpu", "NPU": "npu", "MPSbackend": "mps"}


@dataclass
class Message:
    """One message found in squeezed text."""

    kind: str
    start: int
    end: int
    exception: str | None = None
    torch_format: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    """Only what is stated."""
    device_index: int | None = None
    other_processes: list[OtherProcess] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pid: int | None = None

    @property
    def states_figures(self) -> bool:
        return bool(self.figures)

    def note(self, code: str) -> None:
        if code not in self.notes:
            self.notes.append(code)

    def take(self, name: str, text: str) -> None:
        """Keep the first figure of each name."""
        figure = Figure.printed(text)
        if figure is not None:
            self.figures.setdefault(name, figure)


def messages_in(squeezed: str) -> Iterator[Message]:
    """Every message in text without white space, in order, each up to its last figure."""
    heads = _Finder(_HEAD, _HEADS, squeezed, 50, 150)
    plains = _Finder(_PLAIN, ("outofmemory", "OutOfMemoryError"), squeezed, 30, 30)
    others = [
        (kind, _Finder(pattern, (anchor,), squeezed, 230, 400))
        for kind, anchor, pattern in _OTHER
        if anchor in squeezed
    ]
    position = 0
    while True:
        head, plain = heads.at(position), plains.at(position)
        kind, other = "", None
        for name, finder in others:
            match = finder.at(position)
            if match and (other is None or match.start() < other.start()):
                kind, other = name, match
        near = min((found for found in (head, other, plain) if found), key=lambda found: found.start(), default=None)
        if near is None:
            return
        if near is plain:  # the name of the class may stand before a message that says more
            near = next((more for more in (head, other) if more and more.start() <= plain.end() + 1), near)
        if near is head:
            message = _allocator_message(squeezed, near, _stop(near.end(), squeezed))
        elif near is other:
            message = _other_message(kind, near)
        else:
            message = _plain_message(near)
        if message.exception is None and squeezed[message.start - 1 : message.start] == ":":
            found = _CLASS.search(squeezed, max(0, message.start - 120), message.start)
            message.exception = found[1] if found else None
        if message.kind in ("cuda_out_of_memory", "hip_out_of_memory"):
            _date(message, squeezed)
        elif message.torch_format not in ("T0", "T9"):
            message.torch_format = None
        yield message
        position = max(message.end, position + 1)


class _Finder:
    """The next match of a pattern, looked for only around words that each match has; searches forward only."""

    def __init__(self, pattern: re.Pattern[str], anchors: tuple[str, ...], text: str, back: int, on: int) -> None:
        self._pattern, self._text, self._back, self._on = pattern, text, back, on
        self._anchors = dict.fromkeys(anchors, -1)
        self._found: re.Match[str] | None = None

    def at(self, position: int) -> re.Match[str] | None:
        """The first match that starts at or behind `position`."""
        if self._found is None or self._found.start() < position:
            self._found = self.search(position)
        return self._found

    def search(self, position: int) -> re.Match[str] | None:
        at = position
        while self._anchors:
            for anchor, known in list(self._anchors.items()):
                if known < at:
                    self._anchors[anchor] = self._text.find(anchor, at)
                    if self._anchors[anchor] < 0:
                        del self._anchors[anchor]
            near = min(self._anchors.values(), default=None)
            if near is None:
                return None
            found = self._pattern.search(self._text, max(position, near - self._back), near + self._on)
            if found:
                return found
            at = near + 1
        return None


def _stop(position: int, text: str) -> int:
    """Where the next message begins, or as far as one may reach."""
    stop = min(len(text), position + REACH)
    for anchor in _HEADS:
        # Each format has a second part that is found by itself where the first is missing.
        at = text.find(anchor, position + (120 if "total" in anchor else 0), stop)
        stop = at if at >= 0 else stop
    return stop


def _allocator_message(text: str, head: re.Match[str], stop: int) -> Message:
    if head["mps"]:
        message = Message("mps_out_of_memory", head.start(), head.end())
        message.take("allocated_bytes", head["mps"])
        _collect(message, _MPS, _MPS_NAMES, text, min(stop + 200, head.end() + 300))
        return message
    if head["device"] is not None or head["cut"] is not None:
        message = Message("cuda_async", head.start(), head.end())
        if head["cut"] is not None:
            message.exception, message.start = "torch.OutOfMemoryError", head.start() + len("OutOfMemoryError:")
        message.device_index = int(head["device"]) if head["device"] else None
        _collect(message, _ASYNC, _ASYNC_NAMES, text, stop)
        return message
    backend = head["backend"]
    kind = f"{BACKENDS[backend]}_out_of_memory" if backend in BACKENDS else "device_out_of_memory"
    if not backend and not head["bare"]:  # the first words are missing; only CUDA's users leave them out
        kind = "npu_out_of_memory" if head["unit"] == "NPU" else "cuda_out_of_memory"
        if "thansize4GB" in head[0] or "largerthan4GB" in head[0]:
            kind = "xpu_out_of_memory"
    message = Message(kind, head.start(), head.end())
    if size := head["size"] or head["tail"]:
        message.take("requested_bytes", size)
    elif head["huge"]:
        message.note("request_beyond_1eb")
    # A head that is itself the beginning of the sentence on the device is read again, for its figures.
    begin = head.end() if head["size"] or head["huge"] or head["tail"] else head.start()
    new = text.find("hasatotalcapac", begin, min(begin + 120, stop))
    if new >= 0:
        _new_sentences(message, text, begin, stop)
    else:
        _old_parenthesis(message, text, begin, stop)
    if head["bare"]:
        message.torch_format = "T9"
    return message


def _collect(message: Message, pattern: re.Pattern[str], names: dict[str, str], text: str, stop: int) -> None:
    for match in pattern.finditer(text, message.end, stop):
        name = match.lastgroup
        if name in names and names[name] not in message.figures:
            message.take(names[name], match[name])
            message.end = match.end()


def _old_parenthesis(message: Message, text: str, begin: int, stop: int) -> None:
    """`(GPU 0; T total capacity; A already allocated; ...)`, and the advice behind it."""
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
    """`GPU 0 has a total capacity of T of which F is free. ...`"""
    is_new = private = False
    word = setting = ""
    for match in _NEW.finditer(text, begin, stop):
        if match.start() > message.end + 700 and "total_bytes" in message.figures:
            break
        name = match.lastgroup
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
        elif name in _NEW_NAMES:
            if _NEW_NAMES[name] in message.figures:
                break  # another message
            message.take(_NEW_NAMES[name], match[name])
            private = private or name == "pools"
        message.end = match.end()
    if message.torch_format is None:
        message.torch_format = _version(word, setting, is_new, private)
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


def _date(message: Message, text: str) -> None:
    """What the class of the exception and a cut message say of the version."""
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


def _plain_message(found: re.Match[str]) -> Message:
    """The words without any figure."""
    if found["bare"] is not None:
        message = Message("cuda_out_of_memory", found.start(), found.end(), exception=found[0])
        message.note("class_without_message")
        return message
    kind = f"{BACKENDS[found['backend']]}_out_of_memory" if found["backend"] else "device_out_of_memory"
    message = Message(kind, found.start(), found.end())
    message.note("message_cut")
    return message


def _other_message(kind: str, found: re.Match[str]) -> Message:
    message = Message(kind, found.start(), found.end())
    groups = {name: text for name, text in found.groupdict().items() if text is not None}
    if "size" in groups:
        message.take("requested_bytes", groups["size"])
    if "t0" in groups:
        message.torch_format = "T0"
    if "device" in groups:
        message.device_index = int(groups["device"])
    if "floor" in groups:  # printed with integer division
        low = int(groups["floor"]) * 2**30
        message.figures["requested_bytes"] = Figure(bytes=low, low=low, high=low + 2**30 - 1)
    if groups.get("what") == "sharedmemory":
        message.take("requested_bytes", f"{groups['need']} bytes")
        if "limit" in groups:
            message.take("allowed_bytes", f"{groups['limit']} bytes")
    if "unsure" in groups or kind in CAUSE_UNSTATED:
        message.note("cause_unstated")
    if groups.get("pid", "").isdigit():
        message.pid = int(groups["pid"])
    if "rss" in groups:
        message.take("process_bytes", groups["rss"])
    return message


CAUSE_UNSTATED = frozenset({"dataloader_killed", "expandable_segments_assert"})
"""Kinds whose message does not name memory."""
