"""nanoGPT's configuration, as far as a log prints it."""

from dataclasses import replace

from tightfit.config.schema import PRETRAINED, TrainConfig, from_dict
from tightfit.diagnosis.evidence import Evidence
from tightfit.errors import TightfitError
from tightfit.models.shape import parameter_count
from tightfit.oomlog.printed import Printed

_SHAPING = frozenset({"batch_size", "block_size", "n_layer", "n_head", "n_embd", "vocab_size", "init_from", "compile"})
"""Keys of which a log of nanoGPT must print at least one for its run to be played."""
_NANOGPTS_OWN = _SHAPING - {"batch_size", "vocab_size", "compile"}
"""Keys of which another log must print at least two: the rest are everybody's."""


def printed_config(printed: Printed, evidence: Evidence) -> TrainConfig | None:
    """Return nanoGPT's configuration that a log prints; None if it prints too little, or is of another program."""
    keys = dict(printed.keys)
    enough = bool(_SHAPING & set(keys)) if evidence.framework == "nanogpt" else len(_NANOGPTS_OWN & set(keys)) > 1
    if evidence.framework not in (None, "nanogpt") or not enough:
        return None
    if printed.vocab_size:
        keys.setdefault("vocab_size", printed.vocab_size)
    try:
        config = from_dict(TrainConfig, keys)[0]
    except TightfitError:
        return None
    config = config if "gradient_accumulation_steps" in keys else _with_printed_passes(config, printed)
    return config if _SIZES & set(keys) else _with_printed_size(config, printed)


_SIZES = frozenset({"n_layer", "n_head", "n_embd", "init_from"})
"""Keys that set the size of the model."""
_ROUNDED = 0.005
"""Share by which a printed number of parameters may differ: it is rounded, and biases are counted or not."""


def _with_printed_passes(config: TrainConfig, printed: Printed) -> TrainConfig:
    """Return the configuration with the accumulation that makes the printed tokens of a step."""
    passes, rest = divmod(printed.tokens_per_iteration or 0, config.batch_size * config.block_size)
    return replace(config, gradient_accumulation_steps=passes) if passes and not rest else config


def _with_printed_size(config: TrainConfig, printed: Printed) -> TrainConfig | None:
    """Return the configuration with the GPT-2 that has the printed number of parameters; None if none has it."""
    if printed.parameters is None or not config.vocab_size:
        return config
    number = _number(printed.parameters)
    sizes = (
        replace(config, n_layer=each.n_layer, n_head=each.n_head, n_embd=each.n_embd) for each in PRETRAINED.values()
    )
    counted = ((each, parameter_count(each, positions=False)) for each in sizes)
    return next((each for each, count in counted if abs(count - number) <= _ROUNDED * number), None)


_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


def _number(printed: str) -> float:
    """Return a number with its unit, as nanoGPT prints it.

    >>> _number("353.77M")
    353770000.0
    """
    return float(printed.rstrip("KMB ")) * _UNITS.get(printed[-1], 1)
