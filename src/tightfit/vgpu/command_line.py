"""The command line of a training: its program, and the variables that its launcher would set for one process.

`torchrun`, `accelerate launch`, `deepspeed` and `fabric run` are understood from their arguments and not run.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import msgspec

from tightfit.errors import ConfigError
from tightfit.vgpu import launchers
from tightfit.vgpu.launchers import Launch
from tightfit.wording import say

Kind = Literal["script", "module", "code", "notebook", "entry_point", "other"]

_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_PYTHON = re.compile(r"python(w|\d(\.\d+)?)?(\.exe)?")
_SHELL = re.compile(r"(ba|da|z|k)?sh")
_WITH_VALUE = frozenset("WX")
"""Options of Python that take the next word."""
_PASSING = frozenset({"env", "exec", "nohup", "time", "command"})
"""Commands that run the words after them."""
_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torch.distributed.launch",
    "accelerate.commands.launch": "accelerate-launch",
    "deepspeed": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
}
_LAUNCHERS: Mapping[str, Callable[[Sequence[str], int], Launch]] = {
    "torchrun": launchers.torchrun,
    "torch.distributed.launch": launchers.torch_launch,
    "accelerate-launch": launchers.accelerate_launch,
    "deepspeed": launchers.deepspeed,
    "fabric": launchers.fabric,
    "lightning": launchers.fabric,
}
_SHEBANG = re.compile(rb"#!\s*\S*?/?(?:env\s+(?:-S\s+)?)?(\S+)")


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """The program of one process of a command."""

    kind: Kind
    target: str
    """Path, module, code, `module:function` of an entry point, or the command."""
    arguments: tuple[str, ...] = ()
    environ: dict[str, str] = {}
    """Variables set in front of the command or by its launcher."""
    notes: tuple[str, ...] = ()
    """Sentences about assumptions."""


def read_command(words: Sequence[str], *, rank: int = 0, environ: Mapping[str, str] | None = None) -> Program:
    """Return the program of the process with a rank. ConfigError for a command that cannot be understood."""
    environ = os.environ if environ is None else environ
    words, given = _assignments(words)
    if not words:
        raise ConfigError(say("vgpu.command.empty"))
    name = os.path.basename(words[0])
    launcher, rest = launcher_of(words)
    if launcher:
        launch = _LAUNCHERS[launcher](rest, rank)
        program = read_command(launch.command, rank=rank, environ={**environ, **launch.environ})
        both = {**given, **launch.environ, **program.environ}
        return msgspec.structs.replace(program, environ=both, notes=(*launch.notes, *program.notes))
    if words[0] == "-m" or (_PYTHON.fullmatch(name) and not name.endswith(".py")):
        program = _python(words if words[0] == "-m" else words[1:], words[0], rank, environ)
    else:
        program = _file(words) or _installed(words)
    if rank and rank >= _processes({**environ, **given, **program.environ}):
        raise ConfigError(say("vgpu.command.rank", rank=rank, size=_processes({**environ, **given, **program.environ})))
    return msgspec.structs.replace(program, environ={**given, **program.environ})


def program_word(words: Sequence[str]) -> str:
    """Return the word of a command by which people know it: its file, or the module after -m."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-m" and following:
            return following
        if word.endswith((".py", ".ipynb", ".sh")):
            return word
    return words[0]


