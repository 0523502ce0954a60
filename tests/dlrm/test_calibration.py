"""A calibration: the line through times, the file, the ranks that measure, and what becomes of lost ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from forerun import cli
from forerun.dlrm.calibration import COLLECTIVES, Calibration, Line, Timing, fit

_SMALL = ("--largest", "1", "--repeats", "3", "--table", "4")  # MB
_PATIENCE = 240  # seconds, most of them imports on a busy machine
_SIZES = (65536, 262144, 1048576)


@given(st.floats(0, 10), st.floats(1e3, 1e9))
def test_a_line_is_found_again(latency: float, speed: float) -> None:
    found = fit([Timing(size, latency + size / speed) for size in (10**5, 10**6, 10**7, 10**8)])
    for size in (10**5, 10**8):
        assert found[0] + size / found[1] == pytest.approx(latency + size / speed, rel=1e-6)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=6))
def test_no_line_is_negative(times: list[float]) -> None:
    latency, speed = fit([Timing(1000 * (n + 1), ms) for n, ms in enumerate(times)])
    assert latency >= 0
    assert speed > 0


def test_one_size_is_no_line() -> None:
    with pytest.raises(ValueError, match="two sizes"):
        fit([Timing(10, 1.0), Timing(10, 2.0)])
    with pytest.raises(ValueError, match="positive"):
        fit([Timing(10, 1.0), Timing(20, 0.0)])


def test_a_bandwidth_is_of_a_size() -> None:
    line = Line("all_to_all", "intra_host", 2, 0.0, 1.0, (Timing(100, 1.0), Timing(200, 4.0)))
    assert line.bandwidth() == line.bandwidth(200) == line.bandwidth(4000) == 50
    assert line.bandwidth(100) == 100
    assert line.bandwidth(150) == 150 / 2.5
    assert line.bandwidth(10) == 10


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "forerun", "dlrm", "calibrate", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What the process printed; it does not outlive the call."""
    try:
        return process.communicate(timeout=_PATIENCE)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def assert_measures(calibration: Calibration, *scopes: str) -> None:
    """There is a line for the memory and one for every collective of each scope, of every size."""
    operations = {(line.operation, line.scope) for line in calibration.lines}
    assert operations == {("lookup", "rank"), *((name, scope) for name in COLLECTIVES for scope in scopes)}
    for line in calibration.lines:
        assert all(timing.ms > 0 for timing in line.timings)
        if line.operation in COLLECTIVES:
            assert tuple(timing.bytes for timing in line.timings) == _SIZES


def test_processes_on_this_machine_measure_it(calibrated: tuple[Path, str], tmp_path: Path) -> None:
    out, told = calibrated
    assert str(out) in told
    assert "all_to_all, intra_host, 65536 bytes" in told
    calibration = Calibration.load(out)
    assert (calibration.world_size, calibration.local_world_size, calibration.backend) == (2, 2, "gloo")
    assert_measures(calibration, "intra_host")
    assert [path.name for path in out.parent.iterdir()] == ["calibration.json"]
    calibration.save(tmp_path / "again.json")
    assert Calibration.load(tmp_path / "again.json") == calibration


def test_ranks_of_torchrun_measure_between_hosts(tmp_path: Path) -> None:
    """Four ranks that take themselves for two hosts of two, as torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        start(
            *("--out", tmp_path / "calibration.json", *_SMALL),
            RANK=str(rank),
            WORLD_SIZE="4",
            LOCAL_RANK=str(rank % 2),
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(4)
    ]
    printed = [end(rank) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, printed
    assert [out.count("calibration:") for out, _ in printed] == [1, 0, 0, 0]
    calibration = Calibration.load(tmp_path / "calibration.json")
    assert_measures(calibration, "intra_host", "inter_host")
    assert {line.ranks for line in calibration.lines if line.scope == "inter_host"} == {4}


def test_a_lost_rank_is_an_error_and_no_file(tmp_path: Path) -> None:
    process = start("--ranks", "2", "--out", tmp_path / "calibration.json", "--repeats", "100000")
    assert process.stdout is not None
    process.stdout.readline()  # the ranks measure
    time.sleep(0.2)
    victim = children(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    _, errors = end(process)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("forerun dlrm calibrate: rank ")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
    assert children(process.pid) == []


def test_time_may_run_out(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start("--ranks", "2", "--out", tmp_path / "calibration.json", "--repeats", "100000", "--timeout", "3")
    _, errors = end(process)
    assert process.returncode == 1
    assert "not done after 3 s" in errors
    assert time.monotonic() - began < 120
    assert list(tmp_path.iterdir()) == []


def children(parent: int) -> list[int]:
    """The process's children that work for it: multiprocessing's own helper is not one."""
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    found = [int(child) for child in listed.read_text().split()] if listed.exists() else []
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((), "--ranks"),
        (("--ranks", "0"), "expected 1 or more"),
        (("--ranks", "2", "--device", "tpu"), "'tpu'"),
        (("--ranks", "2", "--timeout", "0"), "timeout 0"),
        (("--ranks", "2", "--largest", "0"), "largest"),
        (("--ranks", "2", "--repeats", "0"), "repeat"),
        (("--ranks", "2", "--out", "nowhere/calibration.json"), "no folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    result = CliRunner().invoke(cli.app, ["dlrm", "calibrate", *arguments])
    assert (result.exit_code, told in result.stderr) == (1, True), result.stderr
    assert list(tmp_path.iterdir()) == []


def test_ranks_are_torchruns_or_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    result = CliRunner().invoke(cli.app, ["dlrm", "calibrate", "--ranks", "2", "--out", str(tmp_path / "c.json")])
    assert result.exit_code == 1
    assert "torchrun" in result.stderr


def test_another_file_is_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    line = {"operation": "lookup", "scope": "rank", "ranks": 1, "latency_ms": 0, "bytes_per_ms": 1, "timings": []}
    fields = dict.fromkeys(("made", "compute_device", "backend", "hardware"), "x")
    numbers = dict.fromkeys(("world_size", "local_world_size", "threads"), 1)
    whole = {"format": "forerun dlrm calibration", "version": 1, **fields, **numbers, "versions": {}, "lines": []}
    for content, told in (
        ("not json", "not a file written by"),
        ("[]", "not a file written by"),
        ("{}", "its format is None"),
        (json.dumps({**whole, "version": 2}), "version 2"),
        (json.dumps({**whole, "lines": [line]}), "no times"),
        (json.dumps({**whole, "more": 1}), "more"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=told):
            Calibration.load(path)
    path.write_text(json.dumps(whole))
    assert Calibration.load(path).lines == ()
