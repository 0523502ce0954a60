"""The ranks of a plan as a JSON file: how many, with what memory, and what they were measured to do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from forerun.dlrm.tables_file import one_of

__all__ = ["TopologyFile", "read_topology"]


@dataclass(frozen=True)
class TopologyFile:
    """What the file says; its keys are these. A GB is 1024 ** 3 bytes."""

    world_size: int
    local_world_size: int | None = None  # ranks a host; None: all
    compute_device: str | None = None  # cuda or cpu; None: that of the calibration
    hbm_gb: float | list[float] | None = None  # of each rank, or of every one
    ddr_gb: float | list[float] | None = None
    reserved_percent: float = 15.0  # of the memory, for what is no embedding
    calibration: Path | None = None  # in the file relative to it
    message_bytes: int | None = None  # at which the calibration's bandwidths are taken
    constants: dict[str, float] | None = None  # torchrec's, such as hbm_mem_bw (bytes per ms)

    def of_ranks(self, key: str) -> list[int] | None:
        """Bytes of each rank of `hbm_gb` or `ddr_gb`; None where it is not given."""
        given = getattr(self, key)
        if given is None:
            return None
        each = given if isinstance(given, list) else [given] * self.world_size
        return [int(gigabytes * 1024**3) for gigabytes in each]


def read_topology(path: str | Path, *, constants: Collection[str] = ()) -> TopologyFile:
    """The ranks that a JSON file describes.

    Args:
        path: The file.
        constants: Names that may stand under `constants`.

    Raises:
        ValueError: It is not such a file; the message names file and key.
    """
    path = Path(path)
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _object(path, pairs))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(given, dict) or "world_size" not in given:
        raise ValueError(f'{path}: expected an object with at least "world_size"')
    values = {key: _READ[one_of(f"{path}, key {key!r}", key, _READ)](f"{path}, key {key}", given[key]) for key in given}
    for key in values.get("constants") or {}:
        one_of(f"{path}, key constants.{key}", key, constants)
    if values.get("calibration") is not None:
        values["calibration"] = path.parent / values["calibration"]
    read = TopologyFile(**values)
    _check(path, read)
    return read


def _check(path: Path, read: TopologyFile) -> None:
    local = read.local_world_size
    if local is not None and read.world_size % local:
        raise ValueError(f"{path}, key local_world_size: {read.world_size} ranks do not divide into hosts of {local}")
    if read.compute_device is None and read.calibration is None:
        raise ValueError(f"{path}: expected compute_device, cuda or cpu, or a calibration that says it")
    if read.compute_device == "cpu" and read.hbm_gb is not None:
        raise ValueError(f"{path}, key hbm_gb: ranks on a CPU have ddr_gb only")
    if read.message_bytes is not None and read.calibration is None:
        raise ValueError(f"{path}, key message_bytes: it is for a calibration, and there is none")
    for key in ("hbm_gb", "ddr_gb"):
        given = getattr(read, key)
        if isinstance(given, list) and len(given) != read.world_size:
            raise ValueError(f"{path}, key {key}: {len(given)} numbers and {read.world_size} ranks")


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"{path}, key {twice[0]}: comes twice")
    return dict(pairs)


def _whole(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: got {value!r}; expected a whole number, 1 or more")
    return value


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{where}: got {value!r}; expected a number, 0 or more")
    return value


def _percent(where: str, value: Any) -> float:
    if _number(where, value) >= 100:
        raise ValueError(f"{where}: got {value!r}; expected less than 100")
    return float(value)


def _number_or_list(where: str, value: Any) -> float | list[float]:
    return [_number(where, each) for each in value] if isinstance(value, list) else _number(where, value)


def _path(where: str, value: Any) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{where}: got {value!r}; expected the path of a file, relative to this one")
    return Path(value)


def _device(where: str, value: Any) -> str:
    return one_of(where, str(value), ("cuda", "cpu"))


def _constants(where: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {value!r}; expected an object of names and numbers")
    for name, number in value.items():
        if _number(f"{where}.{name}", number) == 0:
            raise ValueError(f"{where}.{name}: got 0; expected a number above it")
    return value


_READ: dict[str, Callable[[str, Any], Any]] = {
    "world_size": _whole,
    "local_world_size": _whole,
    "compute_device": _device,
    "hbm_gb": _number_or_list,
    "ddr_gb": _number_or_list,
    "reserved_percent": _percent,
    "calibration": _path,
    "message_bytes": _whole,
    "constants": _constants,
}
assert [*_READ] == [field.name for field in fields(TopologyFile)]
