"""Line breaks for a terminal. Japanese breaks between any two characters, but not before a closing mark.

rich breaks at spaces only, which leaves ragged lines where a sentence without spaces follows a Latin word.
"""

import re

from rich.cells import cell_len

_NOT_FIRST = "、。，．」』）)]}！？!?:;,.ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ"
_NOT_LAST = "「『（([{"
_PIECES = re.compile(r"[!-~’×→…]+|\s+|.")


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` columns; a wide character takes two, and a word is cut only if it is longer than a line.

    Lines are made shorter, to two thirds at most, where only a few columns would be left for the last one.

    >>> wrap("tightfit は 12 GiB の GPU に収めます。", 16)
    ['tightfit は 12', 'GiB の GPU に収', 'めます。']
    """
    lines = _filled(text, width)
    for narrower in range(width - 1, width * 2 // 3, -1):
        if len(lines) == 1 or cell_len(lines[-1]) >= width // 6:
            break
        again = _filled(text, narrower)
        if len(again) > len(lines):
            break
        lines = again
    return lines


def _filled(text: str, width: int) -> list[str]:
    lines = [""]
    for piece in _joined(_PIECES.findall(text)):
        if piece.isspace():
            lines[-1] += " "
        elif cell_len(lines[-1]) + cell_len(piece) <= width:
            lines[-1] += piece
        else:
            if lines[-1].strip():
                lines.append("")
            while cell_len(piece) > width:
                cut = next(end for end in range(len(piece), 0, -1) if cell_len(piece[:end]) <= width or end == 1)
                lines[-1], piece = piece[:cut], piece[cut:]
                lines.append("")
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def _joined(pieces: list[str]) -> list[str]:
    """Glue marks that may not begin a line to the piece before, opening brackets to the piece after."""
    found: list[str] = []
    for piece in pieces:
        glued = found and not found[-1].isspace() and (piece[0] in _NOT_FIRST or found[-1][-1] in _NOT_LAST)
        if glued and not piece.isspace():
            found[-1] += piece
        else:
            found.append(piece)
    return found
