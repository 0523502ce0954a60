"""torchrec's DLRM trains by DLRMPlanner's plans to the unsharded model's result, on 2 and 4 real ranks.

Every kind of sharding that runs on a CPU; row-wise, table-row-wise and grid sharding run there too once a sharder
offers them. Four ranks are two hosts of two, so that the kinds that go by host differ from the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_ranks import CASES, DIM, EVERY, RUNS, TABLES

_PROGRAM = Path(__file__).with_name("training_ranks.py")
_EXAMPLES = Path(__file__).parents[2] / "examples"
# The same sums in single precision, in another order: 1e-7 is one step of a number next to 1, and what was measured.
_TOLERANCE = 2e-6

Results = dict[tuple[int, str, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of all ranks, by number of ranks, case and optimiser."""
    folder = tmp_path_factory.mktemp("training")
    path = os.pathsep.join([str(_EXAMPLES), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), str(folder)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: Results = {}
    for ranks in (2, 4):
        for rank in range(ranks):
            for row in json.loads((folder / f"{ranks}.{rank}.json").read_text()):
                found.setdefault((ranks, row["case"], row["optimizer"]), []).append(row)
    assert len(found) == 2 * len(RUNS)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case, optimizer", RUNS)
def test_two_steps_are_the_unsharded_models(results: Results, ranks: int, case: str, optimizer: str) -> None:
    rows = results[ranks, case, optimizer]
    assert len(rows) == ranks
    for row in rows:
        for table, kind in zip(TABLES, CASES[case], strict=True):
            assert row["types"][table.name] in (EVERY if kind is None else (kind,))
        assert row["moved"] > 100 * _TOLERANCE  # every weight, so that a step left out would show
        assert row["loss"] <= _TOLERANCE
        assert row["scores"] <= _TOLERANCE
        assert row["weights"] <= _TOLERANCE
    for table in TABLES:
        name = f"sparse_arch.embedding_bag_collection.embedding_bags.{table.name}.weight"
        copies = ranks if rows[0]["types"][table.name] == "data_parallel" else 1
        assert sum(row["elements"][name] for row in rows) == copies * table.rows * DIM
