"""The user's own options in a report, with the values that take less memory: words of a fix for any program."""

import functools
import re
from collections.abc import Iterator

from tightfit.tables import read_table

_LEAST = {
    "shorter_length": 64,
    "smaller_picture": 128,
    "smaller_inputs": 4,
    "less_at_once": 2,
    "coarser_points": 256,
    "fewer_pixels": 2,
    "fewer_environments": 2,
    "smaller_cache": 256,
}
"""Values from which on a number is halved."""
_WITH = {"smaller_inputs": ("shorter_length", "smaller_picture")}
"""Remedies that stand for others, whose options count, too."""
_MOST = 2
"""Options of one remedy that are shown: height and width, or a length and a number of frames."""
_OFF = {"False": "True", "false": "true", "off": "on", "no": "yes", "0": "1"}
"""Values of a switch that is off, and how the same program writes that it is on."""
SMALLER = "  # a smaller value"
"""Mark of an option whose value the log does not show."""
_TABLE = "own_options.toml"
_FRAMES = 4
"""Frames that video models compress into one, beside the first: 81 becomes 41."""


@functools.cache
def _names() -> dict[str, dict[str, list[str]]]:
    return read_table("tightfit.diagnosis", _TABLE, dict[str, dict[str, list[str]]])


def lowered_by(name: str) -> str | None:
    """Return the remedy that lowers an option's number; None for another name.

    >>> lowered_by("points_per_batch"), lowered_by("learning_rate")
    ('less_at_once', None)
    """
    return next((code for code, names in _names()["half"].items() if name in names), None)


_VALUE = r"[\[(]?\d{2,5}(?:(?: ?[x*×,] ?| )\d{2,5}){1,2}[\])]?|[\w.]{1,12}"
"""A value: the sides of a picture in one of the usual forms, or a number or a word."""


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    each = "|".join(dict.fromkeys((re.escape(name).replace("_", "[_-]"), re.escape(name.upper()))))
    return re.compile(rf"(?<![\w.\"'-])((?:--?)?(?:[A-Za-z]\w*\.)*)({each})( ?[:=] ?|(?<=\w) )({_VALUE})(?![\w.%-])")


@functools.cache
def _signature(name: str) -> re.Pattern[str]:
    """Return the pattern of a parameter in the head of a function, as notebooks print it in a traceback."""
    return re.compile(rf"(?m)^.{{0,200}}\bin \w+\([^)\n]{{0,400}}\b{name}\b(?!=True)[^)\n]{{0,400}}\)")


@functools.lru_cache(maxsize=64)  # asked for each remedy several times
def options_of(code: str, text: str) -> tuple[str, ...]:
    """Return the options that the text prints and a remedy changes, with their new values.

    >>> options_of("shorter_length", "python train.py --max_len 2048 --lr 1e-4")
    ('--max_len 1024',)
    >>> options_of("checkpointing_general", "gradient_checkpointing: false")
    ('gradient_checkpointing: true',)
    """
    found: dict[str, str] = {}
    text = _ARGUMENTS.sub(lambda match: match[0].replace("'", "").replace('"', ""), text)
    for each in (code, *_WITH.get(code, ())):
        for name, line in _of(each, text):
            found.setdefault(name, line)
    if len(found.keys() & _SIDES_OF_ONE) == 1:  # of a network, mostly
        found = {name: line for name, line in found.items() if name not in _SIDES_OF_ONE}
    if not found:
        found = dict(_alike(code, text))
    return tuple(found.values())[:_MOST] or attributes_of(code, text)


_SIDES_OF_ONE = frozenset({"height", "width"})
"""Names of a picture's sides, which mean something else where one stands without the other."""
_OF_LIBRARY = re.compile(r'File "[^"\n]*(?:site|dist)-packages[^"\n]*", line \d+[^\n]*\n[^\n]*')
_HOLDER = r"(?<![\w.])(?:self\.)?(?:args?|opts?|cfg|conf|hparams|hps|FLAGS|flags|settings)\.(?:\w+\.)*"
"""The object in which programs keep their options."""
_OF_BUFFER = "(?:replay|buffer|memory|rollout)_?(?:\\w{1,12}_)?(?:size|capacity|length)"


