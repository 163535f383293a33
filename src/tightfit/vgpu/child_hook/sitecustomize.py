"""Start hook of the Python processes that a script in a dry run starts: Python imports it before anything else.

It works in any Python 3, also in one without tightfit, in which the process may not train for real unnoticed.
"""

import importlib
import os
import sys


def _next_hook() -> None:
    """Run the sitecustomize that this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path or ".") != here]
    ours, sys.path[:] = sys.modules.pop("sitecustomize", None), others
    try:
        importlib.import_module("sitecustomize")
    except ImportError:
        if ours is not None:
            sys.modules["sitecustomize"] = ours


class _NoTorch:
    """Import hook that stops a process at `import torch`."""

    def __init__(self, folder: str, reason: object) -> None:
        self.folder, self.reason = folder, reason

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            with open(os.path.join(self.folder, str(os.getpid()) + ".unplayed"), "w") as file:
                file.write(" ".join(getattr(sys, "orig_argv", sys.argv)))
            raise ImportError("tightfit: this process cannot be played on the virtual GPU: " + str(self.reason))


def _start(folder: str) -> None:
    try:
        with open(os.path.join(folder, "root")) as file:
            root = file.read()
        sys.path.insert(0, root)
        try:
            from tightfit.vgpu.attach import attach
        finally:
            sys.path.remove(root)
            sys.path.append(root)
    except Exception as error:  # another Python: whatever fails there, it must not train
        sys.meta_path.insert(0, _NoTorch(folder, error))
    else:
        attach(folder)


_folder = os.environ.get("TIGHTFIT_PLAY")
_next_hook()
if _folder and os.path.exists(os.path.join(_folder, "settings.json")):
    _start(_folder)
