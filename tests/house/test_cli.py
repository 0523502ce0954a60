"""The `forerun` command: its version, its errors, its exit status."""

import json
from importlib import import_module

import pytest
from typer.testing import CliRunner

import forerun
from forerun import cli, demo, doctor
from forerun.picard.report import Report
from forerun.report import Section


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "report.json"
    Report(
        scheduler="DDIMScheduler",
        points=50,
        window=50,
        tolerance=1e-3,
        acceleration="none",
        rounds=3,
        evaluations=150,
        seconds=1.0,
        residuals=(1.0, 0.1, 1e-4),
        stopped="converged",
        fell_back=False,
    ).save(path)
    return path


def assert_one_line_error(result, *told):
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    for text in told:
        assert text in result.stderr


def test_version_is_the_distributions(run, root):
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, forerun.__version__)
    assert f'version = "{forerun.__version__}"' in (root / "pyproject.toml").read_text()


def test_doctor_prints_json(run):
    result = run("doctor", "--json")
    assert {host["host"] for host in json.loads(result.stdout)["hosts"]} >= {"diffusers", "vllm"}


def test_doctor_fails_for_an_unsupported_release(run, monkeypatch):
    host = doctor.HostCheck("diffusers", "diffusers", "0.1", ">=0.33.1", False, (), (), "pip install")
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Checkup("0", "3", (host,)))
    assert run("doctor").exit_code == 1
    assert run("doctor", "--json").exit_code == 1


def test_plot_draws_a_picture(run, report, tmp_path):
    pytest.importorskip("matplotlib")
    result = run("picard", "plot", report, report, "--out", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_a_file_that_is_not_there(run, tmp_path):
    assert_one_line_error(run("picard", "plot", tmp_path / "none.json"), "none.json")


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe\x00"])
def test_plot_refuses_a_file_that_is_no_report(run, tmp_path, content):
    (tmp_path / "other.json").write_bytes(content)
    result = run("picard", "plot", tmp_path / "other.json", "--out", tmp_path / "picture.png")
    assert_one_line_error(result, "other.json", "not a report")
    assert not (tmp_path / "picture.png").exists()


def test_demo_refuses_an_unknown_scheme(run, tmp_path):
    assert_one_line_error(run("demo", "--scheme", "euler", "--out", tmp_path / "report"), "'euler'", "picard")
    assert not (tmp_path / "report").exists()


def test_demo_needs_a_checkout(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(run("demo"), "sample_digits.py", "checkout")
    assert_one_line_error(run("demo", "--scheme", "dlrm"), "plan_dlrm.py", "checkout")
    assert_one_line_error(run("demo", "--scheme", "runahead"), "share_prompt.py", "checkout")
    assert list(tmp_path.iterdir()) == []


def test_demo_writes_the_page_and_says_where(run, root, tmp_path, monkeypatch):
    texts = {scheme: f"what {scheme} shows" for scheme in demo.SCHEMES}
    monkeypatch.setattr(demo, "run_example", lambda script, out, progress: (out / "script").write_text(script))
    for scheme, text in texts.items():
        script = import_module(demo.SCHEMES[scheme]).SCRIPT
        assert (root / "examples" / script).is_file()

        def section(out, scheme=scheme, text=text, script=script):
            assert (out / "script").read_text() == script
            return Section(scheme, text)

        monkeypatch.setattr(f"{demo.SCHEMES[scheme]}.section", section)
    result = run("demo", "--out", tmp_path / "report")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "report" / "index.html") in result.stdout.replace("\n", "")
    page = (tmp_path / "report" / "index.html").read_text()
    assert sorted(texts.values(), key=page.index) == list(texts.values())


def test_a_demos_script_that_fails_says_what_it_printed(run, tmp_path, monkeypatch):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "plan_dlrm.py").write_text("print('no ranks today'); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--scheme", "dlrm")
    assert result.exit_code == 1
    assert "exit 3" in result.stderr
    assert "no ranks today" in result.stderr
    assert not (tmp_path / "build").exists()


def test_every_scheme_has_a_room(root):
    rooms = ("picard", "runahead", "dlrm", "moe")
    assert {module.split(".")[1] for module in demo.SCHEMES.values()} == set(rooms)


_WITHOUT = """
import sys
from importlib import metadata
from typer.testing import CliRunner
from forerun import cli

installed = metadata.version
def version(name):
    if name == "torchrec":
        raise metadata.PackageNotFoundError(name)
    return installed(name)
metadata.version = version
{also}
result = CliRunner().invoke(cli.app, {arguments!r})
print(result.exit_code, result.stderr, sep="|")
"""


@pytest.mark.parametrize(
    "arguments, also",
    [
        (["dlrm", "plan", "--tables", "t.csv", "--topology", "t.json"], ""),
        (["dlrm", "plan", "--tables", "t.csv", "--topology", "t.json"], "sys.modules['torch'] = None"),
        (["dlrm", "calibrate", "--ranks", "2"], "sys.modules['torch'] = None"),
    ],
)
def test_dlrm_says_how_to_install_what_it_lacks(run_python, arguments, also):
    status, told = run_python(_WITHOUT.format(also=also, arguments=arguments)).strip().split("|")
    assert status == "1"
    assert told.count("\n") == 0
    assert told.startswith(f"forerun dlrm {arguments[1]}: ")
    assert told.endswith("pip install 'forerun[torchrec]'")
