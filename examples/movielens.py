"""MovieLens-100k: who will like which film, from what was known before.

The ratings come inside RecBole's wheel on PyPI (2.1 MB), which is read as the zip that it is and never installed. A
rating of 4 or 5 is a like. A sample knows its user (age, gender, occupation, first character of the zip code), its film
(year, genres), and what had happened strictly before its second: films that the user liked and did not, and how often
and how well user and film were rated. The last fifth of the time is held out.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from click_logs import Batch, Ragged, Share, Table
from numpy.typing import NDArray

__all__ = ["LATEST", "MovieLens", "fetch"]

LATEST = 30  # films of a user's history that a sample knows, of either kind
_PACKAGE, _FOLDER = "recbole==1.2.1", "recbole/dataset_example/ml-100k/ml-100k"
_HELD_OUT = 0.2  # of the ratings, the last


def fetch(folder: Path) -> Path:
    """RecBole's wheel in a folder, downloaded by pip if it is not there.

    Raises:
        RuntimeError: pip failed; the message ends with what it said.
    """
    if not (found := sorted(folder.glob("recbole-1.2.1-*.whl"))):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        found = sorted(folder.glob("recbole-1.2.1-*.whl"))
        if done.returncode or not found:
            raise RuntimeError(f"pip could not download {_PACKAGE}; give its wheel as movielens:PATH: {done.stderr}")
    return found[0]


class MovieLens:
    """All samples, in memory, trained on in an order that changes with the epoch.

    Args:
        wheel: RecBole's.

    Raises:
        ValueError: The file is no zip or lacks the data, or a line of the data is malformed.
    """

    def __init__(self, wheel: Path) -> None:
        users, films, ratings = _read(wheel)
        features, dense = _samples(users, films, ratings)
        self._dense = dense
        self._labels = np.array([rating.liked for rating in ratings], dtype=np.float32)
        self._features = {name: Ragged.of(lists) for name, (_, lists) in features.items()}
        self._trained = _split(ratings)
        lookups = {name: each.offsets[self._trained] / self._trained for name, each in self._features.items()}
        self.tables = tuple(Table(name, rows, float(lookups[name])) for name, (rows, _) in features.items())
        self.columns = dense.shape[1]

    def training(self, share: Share, size: int) -> Iterator[Batch]:
        if self._trained < size * share.ranks:
            raise ValueError(f"{self._trained} samples are trained on; a batch of all ranks takes {size * share.ranks}")
        epoch = 0
        while True:
            yield from self._batches(np.random.default_rng(epoch).permutation(self._trained), share, size)
            epoch += 1

    def held_out(self, share: Share, size: int) -> Iterator[Batch]:
        return self._batches(np.arange(self._trained, len(self._labels)), share, size)

    def _batches(self, samples: NDArray[np.int64], share: Share, size: int) -> Iterator[Batch]:
        for first in range(0, len(samples) - size * share.ranks + 1, size * share.ranks):
            own = samples[first + share.rank * size :][:size]
            taken = [self._features[table.name].take(own) for table in self.tables]
            ids, lengths = zip(*taken, strict=True)
            lengths_array = np.stack(lengths).astype(np.int32)
            yield Batch(self._dense[own], np.concatenate(ids), lengths_array, self._labels[own])


class _Rating(NamedTuple):
    user: str
    film: str
    liked: bool
    time: float  # s


def _read(wheel: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], list[_Rating]]:
    """Users (age, gender, occupation, zip code), films (title, year, genres), ratings by time."""
    try:
        with zipfile.ZipFile(wheel) as file:
            users, films, ratings = (
                list(_rows(wheel, kind, file.read(f"{_FOLDER}.{kind}"), columns))
                for kind, columns in (("user", 5), ("item", 4), ("inter", 4))
            )
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} does not hold MovieLens-100k: {error}; give the wheel of {_PACKAGE}") from error
    try:
        parsed = [_Rating(user, film, float(rating) >= 4, float(time)) for user, film, rating, time in ratings]
    except ValueError as error:
        raise ValueError(f"{wheel}: ml-100k.inter: {error}") from error
    return {k: rest for k, *rest in users}, {k: rest for k, *rest in films}, sorted(parsed, key=lambda it: it.time)


def _rows(wheel: Path, kind: str, content: bytes, columns: int) -> Iterator[list[str]]:
    for number, line in enumerate(content.decode().splitlines()[1:], 2):  # the first names the columns
        fields = line.split("\t")
        if len(fields) != columns:
            raise ValueError(f"{wheel}: ml-100k.{kind}:{number}: {len(fields)} fields instead of {columns}")
        yield fields


def _split(ratings: Sequence[_Rating]) -> int:
    """How many of the ratings are before the second at which the held-out time begins."""
    begin = ratings[round(len(ratings) * (1 - _HELD_OUT))].time
    return next(place for place, rating in enumerate(ratings) if rating.time == begin)


def _samples(
    users: dict[str, list[str]], films: dict[str, list[str]], ratings: Sequence[_Rating]
) -> tuple[dict[str, tuple[int, list[Any]]], NDArray[np.float32]]:
    """For each table its rows and the ids of every rating; the dense features of every rating."""
    number = {name: place for place, name in enumerate(films)}
    missing = sorted({it.user for it in ratings} - set(users) | {it.film for it in ratings} - set(films))
    if missing:
        raise ValueError(f"ml-100k.inter has users or films that are described nowhere, {missing[0]!r} the first")
    known = {
        "user": _encoded(ratings, {name: [name] for name in users}, "user"),
        "film": _encoded(ratings, {name: [name] for name in films}, "film"),
        "age": _encoded(ratings, {name: [str(int(it[0]) // 10)] for name, it in users.items()}, "user"),
        "gender": _encoded(ratings, {name: [it[1]] for name, it in users.items()}, "user"),
        "occupation": _encoded(ratings, {name: [it[2]] for name, it in users.items()}, "user"),
        "zip": _encoded(ratings, {name: [it[3][:1]] for name, it in users.items()}, "user"),
        "year": _encoded(ratings, {name: [it[1]] for name, it in films.items()}, "film"),
        "genre": _encoded(ratings, {name: it[2].split() for name, it in films.items()}, "film"),
    }
    liked, disliked, dense = _history(ratings, number)
    return {**known, "liked": (len(films), liked), "disliked": (len(films), disliked)}, dense


def _encoded(ratings: Sequence[_Rating], words: dict[str, list[str]], of: str) -> tuple[int, list[list[int]]]:
    """How many words there are, and those of each rating's user or film, as numbers."""
    vocabulary = {word: place for place, word in enumerate(sorted({w for some in words.values() for w in some}))}
    numbers = {name: [vocabulary[word] for word in some] for name, some in words.items()}
    return len(vocabulary), [numbers[getattr(rating, of)] for rating in ratings]


