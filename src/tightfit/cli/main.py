"""`tightfit COMMAND ...`: find the command, run it, and turn its errors into one sentence and an exit code."""

import contextlib
import difflib
import importlib
import io
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType

from tightfit.cli.exits import FAILED, INTERRUPTED, OK, OUR_ERROR
from tightfit.cli.parser import keys_help, language_in, leading_language
from tightfit.errors import ConfigError, TightfitError
from tightfit.system.frame_stack import with_frame_stack
from tightfit.wording import language_kept, say, speak


def commands() -> dict[str, str]:
    """Return each command with a line about it."""
    return {
        "train": say("cli.command.train"),
        "prepare": say("cli.command.prepare"),
        "sample": say("cli.command.sample"),
        "plan": say("cli.command.plan"),
        "dryrun": say("cli.command.dryrun"),
        "check": say("cli.command.check"),
        "doctor": say("cli.command.doctor"),
        "watch": say("cli.command.watch"),
        "report": say("cli.command.report"),
        "explain": say("cli.command.explain"),
        "convert": say("cli.command.convert"),
        "cache": say("cli.command.cache"),
        "schema": say("cli.command.schema"),
        "completion": say("cli.command.completion"),
    }


@with_frame_stack
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit code: 0 done, 1 does not fit or would fail, 2 the user's mistake, 3 our own error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold any bytes
    with language_kept():
        return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    try:
        return _run(words)
    except SystemExit as end:  # argparse ends so after --help
        return int(end.code or 0)
    except TightfitError as error:
        print(f"tightfit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"tightfit: {say('cli.main.interrupted')}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, as in `tightfit ... | head`
        return FAILED
    except MemoryError:  # the host's; what the trainer can survive does not come here
        print(f"tightfit: {say('cli.main.no_memory')}", file=sys.stderr)
        return FAILED
    except Exception:  # any other is a fault of ours, and its traceback is what we need
        traceback.print_exc()
        print(f"tightfit: {say('cli.main.our_error')}", file=sys.stderr)
        return OUR_ERROR


def _run(words: list[str]) -> int:
    users = speak(None)
    leading, words = leading_language(words)
    speak(leading or language_in(words))  # help and mistakes are printed before the options are known
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"tightfit {version('tightfit')}")
        return OK
    name, *rest = words
    with _missing_package_named(name):
        command = command_module(name)
        parser = command.parser()
        if name in _EXPLAINS_KEYS and any(word in ("-h", "--help") for word in rest):
            parser.epilog = f"{parser.epilog}\n\n{say('cli.main.keys')}\n{keys_help(parser.takes_keys)}"
        options, others = parser.read(rest)
        options.lang = speak(options.lang or leading or users)
        code: int = command.run(options, others)
    return code


_DISTRIBUTIONS = {"pynvml": "nvidia-ml-py", "yaml": "pyyaml"}
"""Distributions of packages that are imported under another name."""


@contextlib.contextmanager
def _missing_package_named(command: str) -> Iterator[None]:
    """Name a package that tightfit depends on and that is not installed, and the command that installs all of those."""
    try:
        yield
    except ModuleNotFoundError as error:
        from importlib.metadata import distributions, requires

        module = (error.name or "").partition(".")[0]
        package = _DISTRIBUTIONS.get(module, module)
        needed = {re.split(r"[^\w.-]", each)[0]: each for each in requires("tightfit") or () if ";" not in each}
        if package not in needed:
            raise
        missing = [f"'{each}'" for name, each in needed.items() if name == package or not any(distributions(name=name))]
        message = say("cli.main.missing", command=command, package=package, missing=" ".join(missing))
        raise TightfitError(message) from None


_EXPLAINS_KEYS = ("train", "sample")
"""Commands with all keys in their help."""


def command_module(name: str) -> ModuleType:
    """Import a command. ConfigError for an unknown one."""
    known = commands()
    if name not in known:
        if near := difflib.get_close_matches(name, known, n=1):
            raise ConfigError(say("cli.main.unknown_near", name=name, near=near[0]))
        raise ConfigError(say("cli.main.unknown", name=name))
    return importlib.import_module(f"tightfit.cli.cmd_{name}")


def _help() -> str:
    return say("cli.main.help", commands="\n".join(f"  {name:<10} {does}" for name, does in commands().items()))


if __name__ == "__main__":
    sys.exit(main())
