"""Standard input of plays: a terminal where the user's is one, but with nobody who types."""

import contextlib
import os
import subprocess
import termios
from collections.abc import Iterator

_LOCAL_FLAGS, _SPECIAL_CHARACTERS = 3, 6  # indices of the list that tcgetattr returns: termios(3)


@contextlib.contextmanager
def input_for_plays() -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the standard input for a process, and the descriptors that it must inherit to keep it usable.

    Scripts ask their terminal for its size, such as by `stty size`, and fail without one. Whoever reads from this one
    finds the end of the input at once: a prompt must not make a play wait.
    """
    if not os.isatty(0):
        yield subprocess.DEVNULL, ()
        return
    keyboard, terminal = os.openpty()
    try:
        settings = termios.tcgetattr(terminal)
        settings[_LOCAL_FLAGS] &= ~(termios.ICANON | termios.ECHO)
        # With both of these 0, a read returns what was typed so far: nothing, which is how the end of a file reads.
        settings[_SPECIAL_CHARACTERS][termios.VMIN] = settings[_SPECIAL_CHARACTERS][termios.VTIME] = 0
        termios.tcsetattr(terminal, termios.TCSANOW, settings)
        termios.tcsetwinsize(terminal, termios.tcgetwinsize(0))
        yield terminal, (keyboard,)
    finally:
        os.close(keyboard)
        os.close(terminal)
