"""Engines as child processes, short of vLLM itself: places, arguments, ports, and that nothing outlives anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from forerun.runahead.arguments import check_arguments, value_of
from forerun.runahead.engines import EngineError, Engines
from forerun.runahead.places import GPUS, Place, find_places, parse_cores
from forerun.runahead.process import Process

# A server that will not listen to reason, nor will its child.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""
# Starts it as forerun does, and is killed.
OWNER = """
import os, sys, time
from pathlib import Path
from forerun.runahead.places import Place
from forerun.runahead.process import Process
process = Process("http://127.0.0.1:9", [sys.executable, "-c", sys.argv[1]], Place(), os.environ, Path(sys.argv[2]))
process.start()
time.sleep(600)
"""


def pids(log):
    """Of the server and its child, which the server prints."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if log.exists() and (
            lines := [line.split() for line in log.read_text().splitlines() if line.startswith("pids")]
        ):
            return [int(pid) for pid in lines[-1][1:]]
        time.sleep(0.05)
    raise AssertionError("the server did not start")


def assert_gone(pids, patience):
    end = time.monotonic() + patience
    while left := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < end, f"{left} are left"
        time.sleep(0.1)


def runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def stubborn(tmp_path):
    process = Process("http://127.0.0.1:9", [sys.executable, "-c", STUBBORN], Place(), os.environ, tmp_path / "log")
    process.start()
    yield process
    process.end(0)


def test_whatever_an_engine_started_ends_with_it(stubborn):
    started = pids(stubborn.log)
    assert stubborn.runs() and not stubborn.answers()
    stubborn.end(0)
    assert_gone(started, 10)
    assert not stubborn.runs()


@pytest.mark.parametrize("which", [0, 1], ids=["server", "keeper"])
def test_a_killed_engine_leaves_nothing_behind_and_starts_again(stubborn, which):
    first = pids(stubborn.log)
    os.kill(first[0] if which == 0 else os.getpgid(first[0]), signal.SIGKILL)
    end = time.monotonic() + 20
    while stubborn.runs():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert_gone(first, 10)
    while not stubborn.is_due():
        time.sleep(0.05)
    stubborn.log.unlink()
    stubborn.start()
    assert stubborn.runs() and not stubborn.is_due()
    assert set(pids(stubborn.log)).isdisjoint(first)


def test_engines_end_with_a_front_that_is_killed(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, STUBBORN, str(tmp_path / "log")])
    try:
        started = pids(tmp_path / "log")
    finally:
        owner.kill()
        owner.wait(30)
    assert_gone(started, 40)  # they are asked first


def test_what_does_not_start_is_told_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engines = Engines("/no/such/model", 1, logs=tmp_path, arguments=["--no-such-argument"])
    monkeypatch.setattr(
        engines._processes[0], "_command", [sys.executable, "-m", "forerun.runahead.keeper", "", "false"]
    )
    with pytest.raises(EngineError, match=r"(?s)ended before it was ready.*engine-0.log.*status 1"), engines:
        raise AssertionError("it did not start")


def test_engines_have_ports_and_addresses_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    endpoints = Engines("m", 3, logs=tmp_path).endpoints
    ports = [int(text.rpartition(":")[2]) for end in endpoints for text in (end.url, end.address)]
    assert len(set(ports)) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "80"], "--port is set for each engine"),
        (["--kv_transfer_config.kv_role=kv_both"], "--kv-transfer-config is set for each engine"),
        (["--data-parallel-size=2"], "--data-parallel-size is 2; an engine of a chain has 1"),
        (["-pp", "2"], "-pp is 2"),
    ],
)
def test_arguments_that_contradict_ours_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(arguments)


def test_other_arguments_pass():
    given = ["--served-model-name", "port", "-tp=2", "--tensor_parallel_size", "4"]
    check_arguments(given)
    assert value_of(given, "--tensor-parallel-size", "-tp") == "4"
    assert value_of(given, "--block-size") is None


def test_cores_are_dealt_out(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv(GPUS, "")
    own = os.sched_getaffinity(0)
    places = find_places(len(own))
    assert sorted(core for place in places for core in place.cores) == sorted(own)
    assert all(place.cores for place in places)
    with pytest.raises(ValueError, match=f"{len(own)} cores for {len(own) + 1} engines of 1: take fewer"):
        find_places(len(own) + 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "are for 1 engines; there are 2"),
        ("0|0", "one is named twice"),
        ("0|x", "expected each engine's"),
        ("0|99999", "not there"),
    ],
)
def test_cores_that_make_no_sense_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_cores(text, 2)


def test_gpus_are_as_many_as_ranks():
    places = find_places(2, ranks=2, gpus="0,1|2,3")
    assert [place.variables for place in places] == [{GPUS: "0,1"}, {GPUS: "2,3"}]
    with pytest.raises(ValueError, match="expected 2 sets of 2"):
        find_places(2, ranks=2, gpus="0|1")


def test_an_engine_that_is_asked_to_end_by_its_keeper_ends(stubborn):
    started = pids(stubborn.log)
    os.kill(os.getpgid(started[0]), signal.SIGTERM)
    assert_gone(started, 40)


def test_engines_do_not_listen_where_none_can_send_to(tmp_path):
    with pytest.raises(ValueError, match=r"cannot send to 0\.0\.0\.0"):
        Engines("m", 1, logs=tmp_path, listen="0.0.0.0")
