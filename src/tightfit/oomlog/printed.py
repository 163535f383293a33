"""Lines that a run prints about itself: nanoGPT's configuration, the versions of torch and the driver, the GPU."""

import re
from collections.abc import Mapping

import msgspec

from tightfit.config.reader import literal
from tightfit.config.schema import TrainConfig, defaults

Value = str | int | float | bool
"""A value of one of nanoGPT's keys."""
READ = 2**18
"""Characters, from the start of a log, that are looked through: programs print their configuration first."""


class Printed(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration and the versions; a value that is absent is None or empty."""

    keys: Mapping[str, Value] = msgspec.field(default_factory=dict)
    """nanoGPT's keys that the log shows, in the order of their last value: files, then the command line."""
    command: str | None = None
    """The command line, as pasted."""
    tokens_per_iteration: int | None = None
    """Tokens of one optimizer step, as nanoGPT prints them."""
    parameters: str | None = None
    """The number of parameters, as printed: 123.59M."""
    vocab_size: int | None = None
    """The vocabulary that nanoGPT prints."""
    torch_version: str | None = None
    """PyTorch's version, with its suffix."""
    cuda_version: str | None = None
    """The first one printed: torch's build, or the driver's."""
    driver_version: str | None = None
    """The driver's version, as nvidia-smi prints it."""
    gpu_name: str | None = None
    """The first GPU that the text names."""
    dataset: str | None = None
    """nanoGPT's key `dataset`."""
    last_iteration: int | None = None
    """The last iteration in the lines read; None before the first."""
    hints: tuple[str, ...] = ()
    """Codes of known lines that are no failures: few_sms, grad_scaler_deprecated, flash_attention_missing."""


_KEYS = defaults(TrainConfig)
_ASSIGNED = re.compile(r"^(?:Overriding: )?([a-z_]{3,40}) ?= ?([^#\n]{1,200}?) *(?:#.*)?$", re.MULTILINE)
_OPTION = re.compile(r"--([a-z][a-z_-]{2,40})(?:=| (?!-))(\"[^\"\n]{0,200}\"|'[^'\n]{0,200}'|[^\s\"']{1,200})")
_COMMAND = re.compile(
    r"^[^\n]{0,200}?\b((?:python[\d.]{0,5}|torchrun|accelerate launch|deepspeed) [^\n]{0,200}?\.py\b[^\n]{0,1500})$",
    re.MULTILINE,
)
_PRODUCT = re.compile(r"\d{1,12}(?: ?\* ?\d{1,12}){0,6}")
_TOKENS = re.compile(r"tokens per iteration will be: ?([\d,]{1,20})")
_PARAMETERS = re.compile(r"number of parameters: ?([\d.]{1,12} ?[KMB]?)")
_VOCABULARY = re.compile(r"(?:found vocab_size = (\d{1,8})|vocab_size of GPT-2 to (\d{1,8}))")
_TORCH = re.compile(
    r"(?:(?:Py)?[Tt]orch(?: [Vv]ersion)?(?:__version__)?|torch\.__version__|torch)[ :='\"=]{1,6}v?"
    r"([012]\.\d{1,2}(?:\.\d{1,2})?(?:(?:a|b|rc|\.dev|\.post)\d{0,10})?(?:\+[\w.]{1,20})?)"
)
_CUDA = re.compile(
    r"CUDA (?:UMD |KMD )?[Vv]ersion ?: ?(\d{1,2}\.\d{1,2})|CUDA used to build PyTorch: (\d{1,2}\.\d{1,2})"
    r"|\+cu(\d{2,3})\b"
)
_DRIVER = re.compile(r"[Dd]river [Vv]ersion ?: ?(\d{3}\.\d{1,3}(?:\.\d{1,3})?)")
_GPU = re.compile(
    r"\b((?:NVIDIA |AMD )?(?:GeForce (?:RTX|GTX) ?\w{3,6}(?: ?(?:Ti|SUPER|Super|D))*(?: Laptop GPU)?|(?:RTX"
    r"|GTX) ?\d{4}(?: ?(?:Ti|SUPER))?"
    r"|RTX (?:A\d{4}|\d{4} Ada Generation|PRO \d{4}[\w ]{0,30})|TITAN \w{1,4}|Tesla [A-Z]\w{1,4}[\w-]{0,20}"
    r"|Quadro [\w ]{2,12}|Radeon [\w ]{2,20}"
    r"|Instinct MI\w{2,6})|NVIDIA (?:[ABHLT]\d{1,4}\w{0,3}|GH200|GB200|GB10)(?:[ -][\w-]{2,20}){0,3}"
    r"|Tesla [A-Z]\d{1,3})\b"
)
_ITERATION = re.compile(r"\biter (\d{1,9}): loss")
_HINTS = (
    ("few_sms", "Not enough SMs to use max_autotune_gemm"),
    ("grad_scaler_deprecated", "torch.cuda.amp.GradScaler"),
    ("flash_attention_missing", "using slow attention. Flash Attention requires"),
)


def printed_in(text: str) -> Printed:
    """Read clean text, the beginning of a log."""
    keys, command = _configuration(text)
    vocabulary = _VOCABULARY.search(text)
    tokens = _TOKENS.search(text)
    versions = _CUDA.search(text)
    build = versions and (versions[1] or versions[2])
    if versions and versions[3]:
        build = f"{versions[3][:-1]}.{versions[3][-1]}"
    iterations = _ITERATION.findall(text)
    dataset = keys.get("dataset")
    return Printed(
        keys=keys,
        command=command,
        tokens_per_iteration=int(tokens[1].replace(",", "") or 0) or None if tokens else None,
        parameters=_first(_PARAMETERS, text),
        vocab_size=int(vocabulary[1] or vocabulary[2]) if vocabulary else None,
        torch_version=_first(_TORCH, text),
        cuda_version=build or None,
        driver_version=_first(_DRIVER, text),
        gpu_name=_first(_GPU, text),
        dataset=dataset if isinstance(dataset, str) else None,
        last_iteration=int(iterations[-1]) if iterations else None,
        hints=tuple(code for code, words in _HINTS if words in text),
    )


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match[1].strip() if match else None


def _configuration(text: str) -> tuple[dict[str, Value], str | None]:
    """Return nanoGPT's keys and the command line.

    nanoGPT prints each file after `Overriding config with`, and each option as `Overriding: key = value`.
    """
    found: dict[str, Value] = {}
    commands = _COMMAND.findall(text)
    command = commands[-1].strip() if commands else None
    if command:
        for key, value in _OPTION.findall(command):
            _keep(found, key.replace("-", "_"), value)
    begin = text.find("Overriding")
    # Without nanoGPT's own lines an assignment may be anything, so only a plain list of several keys counts.
    assigned = _ASSIGNED.findall(text[max(begin, 0) : max(begin, 0) + READ])
    known = [(key, value) for key, value in assigned if key in _KEYS]
    if begin >= 0 or len(known) >= 3:
        for key, value in known:
            _keep(found, key, value)
    return found, command


def _keep(found: dict[str, Value], key: str, text: str) -> None:
    if key not in _KEYS:
        return
    value = _value(text.strip())
    usual = _KEYS[key]
    if key == "compile" or isinstance(usual, bool):
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, str) if isinstance(usual, str) else isinstance(value, int | float)
    if fits:
        found.pop(key, None)
        found[key] = value


def _value(text: str) -> Value:
    if _PRODUCT.fullmatch(text) and "*" in text:
        result = 1
        for part in text.split("*"):
            result *= int(part)
        return result
    value = literal(text)
    return value if isinstance(value, str | int | float | bool) else text