def check_command(words: Sequence[str], *, rank: int = 0, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for a mistake that shows before anything is loaded."""
    rest, _ = _assignments(words)
    if not rest or launcher_of(rest)[0] != "accelerate-launch":  # whose own parser loads torch
        read_command(words, rank=rank, environ=environ)


def _assignments(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take variables, `env` and the like off the front."""
    rest, given = list(words), dict[str, str]()
    while rest:
        if rest[0] == "--":
            del rest[0]
        elif _ASSIGNMENT.fullmatch(rest[0]) and not os.path.exists(rest[0]):
            name, _, value = rest.pop(0).partition("=")
            given[name] = value
        elif rest[0] in _PASSING and not os.path.exists(rest[0]):
            del rest[0]
        else:
            break
    return rest, given


def _processes(environ: Mapping[str, str]) -> int:
    size = environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def launcher_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return a launcher's name and its words, or an empty name."""
    name, rest = os.path.basename(words[0]), list(words[1:])
    if _PYTHON.fullmatch(name) or words[0] == "-m":
        module, rest = _module_of(words if words[0] == "-m" else rest)
        return (_MODULES[module], rest) if module in _MODULES else ("", [])
    if name == "accelerate" and rest[:1] == ["launch"]:
        return "accelerate-launch", rest[1:]
    if name in ("fabric", "lightning"):
        return (name, rest[1:]) if rest[:1] == ["run"] else ("", [])
    return (name, rest) if name in _LAUNCHERS and not os.path.isfile(words[0] + ".py") else ("", [])


def _module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    _, kind, rest = _interpreter_options(words)
    return (rest[0], rest[1:]) if kind == "m" and rest else ("", [])


def _interpreter_options(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split the words of Python into its options, "m", "c" or "", and what follows."""
    rest, options = list(words), list[str]()
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        for place, letter in enumerate(word[1:], start=1):
            if letter in "mc":
                inside = word[place + 1 :]
                return options, letter, [inside, *rest] if inside else rest
            if letter in _WITH_VALUE:
                rest = rest if word[place + 1 :] else rest[1:]
                break
        options.append(word)
    return options, "", rest


def _python(words: Sequence[str], interpreter: str, rank: int, environ: Mapping[str, str]) -> Program:
    _, kind, rest = _interpreter_options(words)
    if not rest or rest[0] == "-":
        raise ConfigError(say("vgpu.command.no_script", launcher=interpreter, example=f"{interpreter} train.py"))
    notes = () if interpreter == "-m" or _is_this_python(interpreter) else (_other_python(interpreter),)
    if kind == "c":
        return Program(kind="code", target=rest[0], arguments=tuple(rest[1:]), notes=notes)
    if kind == "m":
        return Program(kind="module", target=rest[0], arguments=tuple(rest[1:]), notes=notes)
    found = _file(rest)
    if found is None or found.kind != "script":
        raise ConfigError(say("vgpu.script.no_file", script=rest[0]))
    return msgspec.structs.replace(found, notes=notes)


def _is_this_python(word: str) -> bool:
    found = shutil.which(word)
    return found is None or os.path.realpath(found) == os.path.realpath(sys.executable) or os.sep not in word


def _other_python(word: str) -> str:
    return say("vgpu.command.other_python", given=word, used=sys.executable)


def _file(words: Sequence[str]) -> Program | None:
    """Return the program of a file in the way that its name or first line asks for; None if it is no file."""
    path, arguments = Path(words[0]), tuple(words[1:])
    if not path.is_file():
        if path.suffix in (".py", ".ipynb", ".sh") or os.sep in words[0]:
            raise ConfigError(say("vgpu.script.no_file", script=words[0]))
        return None
    if path.suffix == ".ipynb":
        return Program(kind="notebook", target=words[0], arguments=arguments)
    shell = _shell_of(path)
    if shell:
        return Program(kind="other", target=shell, arguments=tuple(words))
    return Program(kind="script", target=words[0], arguments=arguments)


def _shell_of(path: Path) -> str:
    with path.open("rb") as file:
        first = _SHEBANG.match(file.readline(200))
    name = os.path.basename(first[1].decode(errors="replace")) if first else ""
    if path.suffix == ".sh" or _SHELL.fullmatch(name):
        return name if _SHELL.fullmatch(name) else "bash"
    return ""


def _installed(words: Sequence[str]) -> Program:
    """Return a console script as its entry point, or any other command as it is."""
    name, arguments = os.path.basename(words[0]), tuple(words[1:])
    for point in entry_points(group="console_scripts", name=name):
        return Program(kind="entry_point", target=f"{name}={point.value}", arguments=arguments)
    if name.startswith("-") or shutil.which(words[0]) is None:
        known = ", ".join(("torchrun", "accelerate launch", "deepspeed", "fabric run"))
        raise ConfigError(say("vgpu.command.unknown", word=words[0], launchers=known))
    return Program(kind="other", target=words[0], arguments=arguments)
