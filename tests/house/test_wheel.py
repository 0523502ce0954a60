"""The wheel: what it holds, and that it works where only it is installed."""

import json
import os
import subprocess
import sys
import zipfile

import pytest


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that holds the installed wheel and nothing else."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return site


def run_installed(site, *arguments):
    """Runs Python with the installed wheel before everything else, outside of the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=site.parent, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_wheel_holds_two_typed_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"forerun", "forerun_adapters"}
    assert len(tops) == 3
    assert {"forerun/py.typed", "forerun_adapters/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_wheel_is_the_one_imported(site):
    done = run_installed(site, "-c", "import forerun, forerun_adapters; print(forerun.__file__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "forerun" / "__init__.py")


def test_the_installed_wheel_knows_the_hosts(site):
    done = run_installed(site, "-m", "forerun", "doctor", "--json")
    told = json.loads(done.stdout)
    assert "diffusers" in {host["host"] for host in told["hosts"]}
    assert done.returncode == (0 if told["healthy"] else 1)


def test_vllm_finds_the_connector(site):
    """Naming it imports nothing: only an engine that asks for it does."""
    names = """
import sys
from importlib.metadata import entry_points
(ours,) = [point for point in entry_points(group="vllm.general_plugins") if "forerun" in point.value]
print(ours.value, ours.load().__name__, any(name.split(".")[0] in ("vllm", "torch") for name in sys.modules))
"""
    done = run_installed(site, "-S", "-c", names)
    assert done.stdout.split() == ["forerun_adapters.vllm_plugin:register", "register", "False"], done.stderr


def test_the_command_is_installed(site):
    assert (site / "bin" / "forerun").is_file()
