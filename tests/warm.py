"""Programs that a test runs in a process of its own, forked from one that has torch loaded: a tenth of the time."""

import atexit
import json
import subprocess
import sys
import tempfile
import textwrap

FORKS = """
import atexit, json, os, sys, traceback
import torch, tightfit
import torch.distributed.tensor, torch.fx.experimental.symbolic_shapes  # what each virtual GPU loads otherwise
import tightfit.vgpu.session
for line in sys.stdin:
    ask = json.loads(line)
    pid = os.fork()
    if not pid:
        for number, name in enumerate(("/dev/null", ask["out"], ask["err"])):
            os.dup2(os.open(name, os.O_RDWR), number)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
code = 0
try:
    exec(compile(ask["program"], ask["name"], "exec"), {"__name__": "__main__"})
except BaseException:
    traceback.print_exc()
    code = 1
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # taking the interpreter down would take as long as most programs
"""


class Warm:
    """Runs programs one after the other."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: str) -> str:
        """Return what a program prints. AssertionError, with its errors, unless it ends with 0."""
        if self._process is None:
            words = [sys.executable, "-c", FORKS]
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            source = textwrap.dedent(program)
            ask = {"program": source, "name": "<string>", "out": out.name, "err": err.name}
            self._process.stdin.write(json.dumps(ask) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            assert code == 0, err.read()
            return out.read()

    def end(self) -> None:
        if self._process is not None:
            self._process.communicate()


_WARM = Warm()
atexit.register(_WARM.end)


def in_process(program: str) -> str:
    """Return what a program prints in a process of its own, because a virtual GPU stays."""
    return _WARM.run(program)
