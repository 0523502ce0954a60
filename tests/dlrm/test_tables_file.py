"""Tables and ranks from files: what they may say, and where what they may not is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forerun.dlrm.tables_file import read_tables
from forerun.dlrm.topology_file import read_topology

_TYPES = ("row_wise", "table_wise")
_HEADER = "name,rows,dim,pooling_factor,features,data_type,weighted,pooling,sharding_types,min_partition\n"


@pytest.fixture
def tables(tmp_path: Path) -> Any:
    def read(content: str | bytes) -> Any:
        path = tmp_path / "tables.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_tables(path, sharding_types=_TYPES, compute_kernels=("fused",))

    return read


@pytest.fixture
def topology(tmp_path: Path) -> Any:
    def read(content: str | bytes | dict[str, Any]) -> Any:
        path = tmp_path / "topology.json"
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_topology(path, constants=("hbm_mem_bw", "intra_host_bw"))

    return read


def test_every_column_is_read(tables: Any) -> None:
    first, second = tables(
        "\ufeff" + _HEADER + 'a,1000,16,1.5| 2,f|g,FP16,yes,mean,row_wise|table_wise,8\r\n\r\n"b,c", 5 ,4,,,,,,,\n'
    )
    assert (first.line, first.name, first.rows, first.dim) == (2, "a", 1000, 16)
    assert (first.pooling_factor, first.features) == ((1.5, 2.0), ("f", "g"))
    assert (first.data_type, first.weighted, first.pooling) == ("fp16", True, "mean")
    assert (first.sharding_types, first.min_partition) == (("row_wise", "table_wise"), 8)
    assert (second.line, second.name, second.rows, second.features) == (4, "b,c", 5, ("b,c",))
    assert (second.pooling_factor, second.data_type, second.min_partition) == ((), "fp32", None)


@pytest.mark.parametrize(
    "content, told",
    [
        ("", "tables.csv is empty"),
        ("name,rows,dim\n", "a header and no table"),
        ("name,rows\na,1\n", "line 1: there is no column 'dim'"),
        ("name,rows,dim,poling_factor\n", "line 1, column 'poling_factor': .* did you mean 'pooling_factor'"),
        ("name,rows,dim,rows\n", "line 1: column 'rows' comes twice"),
        ("name,rows,dim\na,1\n", "line 2: 2 cells; the header has 3"),
        ("name,rows,dim\na,1,4\n,1,4\n", "line 3, column name: empty"),
        ("name,rows,dim\na,1,4\nb,1,4\na,1,4\n", "line 4, column name: 'a' is the table of line 2"),
        ("name,rows,dim\na,-1,4\n", "line 2, column rows: got '-1'"),
        ("name,rows,dim\na,1.5,4\n", "line 2, column rows: got '1.5'; expected a whole number"),
        ("name,rows,dim\na,1,inf\n", "line 2, column dim: got 'inf'"),
        ("name,rows,dim,pooling_factor\na,1,4,-2\n", "line 2, column pooling_factor: got '-2'"),
        ("name,rows,dim,pooling_factor\na,1,4,many\n", "line 2, column pooling_factor: got 'many'"),
        ("name,rows,dim,pooling_factor\na,1,4,1|2\n", "line 2, column pooling_factor: 2 values and 1 features"),
        ("name,rows,dim,data_type\na,1,4,fp8\n", "line 2, column data_type: got 'fp8'"),
        ("name,rows,dim,weighted\na,1,4,perhaps\n", "line 2, column weighted: got 'perhaps'"),
        ("name,rows,dim,sharding_types\na,1,4,rowwise\n", "column sharding_types: .* did you mean 'row_wise'"),
        ("name,rows,dim,compute_kernels\na,1,4,fusd\n", "column compute_kernels: .* did you mean 'fused'"),
        ('name,rows,dim\na,1,4\n"b,1,4\n', "line [34]: not a CSV file"),
        (b"name,rows,dim\n\xff\xfe,1,4\n", "not a CSV file"),
    ],
)
def test_a_mistake_is_named_with_its_place(tables: Any, content: str | bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        tables(content)
    assert "tables.csv" in str(caught.value)


def test_every_key_is_read(topology: Any, tmp_path: Path) -> None:
    read = topology(
        {
            "world_size": 2,
            "local_world_size": 1,
            "compute_device": "cuda",
            "hbm_gb": [80, 0.5],
            "ddr_gb": 2,
            "reserved_percent": 5,
            "calibration": "measured/calibration.json",
            "message_bytes": 1024,
            "constants": {"intra_host_bw": 7.5},
        }
    )
    assert (read.world_size, read.local_world_size, read.compute_device) == (2, 1, "cuda")
    assert read.of_ranks("hbm_gb") == [80 * 1024**3, 1024**3 // 2]
    assert read.of_ranks("ddr_gb") == [2 * 1024**3] * 2
    assert read.calibration == tmp_path / "measured" / "calibration.json"
    assert (read.reserved_percent, read.message_bytes, read.constants) == (5.0, 1024, {"intra_host_bw": 7.5})
    assert topology({"world_size": 2, "compute_device": "cpu"}).of_ranks("ddr_gb") is None


@pytest.mark.parametrize(
    "content, told",
    [
        ("{", "line 1, column 2: not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[]", 'at least "world_size"'),
        ("{}", 'at least "world_size"'),
        ('{"world_size": 2, "world_size": 4}', "key world_size: comes twice"),
        ({"world_size": 2, "hbm_bg": 80}, "key 'hbm_bg': .* did you mean 'hbm_gb'"),
        ({"world_size": 0, "compute_device": "cpu"}, "key world_size: got 0"),
        ({"world_size": True, "compute_device": "cpu"}, "key world_size: got True"),
        ({"world_size": 4, "local_world_size": 3, "compute_device": "cpu"}, "do not divide into hosts of 3"),
        ({"world_size": 2}, "expected compute_device"),
        ({"world_size": 2, "compute_device": "gpu"}, "key compute_device: got 'gpu'; "),
        ({"world_size": 2, "compute_device": "cpu", "hbm_gb": 80}, "key hbm_gb: ranks on a CPU"),
        ({"world_size": 2, "compute_device": "cuda", "hbm_gb": -1}, "key hbm_gb: got -1"),
        ({"world_size": 2, "compute_device": "cuda", "hbm_gb": [1]}, "key hbm_gb: 1 numbers and 2 ranks"),
        ({"world_size": 2, "compute_device": "cpu", "reserved_percent": 100}, "expected less than 100"),
        ({"world_size": 2, "compute_device": "cpu", "message_bytes": 1}, "there is none"),
        ({"world_size": 2, "calibration": 3}, "key calibration: got 3"),
        ({"world_size": 2, "compute_device": "cpu", "constants": {"hbm_bw": 1}}, "did you mean 'hbm_mem_bw'"),
        ({"world_size": 2, "compute_device": "cpu", "constants": {"hbm_mem_bw": 0}}, "expected a number above it"),
        ({"world_size": 2, "compute_device": "cpu", "constants": [1]}, "an object of names"),
    ],
)
def test_a_wrong_key_is_named(topology: Any, content: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        topology(content)
    assert "topology.json" in str(caught.value)
