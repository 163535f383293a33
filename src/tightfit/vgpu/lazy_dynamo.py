"""Delays the import of `torch._dynamo` until something compiles: it takes longer than a small model's steps.

Fake tensors and optimizers import it for a handful of names. A stand-in answers those as Dynamo does while it compiles
nothing; any other name loads the real package in the stand-in's place.
"""

import functools
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from typing import ParamSpec, TypeVar

import torch

from tightfit.vgpu.assign import assign

P = ParamSpec("P")
R = TypeVar("R")

_DYNAMO, _SOURCE, _CONFIG = "torch._dynamo", "torch._dynamo.source", "torch._dynamo.config"
_lock = threading.RLock()


def keep_dynamo_out() -> None:
    """Put the stand-in where the import system finds it, unless Dynamo is there already."""
    if _DYNAMO in sys.modules:
        return
    spec = importlib.util.find_spec(_DYNAMO)
    assert spec is not None
    assert spec.origin is not None
    package, source = _StandIn(_DYNAMO, spec), _StandIn(_SOURCE, spec)
    source.__dict__.update(ConstantSource=_ConstantSource, RandomValueSource=_RandomValueSource)
    config_spec = importlib.util.spec_from_file_location(_CONFIG, spec.origin.replace("__init__.py", "config.py"))
    assert config_spec is not None
    config = importlib.util.module_from_spec(config_spec)
    sys.modules.update({_DYNAMO: package, _SOURCE: source, _CONFIG: config})
    _run(config_spec, config)
    package.__dict__.update(config=config, source=source, disable=_disable, graph_break=lambda *args, **kwargs: None)
    package.__dict__.update(trace_rules=types.SimpleNamespace(clear_lru_cache=lambda: None))  # for process groups
    assign(torch, _dynamo=package)


def _run(spec: ModuleSpec, module: types.ModuleType) -> None:
    assert spec.loader is not None
    spec.loader.exec_module(module)


class _StandIn(types.ModuleType):
    """A module that gives way to the real one at the first use of a name that it lacks."""

    def __init__(self, name: str, package: ModuleSpec) -> None:
        super().__init__(name)
        self.__dict__.update(_package=package, __file__=package.origin)

    def __getattr__(self, name: str) -> object:
        # Before a submodule is imported, its package is asked for its path.
        if name.startswith("__") and not (name == "__path__" and self.__name__ == _DYNAMO):
            raise AttributeError(name)
        _load(self.__dict__["_package"])
        if name == "__path__":
            sys.meta_path.insert(0, _Loaded())
        return getattr(sys.modules[self.__name__], name)


class _Loaded:
    """Finder of one submodule: the package that its import loads has imported it already, and a copy would do nothing.

    Python looks for it all the same, because the stand-in was there when the import began.
    """

    def find_spec(self, name: str, _path: object, target: object = None) -> ModuleSpec | None:
        sys.meta_path.remove(self)
        found = sys.modules.get(name) if target is None else None
        if found is None or found.__spec__ is None:
            return None
        self._module = found
        spec = importlib.util.spec_from_loader(name, self, origin=found.__spec__.origin)  # type: ignore[arg-type]
        assert spec is not None
        spec.submodule_search_locations = found.__spec__.submodule_search_locations
        return spec

    def create_module(self, _spec: ModuleSpec) -> types.ModuleType:
        return self._module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _load(spec: ModuleSpec) -> None:
    """Load the real package into the object that others may hold already."""
    with _lock:
        package = sys.modules[_DYNAMO]
        if not isinstance(package, _StandIn):
            return
        del sys.modules[_SOURCE]
        for name in ("source", "disable", "graph_break", "trace_rules", "_package"):
            del package.__dict__[name]
        assign(package, __class__=types.ModuleType)
        assign(package, __spec__=spec, __loader__=spec.loader, __package__=_DYNAMO)
        assign(package, __path__=list(spec.submodule_search_locations or ()))
        _run(spec, package)


def _disable(
    fn: Callable[..., object] | None = None, recursive: bool = True, **options: object
) -> Callable[..., object]:
    """Do nothing for `torch._dynamo.disable` while nothing compiles, and call the real one from then on."""
    return functools.partial(_disabled, recursive, options) if fn is None else _disabled(recursive, options, fn)


def _disabled(recursive: bool, options: Mapping[str, object], fn: Callable[P, R]) -> Callable[P, R]:
    real: list[Callable[P, R]] = []

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not real:
            dynamo = sys.modules[_DYNAMO]
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