@functools.cache
def _attribute(code: str) -> re.Pattern[str] | None:
    codes = (code, *_WITH.get(code, ()))
    known = [re.escape(name) for each in codes for name in _names()["half"].get(each, ())]
    known += [name for each in codes if each in _OF_INPUTS for name in _names()["like"].get(each, ())]
    names = {"smaller_buffer": [_OF_BUFFER], "split_general": _BATCHES}.get(code, known)
    return re.compile(rf"{_HOLDER}(?:{'|'.join(names)})\b(?! ?=[^=])") if names else None


_OF_INPUTS = ("smaller_picture", "smaller_inputs", "shorter_length", "coarser_points")
"""Remedies whose options programs name after one habit."""
_BATCHES = ["batch_size", "train_batch_size", "per_device_train_batch_size", "micro_batch_size", "batchsize", "bs"]


def attributes_of(code: str, text: str) -> tuple[str, ...]:
    """Return the options that a line of the user's own code reads, and a remedy changes, without their values.

    >>> attributes_of("smaller_buffer", "    mem = ReplayMemory(args.replay_size, args)")
    ('args.replay_size  # a smaller value',)
    >>> attributes_of("smaller_picture", "    model(input_size=(3, opt.crop_height, opt.crop_width))")
    ('opt.crop_height  # a smaller value', 'opt.crop_width  # a smaller value')
    """
    pattern = _attribute(code)
    found = pattern.finditer(_OF_LIBRARY.sub("", text)) if pattern else ()
    return tuple(dict.fromkeys(f"{each[0]}{SMALLER}" for each in found))[:_MOST]


_FOLDER = re.compile(
    r'File "(?:(?P<posix>/(?:[\w.~+-]+/)+)|(?P<windows>[A-Za-z]:\\(?:[\w.+-]+\\)+))[\w.+-]+\.py", line \d'
)
"""The folder of a program in a traceback, of characters that no shell takes for anything else."""
SEARCHES = ("grep ", "findstr ")
"""Beginnings of a command that looks for options: it is none itself."""
_INSTALLED = re.compile(
    r"[\\/](?:site-packages|dist-packages|torch[\\/](?:nn|optim|utils|_\w+)|transformers|accelerate|deepspeed|diffusers|peft|[Ll]ib[\\/]python[\d.]{1,6}|envs|bin|ipykernel_\d+|\w*compiled_cache|torchinductor_\w+)[\\/]"
)


def search_of(text: str) -> tuple[str, ...]:
    """Return a command that lists a program's own options for what one pass holds, if a traceback shows its folder.

    >>> search_of('  File "/home/u/tracks/demo.py", line 178, in main')
    ('grep -rnE "batch_?size|chunk|tile|max_" --include=*.py --include=*.yaml /home/u/tracks/',)
    """
    folders = (match for match in _FOLDER.finditer(text) if not _INSTALLED.search(match[0]))
    first = next(folders, None)  # the outermost file: the program's own folder
    if first is None:
        return ()
    if first["windows"]:
        return (f'findstr /s /n /i "batch_size chunk tile max_" {first["windows"]}*.py',)
    return (f'grep -rnE "batch_?size|chunk|tile|max_" --include=*.py --include=*.yaml {first["posix"]}',)


def is_installed(file: str) -> bool:
    """Return True for the file of an installed package, or of Python itself."""
    return bool(_INSTALLED.search(file))


_ARGUMENTS = re.compile(
    r"(?im)^.{0,60}?\b(?:arguments|args|namespace|options|opts?|hparams|hyperparameters|settings|parsed)\b[^\n{]{0,20}\{[^\n]*"
    r"|^ ?\{(?=[^\n]*[\"'](?:lr|learning_rate|n?_?epochs|num_epochs|batch_size|bs|seed)[\"'] ?:)[^\n]*"
)
"""A line that prints the options of a run as a dictionary: its quotation marks are not a model's configuration."""


@functools.cache
def _like(code: str) -> re.Pattern[str] | None:
    """Return the pattern of options with a usual name, such as `max_..._length`."""
    names = _names()["like"].get(code)
    if names is None:
        return None
    each = "|".join(names).replace("_", "[_-]?")
    return re.compile(rf"(?i)(?<![\w.\"'-])((?:--?)?(?:[a-z]\w*\.)*)({each})( ?[:=] ?|(?<=\w) )(\d{{1,6}})(?![\w.%-])")


