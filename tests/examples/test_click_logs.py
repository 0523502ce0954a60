"""What the DLRM examples read: Criteo's format, MovieLens in RecBole's wheel, synthetic logs."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import criteo
import numpy as np
import pytest
from click_logs import Batch, Ragged, Share, SyntheticLog, Table
from criteo import CriteoLog, Line, lines, parse
from dlrm_run import Run, opened
from movielens import LATEST, MovieLens, fetch

from forerun.dlrm.synthetic import StackDistances, Uniform

LINE = b"1\t5\t\t-1\t" + b"\t".join([b"7"] * 10) + b"\t68fd1e64\t\tFFFFFFFF\t" + b"\t".join([b"0a"] * 23)


@pytest.fixture(params=["log.txt", "log.txt.gz"])
def log(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / request.param
    criteo.write_synthetic(path, 100)
    return path


def test_a_line_is_read_as_it_is_written() -> None:
    read = parse(LINE, "here:1")
    assert read == Line(1, [5, 0, -1, *[7] * 10], [0x68FD1E64, -1, 0xFFFFFFFF, *[10] * 23])


@pytest.mark.parametrize(
    "broken, fault",
    [
        (LINE + b"\t1", "41 fields"),
        (b"", "1 fields"),
        (LINE.replace(b"\t", b" "), "1 fields"),
        (b"2" + LINE[1:], "label is '2'"),
        (b"\t".join([b"", *LINE.split(b"\t")[1:]]), "label is ''"),
        (LINE.replace(b"\t5\t", b"\t5.0\t"), "field 2 is '5.0'; it has to be a whole number"),
        (LINE.replace(b"\t5\t", b"\t" + b"9" * 30 + b"\t"), "field 2 is '9{30}'"),
        (LINE.replace(b"68fd1e64", b"68fd1e6g"), "field 15 is '68fd1e6g'; it has to be hexadecimal"),
        (LINE.replace(b"68fd1e64", b"068fd1e64"), "field 15"),
        (LINE.replace(b"68fd1e64", b"\xff\xfe"), "field 15"),
        (LINE.replace(b"68fd1e64", "１".encode()), "field 15"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, broken: bytes, fault: str) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(LINE + b"\r\n" + broken + b"\n" + LINE + b"\n")
    with pytest.raises(ValueError, match=rf"log\.txt:2: .*{fault}"):
        next(CriteoLog(path).training(Share(0, 1), 3))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(LINE + b"\n" for _ in range(2000)), compresslevel=0)
    cut = tmp_path / "cut.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.gz:\d+: the file cannot be read on"):
        list(CriteoLog(cut).held_out(Share(0, 1), 10))
    endless = tmp_path / "endless.txt"
    endless.write_bytes(LINE + b"\n" + b"1" * 100_000)
    with pytest.raises(ValueError, match=r"endless\.txt:2: the line is longer"):
        next(CriteoLog(endless).training(Share(0, 1), 2))
    with pytest.raises(ValueError, match="fewer than 2 lines"):
        short = tmp_path / "short.txt"
        short.write_bytes(LINE)
        next(CriteoLog(short).training(Share(0, 1), 2))
    with pytest.raises(FileNotFoundError):
        next(CriteoLog(tmp_path / "none").training(Share(0, 1), 2))
    with pytest.raises(ValueError, match="give 26 numbers"):
        CriteoLog(cut, [1] * 26)


def test_dense_features_and_missing_ones(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(LINE)
    batch = next(CriteoLog(path).training(Share(0, 1), 1))
    assert batch.dense[0].tolist() == pytest.approx([np.log(6), 0, 0, *[np.log(8)] * 10], rel=1e-6)
    assert batch.ids[1] == 0  # missing
    assert (np.delete(batch.ids, 1) > 0).all()


def test_the_ranks_share_every_batch(log: Path) -> None:
    """The same lines in the same order, whatever the number of ranks; the rest fills no batch."""
    source = CriteoLog(log)
    alone = list(source._batches(Share(0, 1), 24))
    assert len(alone) == 4
    for ranks in (2, 3, 4):
        parts = [list(source._batches(Share(rank, ranks), 24 // ranks)) for rank in range(ranks)]
        assert {len(part) for part in parts} == {4}
        for whole, *shares in zip(alone, *parts, strict=True):
            assert np.array_equal(whole.labels, np.concatenate([it.labels for it in shares]))
            assert np.array_equal(whole.dense, np.concatenate([it.dense for it in shares]))
            columns = [it.ids.reshape(26, -1) for it in shares]
            assert np.array_equal(whole.ids.reshape(26, -1), np.concatenate(columns, 1))


def test_one_batch_in_ten_is_held_out(log: Path) -> None:
    source = CriteoLog(log)
    trained = list(islice(source.training(Share(0, 1), 5), 36))  # 20 batches are 18 of training, twice
    held_out = list(source.held_out(Share(0, 1), 5))
    assert len(held_out) == 2
    assert np.array_equal(trained[0].ids, trained[18].ids)
    assert not any(np.array_equal(it.ids, other.ids) for it in trained for other in held_out)


def test_hashing_is_the_same_in_every_process(log: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(criteo.__file__).parent)!r})\n"
        "from pathlib import Path; from criteo import CriteoLog; from click_logs import Share\n"
        f"print(*next(CriteoLog(Path({str(log)!r})).training(Share(0, 1), 20)).ids)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    ids = next(CriteoLog(log).training(Share(0, 1), 20)).ids
    assert [int(each) for each in done.stdout.split()] == ids.tolist()
    tables = CriteoLog(log).tables
    assert all((part < table.rows).all() for part, table in zip(ids.reshape(26, -1), tables, strict=True))


def test_ragged_rows_are_taken_in_order() -> None:
    some = Ragged.of([[1, 2], [], [3], [4, 5, 6]])
    values, lengths = some.take(np.array([3, 1, 0, 3]))
    assert values.tolist() == [4, 5, 6, 1, 2, 4, 5, 6]
    assert lengths.tolist() == [3, 0, 2, 3]


def wheel(folder: Path, ratings: list[tuple[int, int, int, int]], **changes: str) -> Path:
    """A file as RecBole's, with the ratings (user, film, stars, second)."""
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    inter = "".join(f"{u}\t{f}\t{stars}\t{time}\n" for u, f, stars, time in ratings)
    contents = {
        "user": "header\n" + "".join(f"{u}\t{20 + u}\tF\tartist\tT8H1N\n" for u in range(1, 5)),
        "item": "header\n" + "".join(f"{f}\tFilm\t1995\tDrama War\n" for f in range(1, 60)),
        "inter": "header\n" + inter,
        **changes,
    }
    with zipfile.ZipFile(path, "w") as file:
        for kind, text in contents.items():
            file.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{kind}", text)
    return path


