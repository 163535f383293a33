"""Changes a module as soon as the script imports it, and imports nothing that the script does not."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ClassVar

Change = Callable[[ModuleType], None]


def after_import(name: str, change: Change) -> None:
    """Call `change` with the module of that name: now if it is loaded, else right after its own code ran."""
    module = sys.modules.get(name)
    if module is not None:
        change(module)
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _Finder.waiting[name] = change


class _Finder(MetaPathFinder):
    waiting: ClassVar[dict[str, Change]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = self.waiting.get(name)
        if change is None:
            return None
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if finder is not self else None
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, change)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, usual: Loader, change: Change) -> None:
        self._usual, self._change = usual, change

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self._usual
        _Finder.waiting.pop(spec.name, None)
        self._usual.exec_module(module)
        self._change(module)
