"""Keeps `torch._dynamo` from being loaded before something compiles: that takes longer than a dry run's steps.

Fake tensors and optimizers import it for a handful of names. A stand-in answers those as Dynamo does while it compiles
nothing; any other name loads the real package in the stand-in's place.
"""

import functools
import importlib.util
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

_DYNAMO, _SOURCE, _CONFIG = "torch._dynamo", "torch._dynamo.source", "torch._dynamo.config"
_lock = threading.RLock()


def keep_dynamo_out() -> None:
    """Put the stand-in where the import system finds it, unless Dynamo is there already."""
    if _DYNAMO in sys.modules:
        return
    spec: Any = importlib.util.find_spec(_DYNAMO)
    package, source = _StandIn(_DYNAMO, spec), _StandIn(_SOURCE, spec)
    source.__dict__.update(ConstantSource=_ConstantSource, RandomValueSource=_RandomValueSource)
    config_spec: Any = importlib.util.spec_from_file_location(_CONFIG, spec.origin.replace("__init__.py", "config.py"))
    config = importlib.util.module_from_spec(config_spec)
    sys.modules.update({_DYNAMO: package, _SOURCE: source, _CONFIG: config})
    config_spec.loader.exec_module(config)
    package.__dict__.update(config=config, source=source, disable=_disable, graph_break=lambda *args, **kwargs: None)
    library: Any = torch
    library._dynamo = package


class _StandIn(types.ModuleType):
    """A module that is replaced by the real one when it is asked for what it lacks."""

    def __init__(self, name: str, package: Any) -> None:
        super().__init__(name)
        self.__dict__.update(_package=package, __file__=package.origin)

    def __getattr__(self, name: str) -> Any:
        # Before a submodule is imported, its package is asked for its path.
        if name.startswith("__") and not (name == "__path__" and self.__name__ == _DYNAMO):
            raise AttributeError(name)
        _load(self.__dict__["_package"])
        return getattr(sys.modules[self.__name__], name)


def _load(spec: Any) -> None:
    """Load the real package into the object that others may hold already."""
    with _lock:
        if not isinstance(sys.modules[_DYNAMO], _StandIn):
            return
        package: Any = sys.modules[_DYNAMO]
        del sys.modules[_SOURCE]
        for name in ("source", "disable", "graph_break", "_package"):
            del package.__dict__[name]
        package.__class__ = types.ModuleType
        package.__spec__, package.__loader__, package.__package__ = spec, spec.loader, _DYNAMO
        package.__path__ = list(spec.submodule_search_locations)
        spec.loader.exec_module(package)


def _disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
    """`torch._dynamo.disable`: nothing while nothing compiles, the real one from then on."""
    if fn is None:
        return functools.partial(_disable, recursive=recursive, **options)
    real: list[Callable[..., Any]] = []

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not real:
            dynamo: Any = sys.modules[_DYNAMO]
            if isinstance(dynamo, _StandIn):
                return fn(*args, **kwargs)
            real.append(dynamo.disable(fn, recursive, **options))
        return real[0](*args, **kwargs)

    return call


class _ConstantSource:
    """Source of a constant, which only a traced graph would name."""

    def __init__(self, source_name: str) -> None:
        self.source_name = source_name


class _RandomValueSource:
    """Source that a fake tensor compares its own with."""