def _history(
    ratings: Sequence[_Rating], number: dict[str, int]
) -> tuple[list[list[int]], list[list[int]], NDArray[np.float32]]:
    """What was known when each rating was given: ratings of the same second do not know each other."""
    likes: dict[bool, dict[str, deque[int]]] = {
        True: defaultdict(lambda: deque(maxlen=LATEST)),
        False: defaultdict(lambda: deque(maxlen=LATEST)),
    }
    tally: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # of "user 7" and "film 7": ratings, likes
    last: dict[str, float] = {}
    before: dict[bool, list[list[int]]] = {True: [], False: []}
    dense: list[list[float]] = []
    for _, group in groupby(ratings, key=lambda it: it.time):
        now = list(group)
        for rating in now:
            for kind, histories in likes.items():
                before[kind].append(list(histories[rating.user]))
            waited = np.log1p(rating.time - last.get(rating.user, rating.time))
            counted = (_counted(tally[f"user {rating.user}"]), _counted(tally[f"film {rating.film}"]))
            dense.append([waited / 10, *counted[0], *counted[1]])
        for rating in now:
            likes[rating.liked][rating.user].append(number[rating.film])
            last[rating.user] = rating.time
            for key in (f"user {rating.user}", f"film {rating.film}"):
                tally[key][0] += 1
                tally[key][1] += rating.liked
    return before[True], before[False], np.array(dense, dtype=np.float32)


def _counted(tally: Iterable[int]) -> tuple[float, float]:
    """How often something was rated, as a logarithm, and the share of likes, drawn to a half where there are few."""
    count, liked = tally
    return float(np.log1p(count)), (liked + 1) / (count + 2)
