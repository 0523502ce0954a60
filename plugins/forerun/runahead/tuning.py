"""From engines to a table of splits: measures them and writes what `forerun runahead serve` and `plan` read."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forerun.runahead.arguments import value_of
from forerun.runahead.calibrate import Calibration, calibrate
from forerun.runahead.engine_client import EngineClient
from forerun.runahead.shape import Shape
from forerun.runahead.table import Table, make_table

__all__ = ["hardware", "tune", "with_dtype"]

_SLACK = 0.01
_REFINED = 4  # rows between two measured lengths


def tune(
    model: str,
    config: Mapping[str, Any],
    engines: Sequence[EngineClient],
    lengths: Sequence[int],
    *,
    where: str | None = None,
    repeats: int = 3,
    told: Callable[[str], None] = lambda _: None,
) -> tuple[Table, Calibration]:
    """The table of splits for these engines, and what was measured for it.

    A chain is taken where it is expected to be faster than one engine *whose neighbours rest*: what engines cost each
    other is in the table's slack.

    Args:
        model: Its name in the table.
        config: Its `config.json`, with the dtype that the engines run in.
        engines: In the order of a chain; they do nothing else.
        lengths: Tokens of the prompts to measure; rows go as far as the longest one.
        where: The hardware's name in the table; None: this machine's.
        repeats: Of every measurement.
        told: Is given a line a measurement.

    Raises:
        ValueError: The lengths or the config do not fit, or engines differ in their blocks.
        RuntimeError: An engine failed to answer, or not in time.
    """
    shape, settings = Shape.from_config(config), [engine.cache() for engine in engines]
    blocks = {int(each["block_size"]) for each in settings}
    if len(blocks) != 1:
        raise ValueError(f"the engines' blocks are of {sorted(blocks)} tokens; expected the same --block-size for all")
    block = blocks.pop()
    caches = all(each.get("enable_prefix_caching") == "True" for each in settings)
    vocabulary = int(config.get("text_config", config)["vocab_size"])
    found = calibrate(
        engines, shape, lengths, block=block, vocabulary=vocabulary, caches=caches, repeats=repeats, told=told
    )
    table = make_table(
        found.chain,
        _rows(sorted(set(lengths)), block),
        len(engines),
        model=model,
        hardware=where or hardware(len(engines)),
        block=block,
        slack=_SLACK + found.crowding - 1,
        computes=found.computes,
    )
    return table, found


def hardware(engines: int) -> str:
    """This machine, as a table names it."""
    return f"{engines} engines on {platform.node() or platform.machine()}, {os.cpu_count()} cores"


def with_dtype(config: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The config with the dtype that vLLM's arguments name, if they do."""
    named = value_of(arguments, "--dtype")
    return {**config, "dtype": named} if named not in (None, "auto") else dict(config)


def _rows(lengths: Sequence[int], block: int) -> list[int]:
    """Lengths of the rows: the measured ones and some between, from two blocks on."""
    ends = [2 * block, *lengths]
    between = [a + (b - a) * i // _REFINED for a, b in zip(ends, lengths, strict=False) for i in range(_REFINED)]
    return sorted({*between, *ends})
