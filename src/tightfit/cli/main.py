"""`tightfit COMMAND ...`: find the command, run it, and turn its errors into one sentence and an exit code."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from tightfit.cli.exits import FAILED, INTERRUPTED, OK, OUR_ERROR
from tightfit.cli.parser import keys_help
from tightfit.errors import ConfigError, TightfitError

COMMANDS = {
    "train": "train a GPT as nanoGPT does: config files and --key=value",
    "prepare": "turn text into a dataset of tokens",
    "sample": "text from a checkpoint",
    "plan": "the fastest way to fit a run on a device",
    "dryrun": "a training script on a virtual GPU: does it fit?",
    "doctor": "is this machine, and a run on it, in order?",
    "watch": "memory of every card and of the host, live",
    "report": "a training run as one HTML page with charts",
    "explain": "an error log: what failed, why, and fixes that were checked",
    "convert": "checkpoints between nanoGPT and Hugging Face",
    "schema": "JSON schema of what a command prints with --json",
    "completion": "completion for bash, zsh or tcsh",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit code: 0 done, 1 does not fit or would fail, 2 the user's mistake, 3 our own error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words)
    except SystemExit as end:  # argparse ends so after --help
        return int(end.code or 0)
    except TightfitError as error:
        print(f"tightfit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tightfit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in `tightfit ... | head`
        return FAILED
    except Exception:  # any other is a fault of ours, and its traceback is what we need
        traceback.print_exc()
        print("tightfit: this is an error of ours; please report it with the lines above", file=sys.stderr)
        return OUR_ERROR


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"tightfit {version('tightfit')}")
        return OK
    name, *rest = words
    command = command_module(name)
    parser = command.parser()
    if name in _EXPLAINS_KEYS and any(word in ("-h", "--help") for word in rest):
        parser.epilog = f"{parser.epilog}\n\nkeys:\n{keys_help(parser.takes_keys)}"
    options, others = parser.read(rest)
    code: int = command.run(options, others)
    return code


_EXPLAINS_KEYS = ("train", "sample")
"""Commands with all keys in their help."""


def command_module(name: str) -> ModuleType:
    """Import a command. ConfigError for one that there is not."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "tightfit --help lists them"
        raise ConfigError(f"{name!r} is not a command; {hint}")
    return importlib.import_module(f"tightfit.cli.cmd_{name}")


def _help() -> str:
    lines = "\n".join(f"  {name:<10} {does}" for name, does in COMMANDS.items())
    return (
        "tightfit: train GPTs that fit the GPU you have\n\n"
        f"usage: tightfit COMMAND [config.py ...] [--key=value ...]\n\n{lines}\n\n"
        "tightfit COMMAND --help explains it. For example:\n"
        "  tightfit prepare stdlib\n"
        "  tightfit train configs/train_stdlib.py\n"
        "  tightfit sample --out_dir=out-stdlib --start='def '"
    )


if __name__ == "__main__":
    sys.exit(main())