def _alike(code: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield options with a name like those that a remedy changes; the last place where one stands counts."""
    for each in (code, *_WITH.get(code, ())):
        pattern = _like(each)
        for dashes, printed, sign, value in reversed(pattern.findall(text)) if pattern else ():
            is_option = dashes.startswith("-") or sign.strip()
            is_large = int(value) >= 2 * _LEAST[each]
            changed = _changed("half", each, value) if is_option and is_large else None
            if changed is not None:
                yield printed, f"{dashes}{printed}{sign}{changed}"


def _of(code: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield names and lines of one remedy's options; the last place where one stands counts."""
    for how, codes in _names().items():
        for name in codes.get(code, ()):
            if not any(each in text for each in (name, name.replace("_", "-"), name.upper())):
                continue
            if how == "parameter":
                if _signature(name).search(text):
                    yield name, f"{name}=True"
                continue
            for dashes, printed, sign, value in reversed(_pattern(name).findall(text)):
                changed = _changed(how, code, value) if dashes.startswith("-") or sign.strip() else None
                if changed is not None:
                    yield name, f"{dashes}{printed}{sign}{changed}"
                    break


@functools.cache
def _switched_on(name: str) -> re.Pattern[str]:
    """Return the pattern of a switch that is on: --name, --name True, name: true or name=True."""
    each = re.escape(name).replace("_", "[_-]")
    alone = r"(?=\s*(?:\\|$|\s--?[A-Za-z]))"
    return re.compile(
        rf"(?m)(?<![\w.-])(?:--{each}(?:[ =](?:True|true|on|1)\b|{alone})|{each}[\"']? ?[:=] ?(?:True|true)\b)"
    )


def is_on(code: str, text: str) -> bool:
    """Return True if the text prints a switch of the remedy that is on already.

    >>> is_on("checkpointing_general", "train.py --grad_checkpoint True --lr 1e-4")
    True
    >>> is_on("checkpointing_general", "gradient_checkpointing: false")
    False
    """
    return any(_switched_on(name).search(text) for name in _names()["on"].get(code, ()))


def _changed(how: str, code: str, value: str) -> str | None:
    """Return the value that takes less memory; None for one that already does, or is no value."""
    if how == "on":
        return _OFF.get(value)
    if how == "double":
        return f"{float(value) * 2:g}" if _NUMBER.fullmatch(value) and float(value) > 0 else None
    if code in ("smaller_picture", "smaller_inputs") and value in _NAMED:
        return _NAMED[value]
    if code == "smaller_inputs" and "." in value and _NUMBER.fullmatch(value):  # seconds
        return f"{float(value) / 2:g}" if float(value) >= _LEAST[code] else None
    sides = _SIDE.findall(value) if _SIDES_ONLY.fullmatch(value) else []
    if code == "smaller_picture" and len(sides) > 1:
        return _SIDE.sub(_half_of_side, value) if min(map(int, sides)) >= 2 * _LEAST[code] else None
    if not sides:
        return None
    number = int(sides[0])
    if how == "one":
        return "1" if 1 < number <= _MOST_RESULTS else None
    if number < _LEAST[code]:
        return None
    is_of_frames = code == "smaller_inputs" and number % _FRAMES == 1
    return str((number // 2 + _FRAMES - 1) // _FRAMES * _FRAMES + 1 if is_of_frames else number // 2)


_MOST_RESULTS = 64
"""Results of one pass at most: a larger number is one of data."""
_NUMBER, _SIDE, _SIDES_ONLY = re.compile(r"\d+(?:\.\d+)?"), re.compile(r"\d+"), re.compile(r"[\d x*×,()\[\]]+")
_NAMED = {"1080p": "720p", "720p": "480p", "480p": "240p", "768px": "256px"}
"""Names of resolutions, and of the next lower one that video models have."""
_SIDES = 16
"""Pixels that a side is a multiple of, for models of video and pictures."""


def _half_of_side(side: re.Match[str]) -> str:
    return str(int(side[0]) // 2 // _SIDES * _SIDES)
