"""Arrays and a JSON header in one safetensors file that carries its own hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from forerun.files import write_whole

__all__ = ["read", "write"]

_HEADER, _DIGEST = "forerun", "sha256"
Arrays = Mapping[str, NDArray[Any]]


def write(path: str | Path, kind: str, header: Mapping[str, Any], arrays: Arrays) -> None:
    """Writes a file whole or not at all.

    Args:
        path: The file.
        kind: What it is, "profile" or "plan".
        header: Whatever JSON holds.
        arrays: By name.

    Raises:
        OSError: The disk does not take it; what was there before stays.
    """
    text = json.dumps({"kind": kind, **header}, sort_keys=True, allow_nan=False)
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(Path(path), save(whole, {_HEADER: text, _DIGEST: _digest(text, whole)}))


def read(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and arrays of a file that `write` wrote.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is something else, was cut off or altered.
    """
    with Path(path).open("rb"):  # says what safetensors does not: not there, no permission, a folder
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            text, digest = metadata[_HEADER], metadata[_DIGEST]
            header = json.loads(text)
            found = header["kind"]
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a {kind} written by forerun, or was cut off: {error}") from error
    if found != kind:
        raise ValueError(f"{path} is a {found}; expected a {kind}")
    if _digest(text, arrays) != digest:
        raise ValueError(f"{path} was altered after it was written (its hash is another): make the {kind} again")
    return header, arrays


def _digest(text: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
