"""What SGLang calls in each of its processes (entry point `sglang.srt.plugins`): forerun's drop-ins, where asked for.

Without the variable FORERUN_SGLANG nothing is imported and nothing is changed. It holds the path of a JSON file, or the
JSON itself where it begins with a brace:

    {"speculative_moe": {"plan": "plan.safetensors"}}

One section per drop-in; what each may hold is said by its module. A server whose configuration cannot be met does not
start.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["SECTIONS", "VARIABLE", "read", "register"]

VARIABLE = "FORERUN_SGLANG"

# Each module has `hooks(section) -> Sequence[Hook]`, which raises ValueError or OSError for what it cannot meet.
SECTIONS = {"speculative_moe": "forerun.moe.sglang", "runahead": "forerun.runahead.sglang"}


def register() -> None:
    """Puts the hooks of the drop-ins that are asked for.

    Raises:
        SystemExit: The configuration cannot be met. SGLang logs a plugin's other errors, and would go on without it.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return
    try:
        sections = read(given)
        from forerun_adapters.sglang import put

        drop_ins = [(importlib.import_module(SECTIONS[name]), section) for name, section in sections.items()]
        put([hook for drop_in, section in drop_ins for hook in drop_in.hooks(section)])
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"forerun: {VARIABLE}: {error}") from error


def read(given: str) -> dict[str, Mapping[str, Any]]:
    """The sections of a configuration.

    Args:
        given: A path, or JSON that begins with a brace.

    Raises:
        OSError: There is no such file.
        ValueError: It is not JSON, or holds something else than known sections.
    """
    text, place = (given, "the variable") if given.startswith("{") else (Path(given).read_text(), given)
    try:
        sections = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(sections, dict):
        raise ValueError(f"{place} holds a {type(sections).__name__}; expected an object with {_known()}")
    for name, section in sections.items():
        if name not in SECTIONS:
            raise ValueError(f"{place} has a section {name!r}; expected {_known()}")
        if not isinstance(section, dict):
            raise ValueError(f"section {name!r} of {place} is {section!r}; expected an object")
    return sections


def _known() -> str:
    return " or ".join(map(repr, SECTIONS))
