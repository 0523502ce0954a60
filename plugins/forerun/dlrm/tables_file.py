"""Embedding tables as a CSV file: a row each, with what a planner needs to know of it."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["TableRow", "one_of", "read_tables"]


@dataclass(frozen=True)
class TableRow:
    """One embedding table; its columns, but for `line`. Several values of a cell are parted by `|`."""

    line: int  # of the file
    name: str
    rows: int
    dim: int
    features: tuple[str, ...] = ()  # that look it up; by default one, of the table's name
    pooling_factor: tuple[float, ...] = ()  # ids per sample of each feature
    num_poolings: tuple[float, ...] = ()
    batch_size: tuple[int, ...] = ()  # of each feature, where it is not the planner's
    data_type: str = "fp32"
    weighted: bool = False
    pooling: str = "sum"
    sharding_types: tuple[str, ...] = ()  # allowed; by default all
    compute_kernels: tuple[str, ...] = ()
    min_partition: int | None = None  # columns of the narrowest shard


def read_tables(
    path: str | Path, *, sharding_types: Collection[str] = (), compute_kernels: Collection[str] = ()
) -> list[TableRow]:
    """The tables of a CSV file with a header; `name`, `rows` and `dim` have to be there.

    Args:
        path: The file.
        sharding_types, compute_kernels: What may stand in these columns.

    Raises:
        ValueError: It is not such a file; the message names file, line and column.
    """
    allowed = {"sharding_types": sharding_types, "compute_kernels": compute_kernels}
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            cells = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(map(str.strip, line))]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {lines.line_num + 1}: not a CSV file: {error}") from error
    if not cells:
        raise ValueError(f"{path} is empty; expected a header, such as name,rows,dim,pooling_factor")
    header = cells[0][1]
    _check_header(f"{path}, line {cells[0][0]}", header)
    found: dict[str, TableRow] = {}
    for line, values in cells[1:]:
        where = f"{path}, line {line}"
        if len(values) != len(header):
            raise ValueError(f"{where}: {len(values)} cells; the header has {len(header)}")
        row = _row(where, line, dict(zip(header, values, strict=True)), allowed)
        if row.name in found:
            raise ValueError(f"{where}, column name: {row.name!r} is the table of line {found[row.name].line} already")
        found[row.name] = row
    if not found:
        raise ValueError(f"{path} has a header and no table")
    return list(found.values())


def one_of(where: str, value: str, known: Collection[str]) -> str:
    """The value.

    Raises:
        ValueError: It is none of those known; the message has the closest.
    """
    if value in known:
        return value
    close = difflib.get_close_matches(value, known, n=1)
    cure = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(known)}"
    raise ValueError(f"{where}: got {value!r}; {cure}")


def _check_header(where: str, header: list[str]) -> None:
    for column in header:
        one_of(f"{where}, column {column!r}", column, _READ)
        if header.count(column) > 1:
            raise ValueError(f"{where}: column {column!r} comes twice")
    for column in ("name", "rows", "dim"):
        if column not in header:
            raise ValueError(f"{where}: there is no column {column!r}; expected at least name, rows, dim")


def _row(where: str, line: int, cells: dict[str, str], allowed: dict[str, Collection[str]]) -> TableRow:
    values: dict[str, Any] = {"line": line}
    for column, cell in cells.items():
        place = f"{where}, column {column}"
        if cell:
            values[column] = _READ[column](place, cell)
            for value in values[column] if allowed.get(column) else ():
                one_of(place, value, allowed[column])
        elif column in ("name", "rows", "dim"):
            raise ValueError(f"{place}: empty")
    row = TableRow(**{**values, "features": values.get("features") or (values["name"],)})
    for column in ("pooling_factor", "num_poolings", "batch_size"):
        if (count := len(getattr(row, column))) not in (0, len(row.features)):
            raise ValueError(
                f"{where}, column {column}: {count} values and {len(row.features)} features; column features names "
                "them, parted by |"
            )
    return row


def _whole(where: str, text: str) -> int:
    number = _number(where, text)
    if number != int(number) or number < 1:
        raise ValueError(f"{where}: got {text!r}; expected a whole number, 1 or more")
    return int(number)


def _number(where: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{where}: got {text!r}; expected a number, 0 or more")
    return number


def _truth(where: str, text: str) -> bool:
    return one_of(where, text.lower(), ("true", "false", "yes", "no", "1", "0")) in ("true", "yes", "1")


def _text(where: str, text: str) -> str:
    return text


def _choice(*known: str) -> Callable[[str, str], str]:
    return lambda where, text: one_of(where, text.lower(), known)


def _several(read: Callable[[str, str], Any]) -> Callable[[str, str], tuple[Any, ...]]:
    return lambda where, text: tuple(read(where, part.strip()) for part in text.split("|"))


_READ: dict[str, Callable[[str, str], Any]] = {
    "name": _text,
    "rows": _whole,
    "dim": _whole,
    "features": _several(_text),
    "pooling_factor": _several(_number),
    "num_poolings": _several(_number),
    "batch_size": _several(_whole),
    "data_type": _choice("fp32", "fp16"),
    "weighted": _truth,
    "pooling": _choice("sum", "mean"),
    "sharding_types": _several(_text),
    "compute_kernels": _several(_text),
    "min_partition": _whole,
}
assert [*_READ] == [field.name for field in fields(TableRow)][1:]
