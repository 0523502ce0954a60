"""The `KeyedJaggedTensor`s in batches of any make, and the tables that they are looked up in."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

from forerun_adapters import torchrec_data as host

__all__ = ["check_features", "jagged_tensors", "tables_of"]

_log = logging.getLogger(__name__)


def jagged_tensors(batches: Iterable[Any], limit: int | None) -> Iterator[list[Any]]:
    """The `KeyedJaggedTensor`s of each batch, of no more than `limit` batches.

    Raises:
        TypeError: A batch holds none.
        ValueError: There is no batch, or none is wanted.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected at least 1 batch, or None for all of them")
    if isinstance(batches, host.KeyedJaggedTensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches is one {type(batches).__name__}; expected a data loader, or a list of batches")
    taken = 0
    for batch in islice(batches, limit):
        found = list(_jagged(batch))
        if not found:
            raise TypeError(
                f"batch {taken} is a {type(batch).__name__} without a KeyedJaggedTensor; expected one, or a tuple, "
                "dict or dataclass that holds some"
            )
        taken += 1
        yield found
    if not taken:
        raise ValueError("there is no batch; an iterator that was read to its end has none left: give the data loader")
    if isinstance(batches, Iterator):
        _log.warning("took %d batches off an iterator: whoever reads on gets those after them", taken)


def tables_of(tables: Any) -> list[host.TableFeatures]:
    """Every table of a model, or of configurations, once.

    Raises:
        ValueError: There is none, or two of one name have different features or rows.
    """
    listed = host.table_features(tables) if hasattr(tables, "modules") else map(host.of_config, tables)
    found: dict[str, host.TableFeatures] = {}
    for table in listed:
        if (first := found.setdefault(table.name, table)) != table:
            raise ValueError(
                f"two tables are called {table.name!r}, of {first.rows} rows with features {first.features}, and of "
                f"{table.rows} with {table.features}; torchrec's constraints go by name: rename one"
            )
    if not found:
        raise ValueError("there is no embedding table: give the model, or the tables' configurations")
    return list(found.values())


def check_features(tables: Sequence[host.TableFeatures], found: Collection[str], batches: int) -> None:
    """Returns if every feature of the tables was found in some batch.

    Raises:
        ValueError: Some were not; the message names them.
    """
    unknown = {feature: table.name for table in tables for feature in table.features if feature not in found}
    if not unknown:
        return
    close = difflib.get_close_matches(next(iter(unknown)), found, n=1)
    raise ValueError(
        f"{len(unknown)} features are in none of the {batches} batches: "
        + ", ".join(f"{feature!r} of table {table!r}" for feature, table in list(unknown.items())[:5])
        + (", …" if len(unknown) > 5 else "")
        + (f"; did you mean {close[0]!r}?" if close else f"; the batches have {sorted(found)[:8]}")
    )


def _jagged(batch: Any) -> Iterator[Any]:
    """Every `KeyedJaggedTensor` in a batch."""
    if isinstance(batch, host.KeyedJaggedTensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _jagged(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _jagged(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from _jagged(getattr(batch, field.name))
