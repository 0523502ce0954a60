"""Speculation turned on by DeepSpeed's configuration, in real processes over gloo."""

import subprocess
import sys

import pytest

pytest.importorskip("deepspeed")

from processes import ran

from forerun.moe.deepspeed_config import Section


def test_a_section_is_all_it_takes(tmp_path):
    """`initialize` and `init_inference`, dictionaries and files, what is refused, and a script that is not changed."""
    codes, outputs = ran("config_program.py", 2, ["check", "{rank}", "2", str(tmp_path / "store")])
    assert codes == [0, 0], "\n".join(output[-3000:] for output in outputs)
    for output in outputs:
        told = output.splitlines()[-1].split()
        assert told[:3] == ["script", "script", "moe"]
        assert int(told[3]) > 0


def test_nothing_is_asked_for_without_a_section():
    assert Section.read(None) == Section() == Section.read({})
    assert not Section().enabled


def test_without_a_script_the_usage_is_told(tmp_path):
    for arguments, message in (
        ([], "usage: python -m forerun.moe.deepspeed SCRIPT"),
        (["none.py"], "none.py is not a file"),
    ):
        command = [sys.executable, "-m", "forerun.moe.deepspeed", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 1
        assert message in done.stderr
