"""Lines of a log as the program wrote them: without what reading pictures, pasting and other letters made of them."""

import re

_MISREAD = (
    (re.compile(r"\b0ut(?=Of| of)"), "Out"),
    (re.compile(r"\b(?:rn|m)em[o0]ry\b"), "memory"),
    (re.compile(r"\bMem0ry"), "Memory"),
    (re.compile(r"\bPyT0rch\b"), "PyTorch"),
    (re.compile(r"MemoryErr0r\b"), "MemoryError"),
    (re.compile(r"\b0f memory\b"), "of memory"),
    (re.compile(r"\ba(?!ll)[lI1]{2}ocat(?=e|ion)"), "allocat"),
    (re.compile(r"\ba(?:[I1]|l1|11)ready\b"), "already"),
    (re.compile(r"\btota[1I] by\b"), "total by"),
    (re.compile(r"\b[l1]f reserved\b"), "If reserved"),
    (re.compile(r"\bGPU [Oo](?=;| has)"), "GPU 0"),
    (re.compile(r"\bGPU [lI](?=;| has)"), "GPU 1"),
)
"""Words of PyTorch's message as programs read them from a picture, which take O for 0, l for 1, and rn for m."""
_TYPOS = re.compile(
    r"\b(?:(?:ot|ouf|oit|our|out off|out fo) (?:of )?memory|out of (?:memeory|memroy|meory|memoy|momory|memery))\b"
)
"""The words as people mistype them."""
_MISREAD_SIZE = re.compile(
    r"(?<![\w.])[\dOolI]{1,4}[.,][\dOolI]{1,2}(?= ?[KMG]iB)|(?<=\bProcess )[\dOolI]{2,9}(?= has)"
)
_AS_DIGITS = str.maketrans("OolI,", "0011.")


def well_read(line: str) -> str:
    """Return a line on memory without the mistakes of a program that read it from a picture, or of a person's typing.

    >>> well_read("CUDA out of rnemory. Tried to al1ocate l.50 GiB (GPU O; 1.Ol GiB free)")
    'CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 1.01 GiB free)'
    """
    for pattern, word in _MISREAD:
        line = pattern.sub(word, line)
    line = _TYPOS.sub("out of memory", line)
    return _MISREAD_SIZE.sub(lambda size: size[0].translate(_AS_DIGITS), line)


_FRAME = re.compile(r'(File "[^"\n]{1,400}", line \d{1,7}, in [^\s"]{1,200})[ \t]+(?=\S)')
"""A frame of a traceback with text behind it on its line, where Python ends the line."""
_NEXT_FRAME = re.compile(r'\s+(?=File "[^"\n]{1,400}", line \d{1,7}, in )')
_NEXT_ERROR = re.compile(
    r"(?<=\S)(?<!except)(?<!raise)\s+(?=(?:[A-Za-z_]\w{0,60}\.){0,5}[A-Z]\w{1,60}(?:Error|Exception)\b: ?\S)"
)


def apart(line: str) -> list[str]:
    """Return the lines of a traceback that a paste joined; any other line as it is.

    >>> apart('Traceback (most recent call last): File "a.py", line 3, in f y = g(x) RuntimeError: CUDA')
    ['Traceback (most recent call last):', '  File "a.py", line 3, in f', '    y = g(x)', 'RuntimeError: CUDA']
    """
    if not _FRAME.search(line):
        return [line]
    found: list[str] = []
    for joined in _NEXT_FRAME.split(line):
        frame, _, behind = _FRAME.sub(r"\1\n", joined, count=1).partition("\n")
        code, *error = _NEXT_ERROR.split(behind, maxsplit=1)
        found += [f"  {frame}" if frame.startswith("File") else frame, *([f"    {code}"] if code else []), *error]
    return found


_WORDS = {
    each.lower(): each
    for each in (
        "Traceback (most recent call last)", 'File "', "CUDA out of memory", "Tried to allocate", "DefaultCPUAllocator",
        "OutOfMemoryError", "MemoryError", "_ArrayMemoryError", "RuntimeError", "AcceleratorError", "InternalError",
        "XlaRuntimeError", "ResourceExhaustedError", "RESOURCE_EXHAUSTED", "ONNXRuntimeError", "ValueError", "OSError",
        "TypeError", "KeyError", "IndexError", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
        "KiB", "MiB", "GiB", "TiB",
    )
}  # fmt: skip
"""Words of messages whose letters tell them from prose, by the same words in small letters."""
_SMALL = re.compile(
    rf"(?<![a-z])(?:{'|'.join(re.escape(each) for each in sorted(_WORDS, key=len, reverse=True))})(?![a-z])"
)
_IN_CAPITALS = ("TRIED TO ALLOCATE", "OUT OF MEMORY")


def recased(line: str) -> str:
    """Return a line in one case with the letters that programs give the words of their messages.

    >>> recased("torch.outofmemoryerror: cuda out of memory. tried to allocate 46.00 mib")
    'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 46.00 MiB'
    """
    if line.isupper() and any(each in line for each in _IN_CAPITALS):
        line = line.lower()
    if not line.islower():
        return line
    if line == "killed":
        return "Killed"
    return _SMALL.sub(lambda word: _WORDS[word[0]], line)