def by_table(log: MovieLens, batch: Batch) -> dict[str, list[list[int]]]:
    """The ids of each table and sample."""
    ends = np.cumsum(batch.lengths)
    lists = [part.tolist() for part in np.split(batch.ids, ends[:-1])]
    size = len(batch.labels)
    return {table.name: lists[place * size :][:size] for place, table in enumerate(log.tables)}


def test_movielens_knows_the_past_only(tmp_path: Path) -> None:
    """User 1 rates films 1, 2, … one a second, but for two in the same second; odd films are liked."""
    times = [0, 1, 2, 2, *range(3, 49)]
    ratings = [(1, film, 5 if film % 2 else 3, time) for film, time in enumerate(times, 1)]
    source = MovieLens(wheel(tmp_path, ratings[::-1]))  # in no order
    (batch,) = source.held_out(Share(0, 1), 10)  # films 41 to 50
    told = by_table(source, batch)
    films = sorted(map(str, range(1, 60)))
    for place, film in enumerate(range(41, 51)):
        number = films.index(str(film))
        assert told["film"][place] == [number]
        assert batch.labels[place] == film % 2
        assert told["liked"][place] == list(range(0, film - 1, 2))[-LATEST:]
        assert told["disliked"][place] == list(range(1, film - 1, 2))[-LATEST:]
        assert told["genre"][place] == [0, 1]
    assert source.tables[-2].pooling == pytest.approx(np.mean([min(LATEST, (f - (f == 4)) // 2) for f in range(1, 41)]))
    early = by_table(source, next(source.training(Share(0, 1), 40)))
    together = [
        (early["liked"][p], early["disliked"][p]) for p, f in enumerate(early["film"]) if films[f[0]] in ("3", "4")
    ]
    assert together == [([0], [1])] * 2  # of one second: neither knows the other


def test_movielens_shuffles_alike_on_all_ranks(tmp_path: Path) -> None:
    ratings = [(1 + n % 4, 1 + n, 1 + n % 5, n // 2) for n in range(50)]
    source = MovieLens(wheel(tmp_path, ratings))
    alone = list(islice(source.training(Share(0, 1), 20), 4))  # 40 samples an epoch
    parts = [list(islice(source.training(Share(rank, 2), 10), 4)) for rank in range(2)]
    for whole, first, second in zip(alone, *parts, strict=True):
        assert np.array_equal(whole.dense, np.concatenate([first.dense, second.dense]))
    assert not np.array_equal(alone[0].dense, alone[2].dense)  # another epoch, another order
    with pytest.raises(ValueError, match="a batch of all ranks takes 50"):
        next(source.training(Share(0, 2), 25))


def test_what_is_no_movielens_is_named(tmp_path: Path) -> None:
    none = tmp_path / "none.whl"
    none.write_text("not a zip")
    with pytest.raises(ValueError, match="does not hold MovieLens-100k"):
        MovieLens(none)
    ratings = [(1, 1, 5, 0)] * 5
    with pytest.raises(ValueError, match=r"ml-100k\.inter:2: 2 fields instead of 4"):
        MovieLens(wheel(tmp_path, ratings, inter="header\n1\t2\n"))
    with pytest.raises(ValueError, match=r"ml-100k\.inter: could not convert"):
        MovieLens(wheel(tmp_path, ratings, inter="header\n1\t2\tgood\t0\n"))
    with pytest.raises(ValueError, match="'99' the first"):
        MovieLens(wheel(tmp_path, [(99, 1, 5, 0)] * 5))
    assert fetch(tmp_path).name == "recbole-1.2.1-py3-none-any.whl"  # what is there is not fetched again


def test_synthetic_clicks_have_the_lookups_asked_for() -> None:
    tables = (Table("a", 10, 1.0), Table("b", 5, 3.0))
    source = SyntheticLog(tables, 2, lambda table: Uniform(table.rows))
    batch, again, other = (next(source.training(Share(rank, 2), 16)) for rank in (0, 0, 1))
    assert batch.lengths.tolist() == [[1] * 16, [3] * 16]
    assert batch.ids[:16].max() < 10
    assert batch.ids[16:].max() < 5
    assert np.array_equal(batch.ids, again.ids)
    assert not np.array_equal(batch.ids, other.ids)
    with pytest.raises(ValueError, match=r"table 'a': pooling is 1\.5"):
        SyntheticLog((Table("a", 10, 1.5),), 2, lambda table: Uniform(table.rows))


def test_a_logs_stack_distances_are_drawn(log: Path) -> None:
    source = opened(Run(f"synthetic:stack-distance:{log}"))
    drawn = next(source.training(Share(0, 1), 400)).ids.reshape(26, -1)
    written = zip(*(parse(line, "").categories for line in lines(log)), strict=True)
    for table, ids, column in zip(source.tables, drawn, written, strict=True):
        assert ids.max() < table.rows
        if table.rows > 400:  # not every row is seen, so that no distance is cut off
            assert set(StackDistances.of(ids.tolist()).distances) <= set(StackDistances.of(column).distances)


@pytest.mark.parametrize("data", ["", "criteo", "criteo:", "synthetic:", "synthetic:zipf", "synthetic:stack-distance"])
def test_data_that_is_not_known_is_named(data: str) -> None:
    with pytest.raises(ValueError, match=f"data is '{data}'; give criteo:PATH"):
        opened(Run(data))
