"""`forerun dlrm plan`: plans from the example's files and from others, and one line for what cannot be planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from torchrec_models import HOTNESS, ROWS
from typer.testing import CliRunner

from forerun import cli
from forerun.dlrm.report import Report
from forerun.dlrm.tables_file import read_tables
from forerun.dlrm.torchrec_files import FilePlanning

_EXAMPLES = Path(__file__).parents[2] / "examples"
_CPU = {"world_size": 2, "compute_device": "cpu", "reserved_percent": 5}
_TABLES = "name,rows,dim,pooling_factor\na,1000,16,1\nb,200,16,5\nc,4000,16,9\n"

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command on files of such content, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def plan(*arguments: str, tables: str = _TABLES, topology: dict[str, Any] = _CPU) -> Result:
        Path("tables.csv").write_text(tables)
        Path("topology.json").write_text(json.dumps(topology))
        files = ["--tables", "tables.csv", "--topology", "topology.json"]
        return CliRunner().invoke(cli.app, ["dlrm", "plan", *files, *arguments])

    return plan


def test_the_examples_files_are_mlperfs() -> None:
    rows = read_tables(_EXAMPLES / "tables.csv")
    assert [row.rows for row in rows] == ROWS
    assert [row.pooling_factor for row in rows] == [(float(hotness),) for hotness in HOTNESS]
    assert {row.dim for row in rows} == {128}


def test_the_examples_plan_is_the_best_possible(run: Run, tmp_path: Path) -> None:
    files = ["--tables", str(_EXAMPLES / "tables.csv"), "--topology", str(_EXAMPLES / "topology.json")]
    wanted = ["--batch-size", "8192", "--out", "plan.json", "--picture", "loads.png", "--compare"]
    result = CliRunner().invoke(cli.app, ["dlrm", "plan", *files, *wanted])
    assert result.exit_code == 0, result.output
    report = Report.load("plan.json")
    assert report.rating == pytest.approx(4.0708, abs=1e-4)
    assert report.gap == pytest.approx(0, abs=1e-6)
    assert {table.table for table in report.tables} == {f"bags.t{n}" for n in range(26)}
    assert "rating 4.0708 ms" in result.stdout
    assert "torchrec's planner: rating 4.1733 ms" in result.stdout
    assert Path("loads.png").read_bytes().startswith(b"\x89PNG")
    assert result.stderr == ""


def test_what_changes_from_an_earlier_plan(run: Run) -> None:
    assert run("--out", "old.json").exit_code == 0
    same = run("--before", "old.json")
    assert "0 tables change" in same.stdout
    pinned = _TABLES.replace("factor\n", "factor,sharding_types\n").replace("1\nb", "1,\nb").replace("5\nc", "5,\nc")
    other = run("--before", "old.json", tables=pinned.replace("16,9\n", "16,9,data_parallel\n"))
    assert other.exit_code == 0, other.output
    assert "bags.c" in other.stdout
    assert "data_parallel" in other.stdout


def test_columns_reach_the_planner(tmp_path: Path) -> None:
    tables, topology = tmp_path / "tables.csv", tmp_path / "topology.json"
    tables.write_text(
        "name,rows,dim,features,pooling_factor,batch_size,num_poolings,data_type,weighted,pooling,sharding_types,"
        "compute_kernels,min_partition\n"
        "a,1000,128,f|g,2|3,64|32,1|2,fp16,,mean,column_wise,fused,32\n"
        "b,200,16,h,4,,,,yes,,,,\n"
        "c,200,16,i|j,,,,,,,,,\n"
    )
    topology.write_text(json.dumps({"world_size": 2, "compute_device": "cuda", "hbm_gb": [1, 2], "ddr_gb": 3}))
    planning = FilePlanning(tables, topology, batch_size=16)
    options = {option.name: option for option in _options(planning)}
    assert {name: option.fqn for name, option in options.items()} == {
        "a": "bags.a",
        "b": "weighted_bags.b",
        "c": "bags.c",
    }
    assert options["a"].input_lengths == [2.0, 3.0]
    assert options["a"].tensor.dtype.itemsize == 2
    assert (options["a"].sharding_type, options["a"].num_shards) == ("column_wise", 4)
    assert (options["b"].is_weighted, options["c"].is_weighted) == (True, False)
    assert planning.plan().capacity[1][0] == int(2 * 1024**3 * 0.85)
    own = planning.planner.get_search_space()
    assert {option.batch_size for option in own} == {16}


def _options(planning: FilePlanning) -> Any:
    planning.plan()
    return planning.planner.get_selected_options()


def test_a_calibration_is_taken_from_beside_the_file(run: Run, calibrated: tuple[Path, str]) -> None:
    measured = {"world_size": 2, "calibration": str(calibrated[0]), "message_bytes": 65536, "ddr_gb": 1}
    result = run("--out", "measured.json", topology=measured)
    assert result.exit_code == 0, result.output
    run("--out", "stock.json")
    assert Report.load("measured.json").rating != Report.load("stock.json").rating
    more = run(topology={**measured, "world_size": 4, "local_world_size": 2})
    assert more.exit_code == 1
    assert "key calibration: " in more.stderr
    assert "inter_host was not measured" in more.stderr


def test_a_warning_is_a_line(run: Run) -> None:
    result = run(tables="name,rows,dim\na,1000,16\n")
    assert result.exit_code == 0
    assert result.stderr.startswith("forerun dlrm plan: warning: no table has pooling factors")
    assert len(result.stderr.splitlines()) == 1


def test_torchrecs_planner_may_find_none(run: Run) -> None:
    """Six tables that fill two ranks to 96%: packing by cost, as torchrec does, leaves one over."""
    packed = [(46, 20), (22, 31), (36, 23), (52, 38), (51, 14), (45, 33)]  # thousand rows, ids per sample
    rows = "".join(f"t{n},{rows}000,16,{ids},table_wise\n" for n, (rows, ids) in enumerate(packed))
    tight = {**_CPU, "reserved_percent": 0, "ddr_gb": 252000 * 16 * 4 * 0.52 / 1024**3}
    tables = "name,rows,dim,pooling_factor,sharding_types\n" + rows
    result = run("--batch-size", "1", "--compare", tables=tables, topology=tight)
    assert result.exit_code == 0, result.output
    assert "torchrec's planner: found no plan: " in result.stdout


@pytest.mark.parametrize(
    "arguments, tables, topology, told",
    [
        (["--batch-size", "0"], _TABLES, _CPU, "--batch-size 0"),
        (["--timeout", "0"], _TABLES, _CPU, "--timeout 0"),
        (["--out", "nowhere/plan.json"], _TABLES, _CPU, "no folder"),
        (["--before", "none.json"], _TABLES, _CPU, "none.json"),
        (["--before", "topology.json"], _TABLES, _CPU, "not a report"),
        ([], "name,rows\na,1\n", _CPU, "tables.csv, line 1"),
        ([], _TABLES, {"world_size": 2}, "topology.json"),
        ([], _TABLES, {**_CPU, "calibration": "none.json"}, "none.json"),
        ([], _TABLES, {**_CPU, "ddr_gb": 0.0001}, "bags."),
        ([], "name,rows,dim,compute_kernels\na,100,16,fused_uvm\n", _CPU, "a"),
        (["--picture", "loads.nothing"], _TABLES, _CPU, "nothing"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    run: Run, arguments: list[str], tables: str, topology: dict[str, Any], told: str
) -> None:
    result = run(*arguments, tables=tables, topology=topology)
    assert result.exit_code == 1, result.output
    told_last = result.stderr.splitlines()[-1]
    assert told_last.startswith("forerun dlrm plan: ")
    assert told in told_last
    assert "Traceback" not in result.output
    assert {path.name for path in Path().iterdir()} == {"tables.csv", "topology.json"}
