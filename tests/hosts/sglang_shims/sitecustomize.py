"""Lets torchvision's CUDA build import beside a CPU torch; on the path for SGLang's test processes only.

What differs: its compiled operators do not load, so the schemas that its Python code looks up are never declared. Here
they are, just before torchvision is imported. Python imports a module of this name at its start, hence in the child
processes that SGLang spawns too.

Remove when SGLang's torchvision pin has a CPU build.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _DeclareSchemas(importlib.abc.MetaPathFinder):
    """Finds nothing; sees torchvision asked for."""

    library: Any = None  # the schemas last as long as the library that declares them

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname == "torchvision" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in _SCHEMAS:
                self.library.define(schema)
        return None


sys.meta_path.insert(0, _DeclareSchemas())
