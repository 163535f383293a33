"""Processes of one run as torchrun would start them, forked from one that has loaded torch.

python tests/ranks.py NUMBER (-m MODULE | SCRIPT) [ARGUMENT ...]
"""

import os
import runpy
import socket
import sys

import torch  # noqa: F401

import tightfit.trainer.loop  # noqa: F401


def main() -> int:
    count, words = int(sys.argv[1]), sys.argv[2:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in map(str, range(count)):
        pid = os.fork()
        if not pid:
            sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            os.environ.update(address | sizes | {"RANK": rank, "LOCAL_RANK": rank})
            run(words)
            return 0
        children.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)


def run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
