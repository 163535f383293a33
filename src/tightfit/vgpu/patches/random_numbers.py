"""Python's and NumPy's functions that draw one number at a time give the ends of their ranges, too."""

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from tightfit.vgpu.assign import assign
from tightfit.vgpu.chance import RARE, Draws, Ends, drawing_frame, fraction, uniform
from tightfit.vgpu.on_import import after_import

_DEVIATIONS = 3.7
"""Standard deviations beyond which one draw in 10,000 lies."""
Function = Callable[..., Any]
EndsByName = Mapping[str, Callable[..., Ends | None]]


def install(draws: Draws) -> None:
    """Let `draws` follow the script's random numbers from now on."""
    _watch_module(draws, random, _ENDS)
    assign(random.Random, **_methods(draws, random.Random, _ENDS))
    after_import("numpy.random", functools.partial(_watch_numpy, draws))


def _watch_numpy(draws: Draws, module: ModuleType) -> None:
    _watch_module(draws, module, _ENDS_OF_NUMPY)
    kind = module.Generator
    generator = type("Generator", (kind,), _methods(draws, kind, {**_ENDS_OF_NUMPY, "integers": _integers}))
    usual = module.default_rng

    @functools.wraps(usual)
    def default_rng(*args: Any, **kwargs: Any) -> Any:
        rng = usual(*args, **kwargs)
        return generator(rng.bit_generator) if type(rng) is kind else rng

    assign(module, default_rng=default_rng)


def _watch_module(draws: Draws, module: ModuleType, ends: EndsByName) -> None:
    for name, of_name in ends.items():
        usual = getattr(module, name)
        made = _watched(usual, draws, of_name, 0)
        assign(made, __module__=module.__name__, __qualname__=name)  # pickle finds it so
        if hasattr(usual, "__self__"):
            assign(made, __self__=usual.__self__)  # by which libraries reach the global generator
        assign(module, **{name: made})


def _methods(draws: Draws, kind: type, ends: EndsByName) -> dict[str, Function]:
    names = [name for name in ends if hasattr(kind, name)]
    return {name: _watched(getattr(kind, name), draws, ends[name], 1) for name in names}


def _watched(function: Function, draws: Draws, ends: Callable[..., Ends | None], skipped: int) -> Function:
    """Return a function that draws as before; `skipped` of its arguments are no part of the range."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        frame = drawing_frame()
        if frame is None or getattr(value, "shape", ()) != ():
            return value
        return draws.given(frame, value, lambda: _as(type(value), ends(*args[skipped:], **kwargs)))

    assign(draw, _torchdynamo_disable=True)  # Dynamo breaks its graph here, as at the function itself
    return draw


def _as(kind: Callable[[object], object], ends: Ends | None) -> Ends | None:
    """Return numbers in the type of those that are drawn."""
    return ends if ends is None or isinstance(ends[0], (tuple, list)) else (kind(ends[0]), kind(ends[1]))


def _triangular(low: float = 0.0, high: float = 1.0, *_: object, **__: object) -> Ends:
    return low, high


def _normal(loc: float = 0.0, scale: float = 1.0, *_: object, mu: float = 0.0, sigma: float = 1.0) -> Ends:
    return loc + mu - scale * sigma * _DEVIATIONS, loc + mu + scale * sigma * _DEVIATIONS


def _exponential(rate: float = 1.0, lambd: float = 1.0) -> Ends:
    return 0.0, -math.log(RARE) / (rate * lambd)


def _closed(a: int, b: int) -> Ends:
    return a, b


def _range(start: int, stop: int | None = None, step: int = 1) -> Ends:
    found = range(start) if stop is None else range(start, stop, step)
    return min(found[0], found[-1]), max(found[0], found[-1])


def _integers(low: int, high: int | None = None, *_: object, endpoint: bool = False, **__: object) -> Ends:
    first, behind = (0, low) if high is None else (low, high)
    return first, behind - (not endpoint)


def _choice(items: Sequence[Any] | int, *_: object, **__: object) -> Ends | None:
    """Return the smallest and the largest of numbers, or of their products for pairs such as heights and widths."""
    if isinstance(items, int):
        return 0, items - 1
    if not len(items) or not all(map(_is_size, items)):
        return None
    return min(items, key=_product), max(items, key=_product)


def _is_size(item: object) -> bool:
    return all(map(_is_size, item)) if isinstance(item, (tuple, list)) else hasattr(item, "__index__")


def _product(item: Any) -> int:
    return math.prod(map(_product, item)) if isinstance(item, (tuple, list)) else int(item)


_ENDS: EndsByName = {
    "random": fraction,
    "betavariate": fraction,
    "uniform": uniform,
    "triangular": _triangular,
    "gauss": _normal,
    "normalvariate": _normal,
    "expovariate": _exponential,
    "randint": _closed,
    "randrange": _range,
    "choice": _choice,
}
_ENDS_OF_NUMPY: EndsByName = {
    "rand": fraction,
    "random": fraction,
    "random_sample": fraction,
    "beta": fraction,
    "uniform": uniform,
    "normal": _normal,
    "randint": _integers,
    "choice": _choice,
}
