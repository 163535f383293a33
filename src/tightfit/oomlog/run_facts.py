"""Facts that a run of any program prints about itself: batch, length, model, precision, ranks, the program's name."""

import functools
import math
import re
from collections.abc import Iterator, Mapping

import msgspec

from tightfit.oomlog.dtypes import ELEMENT_BYTES
from tightfit.tables import read_table

_MOST = 10**12
_OPEN, _ESCAPES, _LETTERS = (
    re.compile(r"[(\[?|*]"),
    re.compile(r"\\\w(?:\{[\d,]+\}|\+)?|\{[\d,]+\}"),
    re.compile(r"[A-Za-z_]{2,}"),
)
"""Signs of a pattern that is not plain, its escapes, and its words."""
_OF_ONE_CARD = re.compile(r"micro|per_device|per_gpu|device_batch|local_batch", re.IGNORECASE)
"""Names of the batch of one pass on one card; `train_batch_size` may be that of a step over all cards."""
_SHAPE = re.compile(
    r"empty_strided(?:_(?:cuda|xpu|cpu)?\w{0,8})?\(\((\d[\d, ]{0,80}?),?\), \([^)\n]{0,120}\),? ?"
    r"(?:device=[^,\n]{1,20}, )?(?:dtype=)?(?:torch\.(\w{4,12}))?"
    r"|torch\.(?:empty|zeros|ones|rand|randn|full)\(\(?\[?(\d{1,12}(?:, ?\d{1,12}){0,6})\]?\)?[^\n]{0,80}?"
    r"(?:dtype=torch\.(\w{4,12}))?\)"
)
_TENSOR_NAME = re.compile(
    r"clone implementation of (?:_fsdp_wrapped_module\.)?([\w.]{1,200}?)\.? Error: \w{2,4} out of memory"
    r"|tensor with name ([\w.]{1,200})(?=(?s:.){0,700}?out of memory)"
    r"|([\w.]{3,200}\.(?:weight|bias)):? CUDA out of memory"
)
_MODEL_CLASS = re.compile(r"transformers/models/(\w{2,30})/modeling_")


_IN_GROUPS = frozenset({"batch_size", "eval_batch_size", "accumulation", "length", "image"})
"""Quantities that count behind the groups of Hydra and YACS, too, data.batch_size=4: others may be a part's own."""
_OF_MODEL = ("", "config.", "model.config.")
"""What stands before the name of any quantity: nothing, or the object that holds a model's sizes."""
_SHORT_OPTION = re.compile(r"\b(?:train\w*\.py\b|\w+\.py\b[^\n]{0,80} --do_train\b)[^\n]{0,300}? (-b|-bs) (\d{1,6})\b")
"""The batch in a command that starts a training, as an option of one letter or two."""


_RAISED = re.compile(
    r"\b(?:increas|rais|chang)\w* (?:the |my )*(?:batch[ _-]?size\w*|\w*batch_size) from \d{1,5} to (\d{1,5})\b"
    r"[^\n.]{0,30}\b(?:gives?|get|fails?|error|OOM|out of memory|crash\w*)\b",
    re.IGNORECASE,
)
"""A person's words for a batch that works, and a larger one that does not."""


