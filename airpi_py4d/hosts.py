"""Adds our methods to the host libraries when they are imported, before or after us, and never imports them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _LoaderThenCall(Loader):
    """Runs the real loader, then `call(module)`."""

    def __init__(self, loader: Loader, call: Callable[[ModuleType], None]) -> None:
        self._loader, self._call = loader, call

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._call(module)


class _ImportWatcher(MetaPathFinder):
    """Waits for the first import of one module that succeeds."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self._name, self._call = name, call
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._searching:
            return None
        self._searching = True  # so that the other finders answer
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenCall(spec.loader, self._imported)
        return spec

    def _imported(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            try:
                self._call(module)
            except AttributeError as error:  # a host that has moved its class must still import
                warnings.warn(f"airpi_py4d can't add its method: {error}.", UserWarning, stacklevel=2)


def add_method(host_class: type, method: Callable[..., Any]) -> None:
    """Make `method` a method of a host's class, under its own name; once or again, it is the same.

    Warns
    -----
    UserWarning
        If the class already has an attribute of that name that isn't ours, which then stays.
    """
    present = getattr(host_class, method.__name__, None)
    if present is not None and getattr(present, "__module__", None) != method.__module__:
        warnings.warn(
            f"{host_class.__name__}.{method.__name__} already exists ({present!r}), so airpi_py4d leaves it. "
            f"Call {method.__module__}.{method.__name__}, with the object as its first argument.",
            UserWarning,
            stacklevel=3,
        )
        return
    setattr(host_class, method.__name__, method)


def when_imported(name: str, call: Callable[[ModuleType], None]) -> None:
    """Call `call(module)` now if module `name` is imported, else right after its first import."""
    if name in sys.modules:
        call(sys.modules[name])
    else:
        sys.meta_path.insert(0, _ImportWatcher(name, call))
