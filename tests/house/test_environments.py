"""What an environment's stamps depend on, and when one is made again. Nothing is installed here."""

import importlib
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def environments(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "tests" / "hosts")
    monkeypatch.delitem(sys.modules, "environments", raising=False)
    yield importlib.import_module("environments")
    sys.modules.pop("environments", None)


@pytest.fixture
def copy(root, tmp_path):
    """The pins and the project's metadata in a folder of their own."""
    (tmp_path / "tests" / "hosts").mkdir(parents=True)
    for pins in (root / "tests" / "hosts").glob("*.txt"):
        shutil.copy(pins, tmp_path / "tests" / "hosts")
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.fixture
def steps(environments, monkeypatch):
    """The steps that `make` would take; the first makes the folder, as `venv` does."""
    taken = []

    def step(environment, name, command, root, log, variables=None):
        (root / environment.directory).mkdir(exist_ok=True)
        taken.append(name)

    monkeypatch.setattr(environments, "_step", step)
    return taken


def test_an_environment_is_made_once(environments, copy, steps):
    main = environments.ENVIRONMENTS["main"]
    assert environments.make(main, copy)
    assert steps == ["creating", "installing", "building", "checking", "adding forerun"]
    steps.clear()
    assert not environments.make(main, copy)
    assert steps == []


@pytest.mark.parametrize("pins", ["main.txt", "main-source.txt"])
def test_other_pins_make_it_again_from_nothing(environments, copy, steps, pins):
    main = environments.ENVIRONMENTS["main"]
    environments.make(main, copy)
    (copy / ".venv" / "left-over").touch()
    steps.clear()
    with (copy / "tests" / "hosts" / pins).open("a") as file:
        file.write("another==1\n")
    assert environments.make(main, copy)
    assert steps[0] == "creating"
    assert not (copy / ".venv" / "left-over").exists()


def test_another_recipe_python_or_place_makes_it_again(environments, copy, monkeypatch):
    main = environments.ENVIRONMENTS["main"]
    before = main.packages_stamp(copy)
    assert main.packages_stamp(copy / "tests" / "..") != before
    with monkeypatch.context() as patch:
        patch.setattr(environments, "RECIPE", -1)
        assert main.packages_stamp(copy) != before
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version", "4.0")
        assert main.packages_stamp(copy) != before
    assert main.packages_stamp(copy) == before


def test_other_metadata_installs_the_project_only(environments, copy, steps):
    main = environments.ENVIRONMENTS["main"]
    environments.make(main, copy)
    steps.clear()
    with (copy / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert environments.make(main, copy)
    assert steps == ["adding forerun"]
    assert not environments.make(main, copy)


@pytest.mark.parametrize("failing", ["creating", "installing", "building", "checking"])
def test_a_half_made_one_is_removed(environments, copy, steps, monkeypatch, failing):
    main = environments.ENVIRONMENTS["main"]
    whole = environments._step

    def fail(environment, name, *rest):
        whole(environment, name, *rest)
        if name == failing:
            (copy / ".venv" / "half").touch()
            raise environments.StepFailed(name)

    monkeypatch.setattr(environments, "_step", fail)
    with pytest.raises(environments.StepFailed):
        environments.make(main, copy)
    monkeypatch.setattr(environments, "_step", whole)
    assert environments.make(main, copy)
    assert not (copy / ".venv" / "half").exists()


def test_a_failing_step_shows_the_end_of_its_log(environments, copy, capfd):
    main, log = environments.ENVIRONMENTS["main"], copy / "log"
    log.write_text("")
    code = "print('Location x is ignored: it is neither'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(environments.StepFailed, match=r"exit 3(.|\n)*the reason") as raised:
        environments._step(main, "installing", [sys.executable, "-c", code], copy, log)
    assert "Location x is ignored: it is neither\n" not in str(raised.value)
    assert "main: installing: failed" in capfd.readouterr().out


def test_every_pin_is_exact_and_stands_once(environments, root):
    for environment in environments.ENVIRONMENTS.values():
        lines = [line for pins in environment.pins(root) for line in pins.read_text().splitlines()]
        pins = [line for line in lines if not line.startswith("#")]
        assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)] == []
        names = [re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins]
        assert len(set(names)) == len(names)
        # CUDA builds that break vLLM's import on a CPU.
        if environment.name == "main":
            assert not {"torchvision", "torchaudio", "torchcodec", "triton"} & set(names)


def test_an_unknown_environment_is_refused(root):
    script = root / "tests" / "hosts" / "environments.py"
    done = subprocess.run([sys.executable, script, "windows"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "windows" in done.stderr
