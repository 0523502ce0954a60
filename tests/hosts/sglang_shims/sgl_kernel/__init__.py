"""Stands in for SGLang's kernel package, which has CUDA and AMX builds only: every name imports, every call raises.

On the path for SGLang's test processes only; they use backends that call no kernel of it. Remove when the package runs
on any CPU.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

__version__ = "0.0.0+cpu-stub"
__path__ = []

# SGLang asks for this one to learn whether a kernel of its own exists, and has Python code for when it does not.
_ABSENT = f"{__name__}.scalar_type"


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU fallback in the tests' stand-in")

    kernel.__name__ = name
    return kernel


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes any submodule, as empty as this one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(f"{__name__}.") and fullname != _ABSENT:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = __getattr__  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.append(_Submodules())
