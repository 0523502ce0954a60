"""Click logs in Criteo's format: a line per sample, a label, 13 counts and 26 categories, separated by tabs.

    python examples/criteo.py build/criteo.txt.gz --lines 20000

writes a SYNTHETIC file of that format, for want of a real one: Criteo's logs may not be passed on. Real ones
(Kaggle's display advertising challenge, or the terabyte log's days) are read alike, plain or gzipped.

A missing or negative count is 0, others are log(x + 1). A missing category is row 0 of its table, any other is hashed
into the rest.
"""

from __future__ import annotations

import argparse
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from click_logs import Batch, Share, Table, mixed

from forerun.dlrm.synthetic import PowerLaw

__all__ = ["CATEGORIES", "COUNTS", "KAGGLE_ROWS", "CriteoLog", "Line", "lines", "parse", "scaled", "write_synthetic"]

COUNTS, CATEGORIES = 13, 26
# Kaggle's display advertising challenge: the distinct values of each category
KAGGLE_ROWS = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306]
KAGGLE_ROWS += [10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
_WHOLE = re.compile(rb"[01](?:\t(?:-?[0-9]{1,18})?){13}(?:\t(?:[0-9a-fA-F]{1,8})?){26}")
_LONGEST = 4096  # bytes; a line of the format has at most 523
_HELD_OUT = 10  # one batch in so many is held out


class Line(NamedTuple):
    """A sample as it is written."""

    label: int
    counts: list[int]  # a missing one is 0
    categories: list[int]  # a missing one is -1


def scaled(rows: Sequence[int], scale: float) -> list[int]:
    """Smaller tables: each number of rows times `scale`, and at least 2."""
    return [max(2, round(each * scale)) for each in rows]


class CriteoLog:
    """A file that is read as a stream, however long; one batch in ten is held out.

    Args:
        path: Of a log; one that ends in .gz is unpacked while it is read.
        rows: Of each category's table, at least 2.

    Raises:
        ValueError: Not 26 tables, or one of fewer than 2 rows. While reading: a malformed line, named by its number,
            or a file with too few lines for a batch.
    """

    columns = COUNTS

    def __init__(self, path: Path, rows: Sequence[int] = KAGGLE_ROWS) -> None:
        if len(rows) != CATEGORIES or min(rows) < 2:
            raise ValueError(f"rows are {list(rows)}; give {CATEGORIES} numbers, each 2 or more: row 0 is for missing")
        self._path = path
        self.tables = tuple(Table(f"C{place}", each, 1.0) for place, each in enumerate(rows, 1))

    def training(self, share: Share, size: int) -> Iterator[Batch]:
        while True:
            some = False
            for number, batch in enumerate(self._batches(share, size)):
                if number % _HELD_OUT != _HELD_OUT - 1:
                    some = True
                    yield batch
            if not some:
                what = f"{self._path} has fewer than {size * share.ranks} lines, which a batch of all ranks takes"
                raise ValueError(f"{what}; give a longer log or a smaller batch")

    def held_out(self, share: Share, size: int) -> Iterator[Batch]:
        for number, batch in enumerate(self._batches(share, size)):
            if number % _HELD_OUT == _HELD_OUT - 1:
                yield batch

    def _batches(self, share: Share, size: int) -> Iterator[Batch]:
        """One rank's part of every batch that the file fills for all ranks."""
        own = range(share.rank * size, (share.rank + 1) * size)
        parsed: list[Line] = []
        for number, line in enumerate(lines(self._path)):
            place = number % (size * share.ranks)
            if place in own:
                parsed.append(parse(line, f"{self._path}:{number + 1}"))
            if place == size * share.ranks - 1:
                yield self._batch(parsed)
                parsed = []

    def _batch(self, parsed: Sequence[Line]) -> Batch:
        counts = np.array([line.counts for line in parsed], dtype=np.float64)
        categories = np.array([line.categories for line in parsed], dtype=np.int64).T
        ids = np.empty_like(categories)
        for place, (table, values) in enumerate(zip(self.tables, categories, strict=True)):
            hashed = 1 + (mixed(values, place) % np.uint64(table.rows - 1)).astype(np.int64)
            ids[place] = np.where(values < 0, 0, hashed)
        return Batch(
            dense=np.log1p(np.maximum(counts, 0)).astype(np.float32),
            ids=ids.ravel(),
            lengths=np.ones(ids.shape, dtype=np.int32),
            labels=np.array([line.label for line in parsed], dtype=np.float32),
        )


def lines(path: Path) -> Iterator[bytes]:
    """Every line of a file, without its end.

    Raises:
        ValueError: A line that is longer than any of the format, or a damaged .gz file.
    """
    number = 0
    with _opened(path) as file:
        try:
            while line := file.readline(_LONGEST):
                number += 1
                if len(line) == _LONGEST:
                    raise ValueError(f"{path}:{number}: the line is longer than {_LONGEST - 1} bytes")
                yield line.rstrip(b"\r\n")
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: the file cannot be read on: {error}") from error


def parse(line: bytes, where: str) -> Line:
    """A line's sample.

    Args:
        line: Without its end.
        where: The file and the line's number, for the error.

    Raises:
        ValueError: The line is malformed; says how.
    """
    fields = line.split(b"\t")
    if not _WHOLE.fullmatch(line):
        raise ValueError(f"{where}: {_fault(fields)}")
    counts, categories = fields[1 : 1 + COUNTS], fields[1 + COUNTS :]
    return Line(
        label=int(fields[0]),
        counts=[int(each) if each else 0 for each in counts],
        categories=[int(each, 16) if each else -1 for each in categories],
    )


def write_synthetic(path: Path, count: int, seed: int = 0) -> None:
    """Writes `count` lines in Criteo's format that a seeded generator makes up; no click of anybody is in it."""
    random = np.random.default_rng(seed)
    kinds = [PowerLaw(rows, 1.05).draw(count, random) for rows in scaled(KAGGLE_ROWS, 0.01)]
    values = np.stack([mixed(ids, place + 1000) % np.uint64(2**32) for place, ids in enumerate(kinds)], 1)
    missing = random.random((count, CATEGORIES)) < 0.05
    counts = np.floor(random.lognormal(1.0, 1.5, (count, COUNTS))).astype(np.int64) - 1
    absent = random.random((count, COUNTS)) < 0.2
    effect = sum(mixed(ids, place) / 2.0**63 - 1.0 for place, ids in enumerate(kinds[:8])) + np.log1p(counts[:, 0] + 1)
    labels = random.random(count) < 1 / (1 + np.exp(2.5 - effect))
    with _opened(path, "wb") as file:
        for row in range(count):
            numbers = ["" if gone else str(each) for each, gone in zip(counts[row], absent[row], strict=True)]
            names = ["" if gone else f"{each:08x}" for each, gone in zip(values[row], missing[row], strict=True)]
            file.write("\t".join([str(int(labels[row])), *numbers, *names]).encode() + b"\n")


def _opened(path: Path, mode: str = "rb") -> IO[bytes]:
    return gzip.open(path, mode) if path.suffix == ".gz" else open(path, mode)


def _fault(fields: Sequence[bytes]) -> str:
    """What is wrong with a malformed line."""
    wanted = 1 + COUNTS + CATEGORIES
    if len(fields) != wanted:
        return f"{len(fields)} fields, separated by tabs; {wanted} are wanted: a label, 13 counts, 26 categories"
    if fields[0] not in (b"0", b"1"):
        return f"the label is {_shown(fields[0])}; it has to be 0 or 1"
    for place, each in enumerate(fields[1:], 2):
        kind, pattern = ("a whole number", rb"-?[0-9]{1,18}") if place <= 1 + COUNTS else ("hexadecimal", None)
        if each and not re.fullmatch(pattern or rb"[0-9a-fA-F]{1,8}", each):
            return f"field {place} is {_shown(each)}; it has to be {kind} or empty"
    raise AssertionError("the line is well formed")


def _shown(field: bytes) -> str:
    text = field.decode(errors="backslashreplace")
    return repr(text if len(text) <= 40 else text[:40] + "…")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.path.parent.mkdir(parents=True, exist_ok=True)
    write_synthetic(options.path, options.lines, options.seed)
