"""Processes of one run as torchrun would start them, forked from one that has loaded torch.

python tests/ranks.py NUMBER (-m MODULE | SCRIPT) [ARGUMENT ...]
"""

import os
import runpy
import socket
import sys
from collections.abc import Callable

import torch  # noqa: F401

import tightfit.trainer.loop  # noqa: F401


def main() -> int:
    words = sys.argv[2:]
    return in_ranks(int(sys.argv[1]), lambda: run(words))


def in_ranks(count: int, action: Callable[[], int]) -> int:
    """Run `action` in so many forked processes, with the environment that torchrun gives; return the largest code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in map(str, range(count)):
        pid = os.fork()
        if not pid:
            sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            os.environ.update(address | sizes | {"RANK": rank, "LOCAL_RANK": rank})
            sys.exit(action())
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


def run(words: list[str]) -> int:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
