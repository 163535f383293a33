"""A buffer of torch.compile's code, in which one size is a symbol: the request tells that size."""

import re
from math import prod

from tightfit.diagnosis.tensor_fits import Range
from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.oomlog.run_facts import PrintedShape

_BUFFER = re.compile(
    r"empty_strided_cuda\(\((?P<sizes>[\w, ]{3,120})\), \([^()]{1,200}\), torch\.(?P<dtype>\w{4,12})\)"
)
"""A line that makes a buffer; a size that changes from call to call is a symbol, such as s10."""


def buffer_of_size(text: str, within: Range) -> PrintedShape | None:
    """Return the buffer that a line of compiled code makes, with the size that its symbol must have for the request.

    >>> line = "buf9 = empty_strided_cuda((s10, 1, 1000), (1000, 1000*s10, 1), torch.float32)"
    >>> buffer_of_size(line, Range(low=7_990_000, high=8_000_000)).shape
    (2000, 1, 1000)
    """
    for found in _BUFFER.finditer(text):
        sizes = [each.strip() for each in found["sizes"].split(",") if each.strip()]
        row = ELEMENT_BYTES.get(found["dtype"], 0) * prod(int(each) for each in sizes if each.isdigit())
        if not row or sum(not each.isdigit() for each in sizes) != 1:
            continue
        shape = tuple(int(each) if each.isdigit() else within.high // row for each in sizes)
        buffer = PrintedShape(shape=shape, dtype=found["dtype"], is_solved=True)
        if within.holds(buffer.bytes):
            return buffer
    return None
