"""`tightfit COMMAND ...`: finds the command, runs it, and turns its errors into one sentence and an exit code."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence

from tightfit.errors import TightfitError

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
}
OK, FAILED, USER_MISTAKE, OUR_ERROR = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 it does not fit or would fail, 2 the user's mistake, 3 our own error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"tightfit {version('tightfit')}")
        return OK
    command, *rest = words
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "tightfit --help lists them"
            print(f"tightfit: {command!r} is not a command; {hint}", file=sys.stderr)
            return USER_MISTAKE
        module = importlib.import_module(f"tightfit.cli.cmd_{command}")
        code: int = module.run(rest)
        return code
    except TightfitError as error:
        print(f"tightfit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tightfit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in `tightfit ... | head`
        return FAILED
    except Exception:
        traceback.print_exc()
        print("tightfit: this is an error of ours; please report it with the lines above", file=sys.stderr)
        return OUR_ERROR


def wants_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def _help() -> str:
    lines = "\n".join(f"  {name:<10} {does}" for name, does in COMMANDS.items())
    return (
        "tightfit: train GPTs that fit the GPU you have\n\n"
        f"usage: tightfit COMMAND [config.py ...] [--key=value ...]\n\n{lines}\n\n"
        "tightfit COMMAND --help says more. For example:\n"
        "  tightfit prepare stdlib\n"
        "  tightfit train configs/train_stdlib.py\n"
        "  tightfit sample --out_dir=out-stdlib --start='def '"
    )


if __name__ == "__main__":
    sys.exit(main())