class PrintedShape(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor's sizes in a line of code or of a message."""

    shape: tuple[int, ...]
    dtype: str | None = None
    is_solved: bool = False
    """True if one of the sizes is printed as a symbol, and the request tells it."""

    @property
    def bytes(self) -> int:
        """Bytes of the tensor; of float32, PyTorch's usual dtype, where none is printed.

        >>> PrintedShape(shape=(2, 3), dtype="int16").bytes, PrintedShape(shape=(2, 3)).bytes
        (12, 24)
        """
        return math.prod(self.shape) * ELEMENT_BYTES.get(self.dtype or "float32", 4)


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Values that a log prints about the run, for any program; an absent value is None or empty."""

    numbers: Mapping[str, int] = msgspec.field(default_factory=dict)
    """The last number printed for each quantity in run_keys.toml: batch_size, accumulation, length, ..."""
    names: Mapping[str, str] = msgspec.field(default_factory=dict)
    """The name under which each of these was printed, with its dashes: --per_device_train_batch_size."""
    texts: Mapping[str, str] = msgspec.field(default_factory=dict)
    """model, optimizer, dtype, as printed."""
    signs: frozenset[str] = frozenset()
    """lora, qlora, data_parallel, ...: the table `signs`."""
    frameworks: tuple[str, ...] = ()
    """Programs that the log shows, the outermost first."""
    shapes: tuple[PrintedShape, ...] = ()
    """Shapes of tensors in lines of code, the last first."""
    tensor_name: str | None = None
    """A parameter that the message names."""
    family: str | None = None
    """The family of models by the library's file in the traceback: llama, qwen2, t5."""
    text: str = ""
    """The text that was read, for names of models in prose."""

    @property
    def framework(self) -> str | None:
        return self.frameworks[0] if self.frameworks else None


@functools.cache
def _tables() -> dict[str, dict[str, list[str]]]:
    return read_table("tightfit.oomlog", "run_keys.toml", dict[str, dict[str, list[str]]])


@functools.cache
def _keys(table: str) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return the pattern of all names of a table, and the quantity of each name."""
    quantity_of = {_plain(name): quantity for quantity, names in _tables()[table].items() for name in names}
    constants = {name.upper(): quantity for name, quantity in quantity_of.items() if "_" in name and table == "numbers"}
    quantity_of = constants | quantity_of
    names = "|".join(sorted((re.escape(name).replace("_", "[_-]") for name in quantity_of), key=len, reverse=True))
    value = r"(\d{1,12})(?![\w/%]|\.\w)" if table == "numbers" else r"([\w./:~@-]{2,200})"
    sign = r"[ \t]?(?:[=:]|->)[ \t]?|(?<=\w)[ \t]|(?<=[\"']),[ \t]?(?=[\"'])"  # the last, in a printed list of options
    sign += r"|[ \t]\.{4,60}[ \t]"  # in a table of arguments
    return re.compile(
        rf"(?<![\w.-])(--?)?((?:[A-Za-z]\w*\.){{0,4}})[\"']?({names})[\"']?({sign})[\"']?{value}",
        re.ASCII,
    ), quantity_of


def known_names() -> frozenset[str]:
    """Return the names under which programs print or take what decides a run's memory."""
    return frozenset(_keys("numbers")[1]) | frozenset(_keys("texts")[1])


def quantity_of(name: str) -> str | None:
    """Return the quantity that programs print as a number under a name; None for another name.

    >>> quantity_of("per_device_train_batch_size"), quantity_of("colour")
    ('batch_size', None)
    """
    return _keys("numbers")[1].get(_plain(name))


def _plain(name: str) -> str:
    return name.replace("-", "_")


@functools.cache
def _pattern(table: str, name: str) -> re.Pattern[str]:
    """Compile the signs of one name when a text first has its plain words.

    A word ends where Chinese or Japanese begins: \\b is that of ASCII.
    """
    return re.compile("|".join(_tables()[table][name]), re.ASCII)


def _found(table: str, text: str) -> Iterator[str]:
    """Yield the names of a table that the text shows; a search for plain words comes first, being many times faster."""
    for name, words in _plain_words(table).items():
        if (not words or any(word in text for word in words)) and _pattern(table, name).search(text):
            yield name


@functools.cache
def _plain_words(table: str) -> dict[str, tuple[str, ...]]:
    """Return for each name words of which a text must have one; none where a pattern is not plain enough."""
    found = {}
    for name, signs in _tables()[table].items():
        words = [_LETTERS.findall(_ESCAPES.sub(" ", sign)) if not _OPEN.search(sign) else [] for sign in signs]
        found[name] = tuple(max(each, key=len) for each in words) if all(words) else ()
    return found


_UNWANTED = re.compile(
    r"\bwithout (?:having to )?(?:reduc|lower|decreas|chang|set|us)\w{1,4} (?:(?:the|my) )?batch[^\n.?]{0,30}",
    re.IGNORECASE,
)
"""Words for what a person did not do, or does not want to."""
_TYPED = re.compile(r"\b([a-z]\w{2,60}): ?(?:str|bool|int|float)(?: \| None)? = (?=[\"'\dTF])")
"""A parameter of a Python function with its type, before its default."""


_QUOTED_VALUE = re.compile(r"(?<!\S)(--[\w.-]{2,60}[= ])([\"'])([\w./:+-]{1,80})\2(?!\S)")
"""An option of a command, and its value in quotes."""


def run_facts_in(text: str) -> RunFacts:
    """Read clean text: the beginning of a log, and its end."""
    text = _UNWANTED.sub("", _TYPED.sub(r"\1=", _QUESTION.sub("", text)))
    text = _QUOTED_VALUE.sub(r"\1\3", text)
    numbers, names = _numbers_in(text)
    texts = _texts_in(text)
    signs = frozenset(_found("signs", text))
    numbers |= {"world_size": 1} if "single_card" in signs and "world_size" not in numbers else {}
    named = _TENSOR_NAME.search(text)
    paths = text.replace("\\", "/") if "\\" in text else text
    family = _MODEL_CLASS.findall(paths)
    return RunFacts(
        numbers=numbers,
        names=names,
        texts=texts,
        signs=signs,
        frameworks=_frameworks(paths),
        shapes=tuple(_shapes(text)),
        tensor_name=(named[1] or named[2] or named[3]).rstrip(".") if named else None,
        family=family[-1] if family else None,
        text=text,
    )


def _numbers_in(text: str) -> tuple[dict[str, int], dict[str, str]]:
    """Return the quantities that a text prints, and the names that their options have there."""
    numbers = dict(_sentences(text))
    names: dict[str, str] = {}
    for match in _keys("numbers")[0].finditer(text):
        dashes, group, name, sign, value = match.groups("")
        if not (dashes or sign.strip() or "_" in name):  # `batch 12` counts batches
            continue
        quantity = _keys("numbers")[1][_plain(name)]
        if group not in _OF_MODEL and quantity not in _IN_GROUPS:
            continue
        known = names.get(quantity, "")
        if quantity == "batch_size" and _OF_ONE_CARD.search(known) and not _OF_ONE_CARD.search(name):
            continue
        if quantity == "batch_size" and (_is_of_other_run(text, match) or _is_in_evaluation(text, match)):
            continue
        if 0 < int(value) < _MOST:
            numbers[quantity] = int(value)
            names[quantity] = dashes + group + name
    numbers |= _raised(text)
    if "batch_size" not in numbers and (short := _SHORT_OPTION.search(text)):
        numbers["batch_size"], names["batch_size"] = int(short[2]), short[1]
    if "accumulation" not in numbers and (printed := _TOKENS.search(text)):
        passes = _passes(int(printed[1].replace(",", "")), numbers)
        numbers |= {"accumulation": passes} if passes else {}
    return numbers, names


_TOKENS = re.compile(r"tokens per iteration will be: ?(\d[\d,]{0,19})")
"""nanoGPT's line on the tokens of a step, on all cards."""


def _passes(tokens: int, numbers: Mapping[str, int]) -> int | None:
    """Return the passes of a step with these tokens; None where the printed batch and length do not divide it.

    >>> _passes(491_520, {"batch_size": 16, "length": 1024})
    30
    """
    of_pass = numbers.get("batch_size", 0) * numbers.get("length", 0)
    return tokens // of_pass if of_pass and tokens % of_pass == 0 else None


_QUESTION = re.compile(
    r"(?m)^ ?\d{1,2}\. (?:Which|What|Did|Do|Is|Are)\b[^?\n]{1,120}\?"
    r"(?: ?(?:`\w+`, ?`\w+` etc\.?|`pip install [^`\n]{1,60}`))?"
)
"""A numbered question of an issue's form, and the examples in it: the words are not the reporter's."""


def _raised(text: str) -> dict[str, int]:
    """Return the batch that failed where a person tells of a smaller one that works.

    >>> _raised("If I increase the batch_size_train from 16 to 32 it gives me an error")
    {'batch_size': 32}
    """
    match = _RAISED.search(text)
    return {} if match is None else {"batch_size": int(match[1])}


_ENVIRONMENT = re.compile(
    r"\b(?:envs|virtualenvs)/[\w.-]{1,80}/|\b(?!kohya_ss/|ComfyUI/|OneTrainer/)[\w.-]{1,80}/\.?venv/"
    r"|(?m:^ ?\([\w.-]{1,40}\) (?=\S*[@:$#>~]|[A-Z]:/))"
)
"""The folder or the prompt of an environment, whose name may be that of another program."""
_ADDRESS = re.compile(r"(?<!clone )(?<!git\+)\bhttps?://(?![^\s)]{1,200}/blob/[^\s)]{1,200}\.py#L\d)[^\s)\]>\"']+")
"""An address in a report; that of a command which fetches the program counts, and that of one of its lines."""
_OWN_FILE = re.compile(
    r'File \\?"(?:/|[A-Z]:/)(?![^"\n]*(?:/site-packages/|/dist-packages/|/lib/python\d))[^"\n]+", line \d'
)
"""The full path of a file that is no library's, in a traceback."""
_PROSE = re.compile(
    r"(?m)^(?![ \t]*File )(?![^\n]* --\w)[^\n/_=|\[\](){}<>$#`\\]*"
    r"(?:[A-Za-z0-9,.'-]+ +){4}[^\n/_=|\[\](){}<>$#`\\]*$"
)
"""A line of words alone."""


def _frameworks(paths: str) -> tuple[str, ...]:
    """Return the programs that a text shows by files, functions, commands or its own words.

    An address shows none, and the name of an environment only where nothing else does. Where a traceback has the full
    path of the user's own files, a person's sentences do not either: they may be about another program.
    """
    linked, paths = paths, _ADDRESS.sub("", paths)
    shown = _ENVIRONMENT.sub("envs/", paths)
    if _OWN_FILE.search(shown):
        found = tuple(_found("frameworks", _PROSE.sub("", shown)))
    else:
        found = tuple(_found("frameworks", shown)) or tuple(_found("frameworks", paths)) or _linked(linked)
    found = tuple(dict.fromkeys((*_found("hosts", shown), *found)))
    return tuple(each for each in found if each not in _tables()["models_of"].get(found[0], ()))


_LINKED = re.compile(r"\bgithub\.com/([^\s/]{1,60}/[^\s/]{1,60})/(?:blob|tree)/\S{1,200}")
"""An address of a file or a folder of a program, which a report links to as what it runs."""


def _linked(text: str) -> tuple[str, ...]:
    """Return the programs whose own files a report links to, where nothing else shows one."""
    return tuple(_found("frameworks", "\n".join(_LINKED.findall(text))))


def _texts_in(text: str) -> dict[str, str]:
    """Return the model, optimizer and dtype that a text prints; nothing about the groups of a part."""
    texts: dict[str, str] = {}
    for dashes, group, name, _, value in _keys("texts")[0].findall(text):
        if group:
            continue
        quantity = _keys("texts")[1][_plain(name)]
        if name != "model" or dashes or "/" in value or any(each.isdigit() for each in value):
            texts.setdefault(quantity, value)
    return texts


_OTHER_RUN = re.compile(
    r"\b(?:work(?:s|ed|ing)?|runs?|ran|fine(?![- ]?tun)|fits?|succeed(?:s|ed)|okay|trained|able to|max(?:imum)?"
    r"|successfully(?! (?:set|chang|reduc|lower)\w*))\b"
    r"[^\n.!?]{0,25}$"
)
"""Words right before a batch that another run had: one that went well, or somebody else's."""


_WENT_WELL = re.compile(
    r"[`'\")]{0,3}[ ,]{0,2}(?:for running|to (?:be able to |make (?:it|this) )?(?:run|work|fit))\b"
    r"|[`'\")]{0,3}[ ,]{0,2}(?:\w+ ){0,2}?(?:works?|worked|runs?|fits?|succeed|(?:is|was|are) (?:fine|ok))\b"
    r"|[^\n.]{0,40}?\bwithout (?:\w+ ){0,3}(?:errors?|problems?|issues?|OOM)\b"
)
"""Words right behind such a batch."""


_NO_OPTION = re.compile(
    r"[`'\")]{0,3} (?:(?:is|was|are)(?:n'?t| not)|does(?:n'?t| not)) "
    r"(?:an? (?:\w+ )?(?:option|argument|parameter|flag)|exist|available|supported|recogni[sz]ed|accepted|work)\b"
)
"""Words right behind an option that the program does not have."""


def _is_of_other_run(text: str, match: re.Match[str]) -> bool:
    """Return True if the words around a batch say that it is not the one that failed."""
    before = _OTHER_RUN.search(text, max(match.start() - 40, 0), match.start())
    return bool(before or _WENT_WELL.match(text, match.end()) or _NO_OPTION.match(text, match.end()))


_SECTION = re.compile(r"[\"']?([A-Za-z_]\w{0,40})[\"']?\s{0,3}[:=]\s{0,3}(?:dict\(|\{)?\s*$")
"""The head of a part of a configuration: `Eval:` in YAML, `val_dataloader = dict(` in Python."""
_OF_EVALUATION = re.compile(
    r"(?:eval|val|valid|validation|evaluation|test|infer|inference|predict)(?:_?[Dd]ata\w*|_?loader)?", re.I
)
_PART = 80
"""Lines above a value in which the head of its part stands."""


def _is_in_evaluation(text: str, match: re.Match[str]) -> bool:
    """Return True if a value stands in the part of a printed configuration that is about evaluation."""
    start = text.rfind("\n", 0, match.start()) + 1
    column = match.start() - start
    for line in reversed(text[max(start - 8000, 0) : start].splitlines()[-_PART:]):
        if not column:
            return False
        head = _SECTION.search(line)
        if head and head.start() < column:
            column = head.start()
            if _OF_EVALUATION.fullmatch(head[1]):
                return True
    return False


def _sentences(text: str) -> Iterator[tuple[str, int]]:
    for quantity in _tables()["sentences"]:
        for match in _pattern("sentences", quantity).finditer(text):
            printed = next(filter(None, match.groups())).replace(",", "")
            value = int(printed) if printed.isdecimal() else int(printed.isalpha())  # `one`, `single`
            if quantity == "batch_size" and _is_of_other_run(text, match):
                continue
            if 0 < value < _MOST:
                yield quantity, value


_MADE = re.compile(
    r"torch\.(?:empty|zeros|ones|rand|randn|full)\(\(?\[?((?:\w{1,30}, ?){0,6}\w{1,30})\]?\)?(?=[,)])([^\n]{0,120})"
)
_ASSIGNED = re.compile(r"(?m)^[^\w\n]{0,12}(?:\d{1,4}[ \t]{1,8})?(\w{1,30}) ?= ?(\d{1,9})\s*(?:#[^\n]*)?$")


def made_in(line: str, text: str) -> PrintedShape | None:
    """Return the tensor that a line of code makes, its sizes as numbers or as names that the text gives a number.

    >>> made_in("x = torch.zeros(n, n, dtype=torch.float64)", "n = 40000").shape
    (40000, 40000)
    """
    found = _MADE.search(line)
    if found is None:
        return None
    known = dict(_ASSIGNED.findall(text))
    sizes = [known.get(each, each) for each in found[1].replace(" ", "").split(",")]
    if not all(each.isdigit() for each in sizes):
        return None
    dtype = re.search(r"dtype ?= ?torch\.(\w{4,12})", found[2])
    return PrintedShape(shape=tuple(map(int, sizes)), dtype=dtype[1] if dtype else None)


def _shapes(text: str) -> Iterator[PrintedShape]:
    for match in reversed(list(_SHAPE.finditer(text))[-50:]):
        sizes = tuple(int(each) for each in (match[1] or match[3]).split(",") if each.strip())
        yield PrintedShape(shape=sizes, dtype=match[2] or match[4])
