"""A message found in a log, with its figures."""

from msgspec import Struct

from tightfit.oomlog.facts import Figure, OtherProcess

SIZE = r"\d{1,20}(?:\.\d{0,6})?(?:bytes?|[KMGTPE]i?(?:B(?!y)|Bytes?|(?=\.\.|…|$)))"
"""Pattern of a printed size, without white space; a cut text may end within its unit."""
SHELL = r"(?:Zeile|línea|ligne|строка|行|줄|line)\d{1,5}:\d{2,8}"
"""Pattern of a shell's words before the end of a process: the line of its script, and the process."""


def filled(pattern: str) -> str:
    """Return a pattern of formats.toml with the patterns that {SIZE} and {SHELL} stand for."""
    return pattern.replace("{SIZE}", SIZE).replace("{SHELL}", SHELL)


class Message(Struct):
    """One message, at its place in text without white space."""

    kind: str
    start: int
    end: int
    exception: str | None = None
    torch_format: str | None = None
    figures: dict[str, Figure] = {}
    """Stated figures by name."""
    device_index: int | None = None
    other_processes: list[OtherProcess] = []
    notes: list[str] = []
    pid: int | None = None
    details: dict[str, str] = {}
    """Values by name that its sentences repeat as printed: a tensor's shape, a share of the card."""
    is_sure: bool = False
    """True if its words mean nothing else, so that a sentence with them reports a failure."""

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
