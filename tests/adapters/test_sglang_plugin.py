"""The configuration that SGLang's plugin reads, what of it is refused, and that without it nothing is changed."""

import json
import subprocess
import sys

import pytest

from forerun_adapters import sglang_plugin


def test_it_is_an_entry_point(pyproject):
    points = pyproject["project"]["entry-points"]["sglang.srt.plugins"]
    assert points == {"forerun": "forerun_adapters.sglang_plugin:register"}
    assert sglang_plugin.register.__module__ == "forerun_adapters.sglang_plugin"


def test_without_the_variable_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(sglang_plugin.VARIABLE, raising=False)
    code = """
import sys
from forerun_adapters.sglang_plugin import register
register()
print(sorted({name.split(".")[0] for name in sys.modules} & {"sglang", "torch", "numpy"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_file_and_the_text_itself_are_read_alike(tmp_path):
    sections = {"speculative_moe": {"exact": True}}
    file = tmp_path / "forerun.json"
    file.write_text(json.dumps(sections))
    assert sglang_plugin.read(str(file)) == sglang_plugin.read(json.dumps(sections)) == sections


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{", "the variable is not JSON"),
        ('{"moe": {}}', "has a section 'moe'; expected 'speculative_moe' or 'runahead'"),
        ('{"runahead": true}', "section 'runahead' of the variable is True; expected an object"),
    ],
)
def test_a_configuration_that_cannot_be_met_ends_start_up(given, said, monkeypatch):
    monkeypatch.setenv(sglang_plugin.VARIABLE, given)
    with pytest.raises(SystemExit, match="forerun: FORERUN_SGLANG: ") as refused:
        sglang_plugin.register()
    assert said in str(refused.value)


def test_a_file_that_is_no_object_is_named(tmp_path):
    file = tmp_path / "forerun.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"forerun.json holds a list; expected an object"):
        sglang_plugin.read(str(file))


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(sglang_plugin.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(SystemExit, match=r"none\.json"):
        sglang_plugin.register()
